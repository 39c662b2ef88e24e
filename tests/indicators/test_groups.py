"""Sets of interactions that are cut at once, against a masked softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.indicators.layer import Layer
from wf_vit import indicators
from wf_vit.errors import UsageError

PREFIX, PROBES = 2, 3


def drawn(layer, share=0.4, seed=1):
    """What is kept of the interactions between patches, [H, P, P]."""
    heads, tokens, _ = layer.logits.shape
    shape = (heads, tokens - PREFIX, tokens - PREFIX)
    return np.random.default_rng(seed).random(shape) > share


def gradients_of(layer, seed=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(PROBES, layer.logits.shape[-1], layer.kernel.shape[-1]))


def really_cut(layer, keep):
    """The displacement of the residual stream in float64, [N, D]."""
    masked = layer.logits.copy()
    patches = masked[:, PREFIX:, PREFIX:]
    masked[:, PREFIX:, PREFIX:] = np.where(keep, patches, -np.inf)
    before, after = (layer.head_outputs(x) for x in (layer.logits, masked))
    return (before - after).sum(0)


def effect_of(layer, keep, gradients, prefix=PREFIX):
    attention, values, kernel, scale = layer.arrays()
    return indicators.set_effect(
        attention,
        values,
        kernel,
        jnp.asarray(gradients, jnp.float32),
        scale,
        keep=jnp.asarray(keep),
        num_prefix_tokens=prefix,
    )


@pytest.mark.parametrize("share", [0.01, 0.4, 0.95, 1.0])
@pytest.mark.parametrize("boost", [0.0, 25.0])
def test_it_is_what_masking_the_softmax_does(share, boost):
    layer = Layer(tokens=11)
    layer.make_near_one_hot(boost)
    keep, gradients = drawn(layer, share), gradients_of(layer)
    expected = np.einsum("mnd,nd->m", gradients, really_cut(layer, keep))
    got = effect_of(layer, keep, gradients)
    np.testing.assert_allclose(got.effect, expected, rtol=2e-4, atol=2e-5)
    norm = np.sqrt(np.square(expected).mean())
    np.testing.assert_allclose(got.norm, norm, rtol=2e-4, atol=2e-5)
    assert (norm > 1e-2) or share < 0.1


def test_a_set_of_one_is_a_single_cut():
    layer = Layer(tokens=9)
    attention, values, kernel, scale = layer.arrays()
    gradients = jnp.asarray(gradients_of(layer), jnp.float32)
    patches = 9 - PREFIX
    for query, key in [(0, 0), (3, 5), (6, 1)]:
        keep = np.ones((patches, patches), bool)
        keep[query, key] = False
        got = effect_of(layer, keep, gradients).effect
        for probe, gradient in enumerate(gradients):
            single = indicators.knockout_effect(
                attention, values, kernel, gradient, scale, num_prefix_tokens=PREFIX
            )
            np.testing.assert_allclose(
                got[probe], single[query, key], rtol=1e-4, atol=1e-6
            )


def test_a_weak_set_is_not_lost_to_rounding():
    layer = Layer(tokens=9)
    layer.logits[:, PREFIX + 3, PREFIX + 4] -= 40
    keep = np.ones((9 - PREFIX,) * 2, bool)
    keep[3, 4] = False
    gradients = gradients_of(layer)
    # The weight is about 1e-18, far below the rounding of what it is added to.
    expected = np.einsum("mnd,nd->m", gradients, exact_weak(layer))
    got = effect_of(layer, keep, gradients).effect
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def exact_weak(layer):
    """The displacement by its closed form, since masking is too coarse in float64."""
    weights = np.exp(layer.logits - layer.logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    query, key = PREFIX + 3, PREFIX + 4
    moved = np.zeros((9, layer.kernel.shape[-1]))
    for head, row in enumerate(weights[:, query]):
        apart = layer.values[key, head] - row @ layer.values[:, head]
        moved[query] += row[key] / (1 - row[key]) * apart @ layer.kernel[head]
    return moved * layer.scale


def test_first_order_is_exact_where_the_output_is_linear():
    """All random signs of a small output: the norm is that of its displacement."""
    layer = Layer(tokens=7, width=4)
    keep = drawn(layer)
    read = np.random.default_rng(5).normal(size=(7, 4, 6))
    moved = np.einsum("nd,ndo->o", really_cut(layer, keep), read)
    signs = 2 * np.stack(np.unravel_index(np.arange(64), (2,) * 6), -1) - 1
    gradients = np.einsum("mo,ndo->mnd", signs, read)
    got = effect_of(layer, keep, gradients)
    assert got.effect.shape == (64,)
    np.testing.assert_allclose(got.norm, np.linalg.norm(moved), rtol=1e-4)


def test_a_row_that_keeps_nothing_becomes_the_mean_value():
    layer = Layer(tokens=6)
    keep = np.ones((6, 6), bool)
    keep[4] = False
    weights = np.exp(layer.logits - layer.logits.max(-1, keepdims=True))[:, 4]
    weights /= weights.sum(-1, keepdims=True)
    apart = np.einsum("hj,jhk->hk", weights - 1 / 6, layer.values)
    moved = np.einsum("hk,hkd->d", apart, layer.kernel) * layer.scale
    gradients = gradients_of(layer)
    got = effect_of(layer, keep, gradients, prefix=0).effect
    np.testing.assert_allclose(got, gradients[:, 4] @ moved, rtol=1e-4, atol=1e-5)


def test_nothing_cut_is_no_effect():
    layer = Layer(tokens=8)
    got = effect_of(layer, np.ones((6, 6), bool), gradients_of(layer))
    np.testing.assert_array_equal(got.effect, 0)
    np.testing.assert_array_equal(got.norm, 0)


def stacked_layers(scale=1.0):
    """Two layers of three images, [L, B, ...], and one set for each image."""
    made = [[Layer(tokens=8, seed=7 * n + image) for image in range(3)] for n in (0, 1)]
    arrays = [[layer.arrays() for layer in images] for images in made]
    attention, values = (
        jnp.stack([jnp.stack([image[place] for image in images]) for images in arrays])
        for place in (0, 1)
    )
    # The images of a layer share its kernel.
    kernel, residual = (
        jnp.stack([images[0][place] for images in arrays]) for place in (2, 3)
    )
    rng = np.random.default_rng(3)
    gradients = jnp.asarray(rng.normal(size=(PROBES, 2, 3, 8, 8)), jnp.float32)
    keep = jnp.asarray(rng.random((2, 3, 3, 6, 6)) > 0.3)
    return attention, values, kernel, scale * gradients, residual, keep


def test_layers_and_images_are_those_of_their_own():
    *arrays, keep = stacked_layers()
    attention, values, kernel, gradients, residual = arrays
    got = indicators.set_effect(*arrays, keep=keep, num_prefix_tokens=PREFIX)
    assert got.effect.shape == (PROBES, 2, 3)
    assert got.norm.shape == (3,)
    for layer in range(2):
        for image in range(3):
            at = layer, image
            one = indicators.set_effect(
                attention[at],
                values[at],
                kernel[layer],
                gradients[:, layer, image],
                residual[layer],
                keep=keep[at],
                num_prefix_tokens=PREFIX,
            )
            np.testing.assert_allclose(
                got.effect[:, layer, image], one.effect, rtol=1e-4, atol=1e-6
            )


def test_products_of_different_layers_count_by_half():
    *arrays, keep = stacked_layers()
    got = indicators.set_effect(*arrays, keep=keep, num_prefix_tokens=PREFIX)
    effect = np.asarray(got.effect, np.float64)
    expected = by_half(effect[:, 0], effect[:, 1])
    np.testing.assert_allclose(got.norm, expected, rtol=1e-5)


def test_repair_counts_more_what_a_query_loses_that_hears_less_later():
    *arrays, keep = stacked_layers()
    attention, values, kernel, gradients, residual = arrays
    whole = jnp.ones_like(keep, shape=(2, 3, 3, 8, 8))
    kept = whole.at[..., PREFIX:, PREFIX:].set(keep)
    stays = (attention * kept).sum(-1).mean(2)
    # A gradient at one query after the other tells their effects apart.
    first = second = 0
    for query in range(8):
        alone = jnp.where(np.arange(8)[:, None] == query, gradients, 0.0)
        one = indicators.set_effect(
            attention,
            values,
            kernel,
            alone,
            residual,
            keep=keep,
            num_prefix_tokens=PREFIX,
        )
        effect = np.asarray(one.effect, np.float64)
        first += effect[:, 0] / np.sqrt(stays[1, :, query])
        second += effect[:, 1]
    got, neither = (
        indicators.set_effect(
            *arrays, keep=keep, num_prefix_tokens=PREFIX, repair=repair
        )
        for repair in (0.5, (0.0, 0.5))
    )
    np.testing.assert_allclose(got.norm, by_half(first, second), rtol=1e-5)
    np.testing.assert_array_equal(neither.norm[1], got.norm)
    assert float(stays.min()) < 0.6


def test_repair_is_no_matter_of_one_layer():
    *arrays, keep = stacked_layers()
    for layer in (0, 1):
        others = keep.at[1 - layer].set(True)
        norms = indicators.set_effect(
            *arrays, keep=others, num_prefix_tokens=PREFIX, repair=(0.0, 2.0)
        ).norm
        np.testing.assert_array_equal(norms[0], norms[1])


def by_half(first, second):
    """The norm of two layers' effects by probe, [probes, B]."""
    return np.sqrt((first**2 + second**2 + first * second).mean(0))


