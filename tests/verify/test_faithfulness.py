"""The faithfulness protocol where the answer is known, and on a small model."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import indicators, verify
from wf_vit.errors import UsageError
from wf_vit.models.vit import ViT

PREFIX, PATCHES = 2, 6
TOKENS = PREFIX + PATCHES
PAIRS = PATCHES**2
ALL_PAIRS = np.stack(np.divmod(np.arange(PAIRS), PATCHES), axis=-1)
KEY = jax.random.key(0)
MODEL = ViT(
    num_classes=0,
    image_size=(8, 12),
    patch_size=(4, 4),
    width=8,
    depth=2,
    mlp_dim=16,
    num_heads=2,
    num_registers=1,
)


@pytest.fixture(scope="module")
def network():
    """Maps a layer and its biases to final tokens, run from that layer's input on."""
    images = jax.random.normal(jax.random.key(1), (1, 8, 12, 3))
    shapes = jax.eval_shape(MODEL.init, KEY, images)["params"]
    rng = np.random.default_rng(2)
    # Large, so that cuts move the tokens by much more than rounding does. Made on the
    # host: nothing is compiled.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes
    )
    apply = functools.partial(MODEL.apply, {"params": params})

    @functools.partial(jax.jit, static_argnums=0)
    def predict(layer, bias):
        tokens = apply(images, method="embed")
        tokens, _ = apply(tokens, stop=layer, method="encode")
        tokens = jnp.broadcast_to(tokens, (len(bias), *tokens.shape[1:]))
        biases = [bias if n == layer else None for n in range(MODEL.depth)]
        tokens, _ = apply(tokens, start=layer, bias=biases, method="encode")
        return apply(tokens, method="readout")[1]["tokens"]

    predict.whole = jax.jit(lambda bias: apply(images, bias=bias)[1]["tokens"][0])
    return predict


@pytest.fixture(scope="module")
def truth(network):
    """What every cut does, by target, ``[L, P, P]``."""
    layers = [
        verify.cut_impact(
            functools.partial(network, layer),
            ALL_PAIRS,
            num_tokens=TOKENS,
            num_prefix_tokens=PREFIX,
            batch_size=10,
        )
        for layer in range(MODEL.depth)
    ]
    return {
        target: np.stack([getattr(layer, target) for layer in layers]).reshape(
            -1, PATCHES, PATCHES
        )
        for target in verify.TARGETS
    }


