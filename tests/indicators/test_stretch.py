"""The expected stretch: against networks of random maps, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import indicators
from wf_vit.errors import UsageError

LAYERS, HEADS, TOKENS, WIDTH = 3, 2, 5, 6


def random_arrays(*batch, seed=0):
    """Attention, gains and scales of a network."""
    rng = np.random.default_rng(seed)
    attention = rng.dirichlet(np.ones(TOKENS), (LAYERS, *batch, HEADS, TOKENS))
    gain = rng.uniform(0.5, 2.0, (LAYERS, HEADS))
    scale = rng.uniform(0.5, 2.0, (LAYERS + 1, *batch, TOKENS))
    return tuple(jnp.asarray(x, jnp.float32) for x in (attention, gain, scale))


def test_it_is_the_mean_over_networks_of_random_maps():
    attention, gain, scale = (np.asarray(x, np.float64) for x in random_arrays())
    draws, rng = 3_000, np.random.default_rng(1)
    # What a displacement of token j becomes at token k, [draws, k, D, j, D].
    identity = np.eye(TOKENS * WIDTH).reshape(TOKENS, WIDTH, TOKENS, WIDTH)
    moved = np.broadcast_to(identity, (draws, *identity.shape))
    measured = []
    for layer in reversed(range(LAYERS)):
        outputs = moved / scale[-1][:, None, None, None]
        # Mean over directions d of the token that was displaced.
        measured.append(np.sqrt(np.square(outputs).sum((1, 2, 4)).mean(0) / WIDTH))
        size = gain[layer][:, None, None] / WIDTH**0.5
        weights = attention[layer] / scale[layer] * size
        # Each head has a map of its own for each pair of tokens.
        shape = (draws, HEADS, TOKENS, WIDTH, TOKENS, WIDTH)
        maps = rng.standard_normal(shape, np.float32)
        through = np.einsum("hkj,zhkejd->zkejd", weights, maps)
        moved = moved + np.einsum("zaekb,zkbjd->zaejd", moved, through, optimize=True)
    stretch = indicators.expected_stretch(*random_arrays())
    np.testing.assert_allclose(stretch, measured[::-1], rtol=0.02)


def test_behind_the_last_layer_there_is_the_final_norm_alone():
    attention, gain, scale = random_arrays()
    stretch = indicators.expected_stretch(attention, gain, scale)
    np.testing.assert_allclose(stretch[-1], 1 / scale[-1], rtol=1e-6)


def test_images_are_independent_of_one_another():
    attention, gain, scale = random_arrays(2, 3)
    together = indicators.expected_stretch(attention, gain, scale)
    alone = indicators.expected_stretch(attention[:, 1, 2], gain, scale[:, 1, 2])
    assert together.shape == (LAYERS, 2, 3, TOKENS)
    np.testing.assert_allclose(together[:, 1, 2], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, lambda gain: gain[:-1], r"head_gain has shape \(2, 2\), expected \[L, H\]"),
        (2, lambda scale: scale[:-1], r"token_scale has shape \(3, 5\), expected \(4"),
        (0, lambda attention: 2 * attention, "sum"),
        (1, lambda gain: gain * jnp.nan, "head_gain"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_arrays_that_do_not_fit_are_refused(place, change, message):
    arrays = list(random_arrays())
    arrays[place] = change(arrays[place])
    with pytest.raises(UsageError, match=message):
        indicators.expected_stretch(*arrays)