def test_heads_may_share_what_they_keep():
    *arrays, keep = stacked_layers()
    shared = keep[:, :, 0]
    in_each = jnp.repeat(shared[:, :, None], 3, 2)
    one, other = (
        indicators.set_effect(*arrays, keep=k, num_prefix_tokens=PREFIX)
        for k in (shared, in_each)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_range_of_float32_is_enough(scale):
    *arrays, keep = stacked_layers()
    expected = indicators.set_effect(*arrays, keep=keep, num_prefix_tokens=PREFIX)
    *arrays, keep = stacked_layers(scale)
    got = indicators.set_effect(*arrays, keep=keep, num_prefix_tokens=PREFIX)
    np.testing.assert_allclose(got.effect / scale, expected.effect, rtol=1e-4)
    np.testing.assert_allclose(got.norm / scale, expected.norm, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": np.ones((5, 6), bool)}, r"keep has shape \(5, 6\)"),
        ({"keep": np.ones((2, 6, 6), bool)}, r"keep has shape \(2, 6, 6\)"),
        ({"keep": np.ones((6, 6), np.float32)}, "keep is float32"),
        ({"gradients": np.ones((8, 8), np.float32)}, "gradients has shape"),
        ({"gradients": np.ones((0, 8, 8), np.float32)}, "gradients has shape"),
        ({"gradients": np.ones((2, 8, 7), np.float32)}, "gradients has shape"),
        ({"gradients": np.full((2, 8, 8), np.nan, np.float32)}, "gradients .* NaN"),
        ({"num_prefix_tokens": 8}, "leaves no patches"),
        ({"repair": (0.5, -0.5)}, r"repair is \(0.5, -0.5\)"),
        ({"repair": ()}, r"repair is \(\)"),
        ({"repair": float("nan")}, "repair is nan"),
    ],
)
def test_says_what_does_not_fit(no_type_checks, change, message):
    attention, values, kernel, scale = Layer(tokens=8).arrays()
    options = {
        "gradients": np.ones((PROBES, 8, 8), np.float32),
        "keep": np.ones((6, 6), bool),
        "num_prefix_tokens": PREFIX,
    } | change
    with pytest.raises(UsageError, match=message):
        indicators.set_effect(
            attention, values, kernel, residual_scale=scale, **options
        )