def one_attention_layer(seed=0, heads=3, width=5, out=7):
    """Attention, values and kernel, and the layer that they describe."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(heads, TOKENS, TOKENS)))
    values = jnp.asarray(rng.normal(size=(TOKENS, heads, width)))
    kernel = jnp.asarray(rng.normal(size=(heads, width, out)))

    def predict(layer, bias):
        del layer
        weights = jax.nn.softmax(logits[None] + bias, axis=-1)
        return jnp.einsum("shij,jhk,hkd->sid", weights, values, kernel)

    return jax.nn.softmax(logits), values, kernel, predict


def measure(predict, impacts, layers=(0, 1), **options):
    options = {"key": KEY, "num_interactions": 20, "batch_size": 10, **options}
    return verify.faithfulness(
        predict, impacts, layers, num_prefix_tokens=PREFIX, **options
    )


# Cuts.


def test_a_cut_moves_one_layer_as_its_closed_form_says():
    attention, values, kernel, predict = one_attention_layer()
    expected = indicators.knockout_impact(
        attention, values, kernel, num_prefix_tokens=PREFIX
    )
    got = verify.cut_impact(
        functools.partial(predict, 0),
        ALL_PAIRS,
        num_tokens=TOKENS,
        num_prefix_tokens=PREFIX,
    )
    np.testing.assert_allclose(got.own, np.ravel(expected), rtol=1e-3, atol=1e-6)
    # Nothing follows, so that no other token notices.
    np.testing.assert_allclose(got.tokens, got.own, rtol=1e-6)
    np.testing.assert_array_equal(got.cls, 0)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_cut_is_followed_through_the_whole_network(network, truth, layer):
    strongest = truth["own"][layer].argmax()
    query, key = np.unravel_index(strongest, (PATCHES, PATCHES))
    bias = [None] * MODEL.depth
    uncut = network.whole(bias)
    masked = jnp.zeros((1, 1, TOKENS, TOKENS))
    bias[layer] = masked.at[..., PREFIX + query, PREFIX + key].set(-1e9)
    moved = np.linalg.norm(network.whole(bias) - uncut, axis=-1)
    expected = {
        "tokens": np.linalg.norm(moved),
        "own": moved[PREFIX + query],
        "cls": moved[0],
    }
    for target, distance in expected.items():
        got = truth[target][layer, query, key]
        np.testing.assert_allclose(got, distance, rtol=1e-3, atol=1e-5)
    assert expected["own"] > 1e-3
    assert (expected["cls"] > 1e-3) == (layer == 0)


@pytest.mark.parametrize("batch_size", [1, 7, 20])
def test_results_do_not_depend_on_the_batch_size(network, truth, batch_size):
    shapes = set()

    def predict(bias):
        shapes.add(bias.shape)
        return network(1, bias)

    got = verify.cut_impact(
        predict,
        ALL_PAIRS[:10],
        num_tokens=TOKENS,
        num_prefix_tokens=PREFIX,
        batch_size=batch_size,
    )
    assert shapes == {(batch_size + 1, 1, TOKENS, TOKENS)}
    for target in verify.TARGETS:
        expected = truth[target][1].ravel()[:10]
        np.testing.assert_allclose(getattr(got, target), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pair", [(PATCHES, 0), (0, PATCHES), (-1, 0)])
def test_cuts_of_unknown_patches_are_refused(network, pair):
    with pytest.raises(UsageError, match="but there are 6"):
        verify.cut_impact(
            functools.partial(network, 0),
            np.array([pair]),
            num_tokens=TOKENS,
            num_prefix_tokens=PREFIX,
        )


# Sampling.


def test_interactions_are_pairs_of_patches_each_at_most_once():
    whole = verify.sample_interactions(KEY, PATCHES, PAIRS)
    np.testing.assert_array_equal(np.unique(whole, axis=0), ALL_PAIRS)
    some = [
        verify.sample_interactions(jax.random.key(seed), PATCHES, 9)
        for seed in range(80)
    ]
    assert all(len(np.unique(pairs, axis=0)) == 9 for pairs in some)
    # 720 draws, 20 of each pair on average, with a deviation of 3.9.
    _, counts = np.unique(np.concatenate(some), axis=0, return_counts=True)
    assert len(counts) == PAIRS
    assert counts.min() > 3
    assert counts.max() < 40


@pytest.mark.parametrize("count", [0, 2, PAIRS + 1])
def test_numbers_of_interactions_that_make_no_sense_are_refused(count):
    with pytest.raises(UsageError, match="expected 3 to 36"):
        verify.sample_interactions(KEY, PATCHES, count)


# Ranks.


def test_rank_correlation_of_known_ranks():
    truth = np.array([0.1, 10.0, 2.0, 3.0])
    impacts = np.stack([truth**3, -truth, np.array([1.0, 4.0, 3.0, 2.0])])
    # One swap of neighbours: 1 - 6 * (1 + 1) / (4 * 15).
    np.testing.assert_allclose(verify.rank_correlation(impacts, truth), [1, -1, 0.8])
    # Ties share their mean rank: ranks 1.5, 1.5, 3.5, 3.5 against 1, 4, 2, 3.
    tied = np.array([0.0, 0.0, 1.0, 1.0])
    assert verify.rank_correlation(tied, truth) == pytest.approx(0, abs=1e-12)


def test_a_constant_has_no_ranks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat = verify.rank_correlation(np.ones((2, 4)), np.arange(4.0))
    assert flat.shape == (2,)
    assert np.isnan(flat).all()


# The protocol.


def test_the_truth_is_faithful_and_its_negative_is_not(network, truth):
    repeats = np.stack([truth["tokens"], -truth["tokens"], truth["tokens"][::-1]])
    impacts = {"repeats": repeats, "cls": truth["cls"]}
    result = measure(network, impacts)
    got = result.correlation["tokens"]["repeats"]
    assert got.shape == (3, 2)
    np.testing.assert_allclose(got[0], 1, atol=0.02)
    np.testing.assert_allclose(got[1], -1, atol=0.02)
    # The layers in the wrong order.
    assert (got[2] < 0.9).all()
    cls = result.correlation["cls"]["cls"]
    np.testing.assert_allclose(cls[0], 1, atol=0.02)
    # No cut between patches of the last layer reaches the CLS token.
    assert np.isnan(cls[1])


def test_an_indicator_of_another_orientation_is_found_out(network, truth):
    swapped = {"swapped": truth["own"].swapaxes(-1, -2)}
    got = measure(network, swapped).correlation["own"]["swapped"]
    assert (np.abs(got) < 0.9).all()


def test_the_closed_form_is_faithful_where_nothing_follows():
    attention, values, kernel, predict = one_attention_layer()
    knockout = indicators.knockout_impact(
        attention, values, kernel, num_prefix_tokens=PREFIX
    )
    mean = attention.mean(0)[PREFIX:, PREFIX:]
    impacts = {"knockout": knockout[None], "mean": mean[None]}
    result = measure(predict, impacts, (0,), num_interactions=PAIRS)
    np.testing.assert_allclose(result.correlation["own"]["knockout"], 1, atol=1e-3)
    assert result.correlation["own"]["mean"][0] < 0.95


def test_layers_are_named_by_their_index(network, truth):
    chosen = {"truth": truth["own"][::-1]}
    result = measure(network, chosen, (1, 0))
    np.testing.assert_allclose(result.correlation["own"]["truth"], 1, atol=0.02)
    whole = measure(network, {"truth": truth["own"]})
    # What is drawn for a layer does not depend on which others are asked for.
    for place, layer in enumerate((1, 0)):
        pairs = result.interactions[place]
        np.testing.assert_array_equal(pairs, whole.interactions[layer])
        i, j = pairs.T
        np.testing.assert_allclose(
            result.truth["own"][place], truth["own"][layer, i, j], rtol=1e-3, atol=1e-5
        )


def test_the_key_decides_what_is_drawn(network, truth):
    results = [measure(network, truth, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    same, other = results[1:]
    jax.tree.map(np.testing.assert_array_equal, results[0], same)
    assert not np.array_equal(results[0].interactions, other.interactions)
    first, second = same.interactions
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "impacts",
    [
        {},
        {"a": np.ones(())},
        {"a": np.ones((3, 6, 6))},
        {"a": np.ones((2, 6, 5))},
        {"a": np.ones((2, 6, 6)), "b": np.ones((2, 8, 8))},
    ],
)
def test_indicators_that_do_not_fit_are_refused(network, impacts):
    with pytest.raises(UsageError, match="indicator"):
        measure(network, impacts)


def test_nothing_to_compare_is_refused(network, truth):
    with pytest.raises(UsageError, match="1 indicators of 0 layers"):
        measure(network, {"a": np.ones((0, 6, 6))}, ())
    with pytest.raises(UsageError, match="batch_size is 0"):
        measure(network, truth, batch_size=0)


def test_numbers_that_are_not_finite_are_refused(network, truth):
    with pytest.raises(UsageError, match="NaN"):
        measure(network, {"a": np.full((2, 6, 6), np.nan)})
    with pytest.raises(UsageError, match="NaN"):
        measure(lambda layer, bias: jnp.nan * network(layer, bias), truth)
