"""Attention alone: indicators on closed forms and on invariances, rollout, distance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.indicators.layer import random_attention
from wf_vit import indicators
from wf_vit.errors import UsageError
from wf_vit.grid import distances

METHODS = ("mean", "max", "std", "odds")


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    ("method", "expected"),
    [("mean", 1 / 8), ("max", 1 / 8), ("std", 0), ("odds", 1 / 7)],
)
def test_uniform_attention(method, expected, per_head):
    attention = jnp.full((2, 3, 8, 8), 1 / 8)
    impact = indicators.interaction_indicator(
        attention, method=method, num_prefix_tokens=2, per_head=per_head
    )
    assert impact.shape == ((2, 3, 6, 6) if per_head else (2, 6, 6))
    np.testing.assert_allclose(impact, expected, rtol=1e-6, atol=1e-8)


def test_heads_are_fused_as_the_method_says():
    one_hot = jax.nn.one_hot(jnp.asarray([[1, 1, 1], [1, 2, 0]]), 3)  # [H, N, N]
    fuse = {
        method: np.asarray(
            indicators.interaction_indicator(
                one_hot, method=method, num_prefix_tokens=0
            )
        )
        for method in METHODS
    }
    # Row 0: both heads look at token 1. Row 1: one at token 1, one at token 2.
    np.testing.assert_allclose(fuse["mean"][:2], [[0, 1, 0], [0, 0.5, 0.5]])
    np.testing.assert_allclose(fuse["max"][:2], [[0, 1, 0], [0, 1, 1]])
    np.testing.assert_allclose(fuse["std"][:2], [[0, 0, 0], [0, 0.5, 0.5]])
    most = 1 / np.finfo(np.float32).eps
    np.testing.assert_allclose(fuse["odds"][:2] / most, [[0, 1, 0], [0, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("method", "fuse"),
    [
        ("mean", lambda heads: heads.mean(0)),
        ("max", lambda heads: heads.max(0)),
        ("std", lambda heads: np.sqrt(np.square(heads).mean(0))),
        ("odds", lambda heads: heads.mean(0)),
    ],
)
def test_fused_form_follows_from_the_heads(method, fuse):
    attention = random_attention(4, 9, seed=1)
    heads, fused = (
        np.asarray(
            indicators.interaction_indicator(
                attention, method=method, num_prefix_tokens=1, per_head=per_head
            )
        )
        for per_head in (True, False)
    )
    np.testing.assert_allclose(fuse(heads), fused, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_permutations_of_tokens_and_heads(method):
    attention = random_attention(3, 10, seed=2)
    order = np.random.default_rng(3).permutation(10)
    impact = indicators.interaction_indicator(
        attention, method=method, num_prefix_tokens=0
    )
    moved = indicators.interaction_indicator(
        attention[::-1, order][:, :, order], method=method, num_prefix_tokens=0
    )
    np.testing.assert_allclose(moved, impact[order][:, order], rtol=1e-5, atol=1e-7)


def test_leading_axes_are_independent():
    attention = random_attention(2, 3, 4, 6, seed=4)
    together = indicators.interaction_indicator(
        attention, method="std", num_prefix_tokens=1
    )
    alone = indicators.interaction_indicator(
        attention[1, 2], method="std", num_prefix_tokens=1
    )
    np.testing.assert_allclose(together[1, 2], alone, rtol=1e-6)


def test_normalized_rows_sum_to_one_after_the_prefix_is_dropped():
    impact = indicators.interaction_indicator(
        random_attention(2, 3, 12), num_prefix_tokens=3, normalize=True
    )
    np.testing.assert_allclose(impact.sum(-1), 1, rtol=1e-6)


def test_distance_baseline_falls_with_distance_on_any_grid():
    impact = indicators.interaction_indicator(
        random_attention(2, 3, 13),
        method="distance",
        num_prefix_tokens=1,
        grid=(3, 4),
        per_head=True,
    )
    assert impact.shape == (2, 3, 12, 12)
    np.testing.assert_allclose(impact[1, 2], 1 / (1 + distances((3, 4))), rtol=1e-6)


def test_random_baseline_depends_on_its_key_only():
    def draw(seed, attention):
        return indicators.interaction_indicator(
            attention, method="random", num_prefix_tokens=0, key=jax.random.key(seed)
        )

    attention = random_attention(2, 3, 16)
    first = draw(0, attention)
    np.testing.assert_array_equal(first, draw(0, attention[..., ::-1]))
    assert not np.allclose(first, draw(1, attention))
    assert not np.allclose(first[0], first[1])


@pytest.mark.parametrize("per_head", [False, True])
def test_random_baseline_takes_a_key_for_each_image(per_head):
    attention = random_attention(2, 3, 4, 16)  # Layers, images, heads.
    keys = jax.random.split(jax.random.key(0), 3)
    draw = functools.partial(
        indicators.interaction_indicator,
        method="random",
        num_prefix_tokens=0,
        per_head=per_head,
    )
    all_images = draw(attention, key=keys)
    one = draw(attention[:, 1:2], key=keys[1:2])
    np.testing.assert_array_equal(all_images[:, 1:2], one)
    assert not np.allclose(all_images[:, 0], all_images[:, 1])


def test_half_precision_is_computed_in_float32():
    attention = random_attention(4, 9, seed=5)
    half = attention.astype(jnp.bfloat16)
    impact = indicators.interaction_indicator(half, method="std", num_prefix_tokens=1)
    same = indicators.interaction_indicator(
        half.astype(jnp.float32), method="std", num_prefix_tokens=1
    )
    assert impact.dtype == jnp.float32
    np.testing.assert_array_equal(impact, same)


# Rollout.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_odds_of_nearly_all_attention_are_those_of_the_rest(dtype):
    weights = np.float32([[[0.999, 6e-4, 4e-4], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]]])
    attention = jnp.asarray(weights).astype(dtype)
    exact = np.float64(attention)
    others = exact.sum(-1, keepdims=True) - exact
    got = indicators.interaction_indicator(
        attention, num_prefix_tokens=0, method="odds"
    )
    np.testing.assert_allclose(got, (exact / others)[0], rtol=1e-5)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            jax.random.split(jax.random.key(0), 3),
            r"shape \(3,\), expected \(\) or \(2,\)",
        ),
        (jax.random.PRNGKey(0), r"jax.random.key\(seed\)"),
    ],
)
def test_keys_of_other_images_are_refused(key, message):
    attention = jnp.full((2, 1, 4, 4), 0.25)
    options = {"num_prefix_tokens": 0, "method": "random"}
    with pytest.raises(UsageError, match=message):
        indicators.interaction_indicator(attention, key=key, **options)


def test_rollout_of_one_layer_is_attention_and_bypass():
    attention = random_attention(1, 3, 7, seed=6)
    rollout = indicators.attention_rollout(
        attention, num_prefix_tokens=0, residual_weight=0.25
    )
    expected = 0.25 * np.eye(7) + 0.75 * np.asarray(attention).mean(1)
    np.testing.assert_allclose(rollout, expected, rtol=1e-5)


@pytest.mark.parametrize("head_fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("per_head", [False, True])
def test_rollout_rows_sum_to_one(head_fusion, per_head):
    rollout = indicators.attention_rollout(
        random_attention(4, 2, 3, 7, spread=3.0),
        num_prefix_tokens=0,
        head_fusion=head_fusion,
        per_head=per_head,
    )
    assert rollout.shape == ((4, 2, 3, 7, 7) if per_head else (4, 2, 7, 7))
    np.testing.assert_allclose(rollout.sum(-1), 1, rtol=1e-5)


def test_rollout_multiplies_later_layers_from_the_left():
    # Layer 0: everyone reads token 0. Layer 1: everyone reads token 1.
    attention = jax.nn.one_hot(jnp.asarray([[[0, 0, 0]], [[1, 1, 1]]]), 3)
    rollout = indicators.attention_rollout(
        attention, num_prefix_tokens=0, residual_weight=0.0
    )
    np.testing.assert_allclose(rollout[-1], [[1, 0, 0]] * 3)


def test_rollout_sees_the_prefix_before_dropping_it():
    # Patch 1 reads CLS, which has read patch 2: only through CLS do they meet.
    attention = jax.nn.one_hot(jnp.asarray([[[2, 1, 2]], [[0, 0, 2]]]), 3)
    rollout = indicators.attention_rollout(
        attention, num_prefix_tokens=1, residual_weight=0.0
    )
    np.testing.assert_allclose(rollout[-1], [[0, 1], [0, 1]])


def test_rollout_per_head_averages_to_the_fused_one():
    attention = random_attention(3, 2, 4, 6, seed=7)
    heads, fused = (
        indicators.attention_rollout(
            attention, num_prefix_tokens=1, per_head=per_head, normalize=False
        )
        for per_head in (True, False)
    )
    np.testing.assert_allclose(heads.mean(-3), fused, rtol=1e-5)


# Mean attention distance.


def test_mean_attention_distance_of_uniform_attention():
    attention = jnp.full((2, 3, 12, 12), 1 / 12)
    expected = distances((2, 5)).mean()
    heads = indicators.mean_attention_distance(
        attention, num_prefix_tokens=2, grid=(2, 5)
    )
    np.testing.assert_allclose(heads, np.full((2, 3), expected), rtol=1e-6)
    fused = indicators.mean_attention_distance(
        attention, num_prefix_tokens=2, grid=(2, 5), patch_size=16.0, per_head=False
    )
    np.testing.assert_allclose(fused, np.full(2, 16 * expected), rtol=1e-6)


def test_mean_attention_distance_renormalises_after_the_prefix():
    # 90 % on CLS, the rest on the patch two columns to the right (cyclic).
    patches = 0.1 * jnp.roll(jnp.eye(4), 2, axis=1)
    rows = jnp.concatenate([jnp.full((4, 1), 0.9), patches], 1)
    attention = jnp.concatenate([jnp.eye(5)[:1], rows])[None]
    distance = indicators.mean_attention_distance(
        attention, num_prefix_tokens=1, grid=(1, 4)
    )
    np.testing.assert_allclose(distance, [2.0], rtol=1e-6)


def test_mean_attention_distance_of_queries_that_see_the_prefix_only():
    attention = jnp.zeros((1, 5, 5)).at[..., 0].set(1.0)
    distance = indicators.mean_attention_distance(attention, num_prefix_tokens=1)
    np.testing.assert_array_equal(distance, [0.0])
