"""Indicators on closed forms, on invariances, and against brute force in float64."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from wf_vit import indicators
from wf_vit.errors import UsageError
from wf_vit.grid import distances
from wf_vit.indicators import checks

METHODS = ("mean", "max", "std", "odds")


@pytest.fixture
def no_type_checks():
    """Runs as users do: the errors are ours, not those of the type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def random_attention(*shape, seed=0, spread=1.0):
    logits = np.random.default_rng(seed).normal(size=(*shape, shape[-1])) * spread
    return jnp.asarray(softmax(logits), jnp.float32)


class Layer:
    """One attention layer in float64, which can really mask a key."""

    def __init__(self, heads=3, tokens=14, head_width=5, width=8, spread=1.0, seed=0):
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.logits = rng.normal(size=(heads, tokens, tokens)) * spread
        self.values = rng.normal(size=(tokens, heads, head_width))
        self.kernel = rng.normal(size=(heads, head_width, width))
        self.scale = rng.normal(size=width)

    def make_near_one_hot(self, boost):
        """Lets one random key of every row and head take nearly all weight."""
        heads, tokens, _ = self.logits.shape
        key = self.rng.integers(tokens, size=(heads, tokens, 1))
        top = np.take_along_axis(self.logits, key, -1) + boost
        np.put_along_axis(self.logits, key, top, -1)

    def head_outputs(self, logits):
        heads = np.einsum("hqn,nhk->hqk", softmax(logits), self.values)
        return np.einsum("hqk,hkd->hqd", heads, self.kernel) * self.scale

    def displacements(self):
        """The displacement of every head's output for every cut, [H, N, N, D]."""
        before = self.head_outputs(self.logits)
        cuts = []
        for key in range(self.logits.shape[-1]):
            masked = self.logits.copy()
            masked[:, :, key] = -np.inf
            cuts.append(before - self.head_outputs(masked))
        return np.stack(cuts, 2)

    def arrays(self):
        """Attention, values, output kernel and scale, as a model records them."""
        arrays = (softmax(self.logits), self.values, self.kernel, self.scale)
        return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def layers_of_images(num_layers, num_images):
    """Arrays [L, B, ...] of attention and values, [L, ...] of kernel and scale."""
    layers = [
        [Layer(seed=10 * i + j) for j in range(num_images)] for i in range(num_layers)
    ]
    attention, values, _, _ = (
        jnp.stack(x)
        for x in zip(
            *(
                [jnp.stack(y) for y in zip(*(m.arrays() for m in row), strict=True)]
                for row in layers
            ),
            strict=True,
        )
    )
    _, _, kernel, scale = (
        jnp.stack(x) for x in zip(*(row[0].arrays() for row in layers), strict=True)
    )
    return attention, values, kernel, scale


# Attention alone.


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


# Closed-form knockout.


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("boost", [0.0, 5.0, 10.0, 18.0])
def test_knockout_equals_masking_the_key(boost, per_head, prefix):
    layer = Layer(spread=2.0)
    layer.make_near_one_hot(boost)
    moved = layer.displacements()
    moved = np.linalg.norm(moved if per_head else moved.sum(0), axis=-1)
    impact = indicators.knockout_impact(
        *layer.arrays(), num_prefix_tokens=prefix, per_head=per_head
    )
    expected = moved[..., prefix:, prefix:]
    # The reference subtracts outputs of size 10 in float64.
    np.testing.assert_allclose(impact, expected, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("per_head", [False, True])
def test_knockout_where_attention_rounds_to_one(per_head):
    layer = Layer()
    layer.make_near_one_hot(40.0)
    attention = layer.arrays()[0]
    assert float(attention.max()) == 1.0
    moved = layer.displacements()
    moved = np.linalg.norm(moved if per_head else moved.sum(0), axis=-1)
    impact = indicators.knockout_impact(
        *layer.arrays(), num_prefix_tokens=0, per_head=per_head
    )
    # The effects of the other keys lie below the rounding of the float64 reference.
    np.testing.assert_allclose(impact, moved, rtol=1e-4, atol=1e-12)


def test_knockout_where_one_head_is_sure_and_others_are_not():
    layer = Layer()
    layer.logits[1, :, 4] += 15.0
    expected = np.linalg.norm(layer.displacements().sum(0), axis=-1)
    impact = indicators.knockout_impact(*layer.arrays(), num_prefix_tokens=0)
    np.testing.assert_allclose(impact, expected, rtol=1e-4, atol=0)


def test_knockout_of_tied_top_keys():
    layer = Layer()
    layer.logits[:, :, 3] = layer.logits[:, :, 7] = 30.0
    expected = np.linalg.norm(layer.displacements().sum(0), axis=-1)
    impact = indicators.knockout_impact(*layer.arrays(), num_prefix_tokens=0)
    np.testing.assert_allclose(impact, expected, rtol=1e-4, atol=1e-12)


def test_cutting_the_only_key_leaves_the_mean_value():
    layer = Layer()
    attention, values, kernel, scale = layer.arrays()
    attention = attention.at[:, 2].set(jax.nn.one_hot(jnp.asarray([6, 6, 6]), 14))
    impact = indicators.knockout_impact(
        attention, values, kernel, scale, num_prefix_tokens=0
    )
    moved = np.einsum("hk,hkd->d", values[6] - values.mean(0), kernel) * scale
    expected = np.where(np.arange(14) == 6, np.linalg.norm(moved), 0)
    np.testing.assert_allclose(impact[2], expected, rtol=1e-5)


def test_knockout_ignores_what_all_values_share():
    attention, values, kernel, scale = Layer().arrays()
    expected, shifted = (
        indicators.knockout_impact(
            attention, values + shift, kernel, scale, num_prefix_tokens=0
        )
        for shift in (0.0, 100.0)
    )
    # The shift itself costs 2 of the 7 decimals of the values.
    np.testing.assert_allclose(shifted, expected, rtol=1e-3)


def test_gradients_are_finite_and_right():
    layer = Layer(heads=2, tokens=6)
    _, values, kernel, scale = layer.arrays()
    logits = jnp.asarray(layer.logits, jnp.float32)

    def total(logits, values):
        return indicators.knockout_impact(
            jax.nn.softmax(logits), values, kernel, scale, num_prefix_tokens=1
        ).sum()

    total = jax.jit(total)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    # Rows that are nearly, and fully, one-hot, and cuts without any effect.
    equal = jnp.broadcast_to(values[:1], values.shape)
    assert float(total(logits, equal)) < 1e-4
    for top in (8.0, 40.0, 200.0):
        sure = logits.at[0, 3, 5].set(top)
        for given in ((sure, values), (sure, equal)):
            assert all(np.isfinite(x).all() for x in gradient(*given))

    step = 1e-2
    direction = jax.random.normal(jax.random.key(0), logits.shape)
    rise = total(logits + step * direction, values)
    rise -= total(logits - step * direction, values)
    slope = jnp.vdot(gradient(logits, values)[0], direction)
    np.testing.assert_allclose(slope, rise / (2 * step), rtol=1e-2)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("block_size", [1, 5])
def test_blocks_of_queries_do_not_change_the_result(block_size, per_head):
    arrays = Layer().arrays()
    whole, blocks = (
        indicators.knockout_impact(
            *arrays, num_prefix_tokens=1, per_head=per_head, block_size=size
        )
        for size in (256, block_size)
    )
    np.testing.assert_allclose(blocks, whole, rtol=1e-5)


@pytest.mark.parametrize("per_head", [False, True])
def test_layers_lie_in_front_of_attention_values_and_kernel(per_head):
    attention, values, kernel, scale = layers_of_images(2, 3)
    impact = indicators.knockout_impact(
        attention, values, kernel, scale, num_prefix_tokens=1, per_head=per_head
    )
    assert impact.shape == ((2, 3, 3, 13, 13) if per_head else (2, 3, 13, 13))
    for i, j in ((0, 2), (1, 0)):
        alone = indicators.knockout_impact(
            attention[i, j],
            values[i, j],
            kernel[i],
            scale[i],
            num_prefix_tokens=1,
            per_head=per_head,
        )
        np.testing.assert_allclose(impact[i, j], alone, rtol=1e-5)


def test_one_residual_scale_serves_all_layers():
    attention, values, kernel, _ = layers_of_images(2, 1)
    scale = jnp.arange(1.0, 9.0)
    impact = indicators.knockout_impact(
        attention, values, kernel, scale, num_prefix_tokens=1
    )
    scaled = indicators.knockout_impact(
        attention, values, kernel * scale.reshape(1, 1, 1, 8), num_prefix_tokens=1
    )
    np.testing.assert_allclose(impact, scaled, rtol=1e-5)


def test_knockout_of_permuted_tokens_and_heads():
    attention, values, kernel, scale = Layer().arrays()
    order = np.random.default_rng(3).permutation(14)
    impact = indicators.knockout_impact(
        attention, values, kernel, scale, num_prefix_tokens=0
    )
    moved = indicators.knockout_impact(
        attention[::-1, order][:, :, order],
        values[order, ::-1],
        kernel[::-1],
        scale,
        num_prefix_tokens=0,
    )
    np.testing.assert_allclose(moved, impact[order][:, order], rtol=1e-4)


def test_knockout_takes_half_precision():
    attention, values, kernel, scale = Layer(tokens=20, spread=2.0).arrays()
    exact = indicators.knockout_impact(
        attention, values, kernel, scale, num_prefix_tokens=0
    )
    half = indicators.knockout_impact(
        *(x.astype(jnp.bfloat16) for x in (attention, values, kernel, scale)),
        num_prefix_tokens=0,
    )
    assert half.dtype == jnp.float32
    assert np.corrcoef(np.ravel(half), np.ravel(exact))[0, 1] > 0.999


# First-order effect on the model's output.


@pytest.mark.parametrize("boost", [0.0, 10.0, 40.0])
@pytest.mark.parametrize("per_head", [False, True])
def test_effect_is_the_gradient_along_the_displacement(boost, per_head):
    layer = Layer()
    layer.make_near_one_hot(boost)
    attention, values, kernel, scale = layer.arrays()
    cotangents = layer.rng.normal(size=(14, 8))
    effect = indicators.knockout_effect(
        attention,
        values,
        kernel,
        jnp.asarray(cotangents, jnp.float32),
        scale,
        num_prefix_tokens=2,
        per_head=per_head,
        block_size=5,
    )
    expected = np.einsum("hijd,id->hij", layer.displacements(), cotangents)
    expected = (expected if per_head else expected.sum(0))[..., 2:, 2:]
    # Signed effects cross zero: the error is relative to the largest of the row,
    # above the rounding of the reference.
    largest = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(effect - expected) <= 1e-5 * largest + 1e-13).all()


def test_propagated_knockout_of_a_linear_model_is_exact():
    # All sign vectors of a three-dimensional output: no sampling error is left.
    layers = [Layer(seed=seed) for seed in range(2)]
    jacobian = np.random.default_rng(9).normal(size=(2, 14, 3, 8))
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, 8).T
    probes = jnp.asarray(np.einsum("me,lned->mlnd", signs, jacobian), jnp.float32)
    attention, values, kernel, scale = (
        jnp.stack(x) for x in zip(*(layer.arrays() for layer in layers), strict=True)
    )

    @jax.jit
    def run(attention, values, per_head_cotangents):
        return [
            indicators.propagated_knockout(
                attention,
                values,
                kernel,
                lambda probe: per_head_cotangents[probe],
                scale,
                num_probes=8,
                num_prefix_tokens=1,
                per_head=per_head,
                shrink=False,
            )
            for per_head in (False, True)
        ]

    fused, heads = run(attention, values, probes)
    for i, layer in enumerate(layers):
        moved = np.einsum("hijd,ied->hije", layer.displacements(), jacobian[i])
        expected = np.linalg.norm(moved.sum(0), axis=-1)[1:, 1:]
        np.testing.assert_allclose(fused.impact[i], expected, rtol=1e-4)
        expected = np.linalg.norm(moved, axis=-1)[:, 1:, 1:]
        np.testing.assert_allclose(heads.impact[i], expected, rtol=1e-4)


class Propagation:
    """A layer before a linear map of each token, and estimates of what cuts do."""

    def __init__(self, jacobian, layer=None):
        self.layer = layer or Layer()
        self.jacobian = jacobian
        moved = np.einsum("hijd,ied->hije", self.layer.displacements(), jacobian)
        self.exact = np.linalg.norm(moved.sum(0), axis=-1)
        self.exact_per_head = np.linalg.norm(moved, axis=-1)

    def estimate(self, seeds, **options):
        def one(seed):
            def cotangents(probe):
                key = jax.random.fold_in(jax.random.key(seed), probe)
                signs = jax.random.rademacher(key, self.jacobian.shape[:2], jnp.float32)
                return jnp.einsum("ne,ned->nd", signs, self.jacobian.astype("float32"))

            attention, values, kernel, scale = self.layer.arrays()
            options_ = {"num_prefix_tokens": 0} | options
            return indicators.propagated_knockout(
                attention, values, kernel, cotangents, scale, **options_
            )

        drawn = jax.lax.map(jax.jit(one), jnp.arange(seeds))
        return jax.tree.map(np.asarray, drawn)

    def log_error(self, estimates):
        """The root mean square of the logarithms of estimated over exact impacts."""
        ratio = np.log(estimates / self.exact)
        return np.sqrt(np.square(ratio).mean())


def stretching_alike(rng):
    """Jacobians of tokens that stretch all directions alike, each to its own size."""
    turned = np.linalg.qr(rng.normal(size=(14, 40, 8)))[0]
    return turned * np.exp(rng.normal(size=(14, 1, 1)))


def stretching_two(rng):
    """Jacobians of tokens that keep two directions of eight."""
    return rng.normal(size=(14, 40, 2)) @ rng.normal(size=(14, 2, 8))


def test_relative_error_of_probes_is_the_error_seen():
    case = Propagation(np.random.default_rng(1).normal(size=(14, 40, 8)))
    drawn = case.estimate(40, num_probes=32, shrink=False)
    square = np.square(case.exact)
    errors = np.square(square * (drawn.impact / case.exact - 1))
    seen = np.sqrt(errors.sum((1, 2)).mean() / np.square(square).sum())
    assert drawn.relative_error.mean() == pytest.approx(seen, rel=0.2)


def test_shrinking_finds_jacobians_that_stretch_alike():
    case = Propagation(stretching_alike(np.random.default_rng(2)))
    plain = case.log_error(case.estimate(10, num_probes=8, shrink=False).impact)
    shrunk = case.log_error(case.estimate(10, num_probes=8).impact)
    # Left is the error of each token's own size, of which every probe says much.
    assert shrunk < plain / 2


def test_shrinking_does_no_harm_where_jacobians_do_not_stretch_alike():
    case = Propagation(stretching_two(np.random.default_rng(3)))
    plain = case.log_error(case.estimate(10, num_probes=16, shrink=False).impact)
    shrunk = case.log_error(case.estimate(10, num_probes=16).impact)
    assert shrunk < 1.02 * plain


@pytest.mark.parametrize("num_probes", [4, 32])
def test_shrinking_keeps_the_mean_where_jacobians_stretch_alike(num_probes):
    case = Propagation(stretching_alike(np.random.default_rng(4)))
    drawn = case.estimate(400, num_probes=num_probes)
    ratio = np.square(drawn.impact).mean(0) / np.square(case.exact)
    assert ratio.mean() == pytest.approx(1, abs=0.05)


def test_shrinking_per_head():
    case = Propagation(stretching_alike(np.random.default_rng(5)))
    drawn = case.estimate(200, num_probes=32, per_head=True).impact
    np.testing.assert_allclose(drawn.mean(0), case.exact_per_head, rtol=0.2)


def test_many_probes_are_hardly_shrunk():
    case = Propagation(stretching_two(np.random.default_rng(6)))
    drawn, plain = (
        case.estimate(1, num_probes=2000, shrink=shrink).impact
        for shrink in (True, False)
    )
    np.testing.assert_allclose(drawn, plain, rtol=0.02)


def test_keys_without_weight_and_outputs_out_of_reach_have_no_impact():
    layer = Layer()
    layer.logits[:, :, 3] = -np.inf
    attention, values, kernel, scale = layer.arrays()
    estimate = jax.jit(
        lambda gradient: indicators.propagated_knockout(
            attention,
            values,
            kernel,
            lambda probe: gradient,
            scale,
            num_probes=2,
            num_prefix_tokens=1,
        )
    )
    seen = estimate(jnp.ones((14, 8)))
    assert (seen.impact[:, 2] == 0).all()
    assert (np.delete(seen.impact, 2, 1) > 0).all()
    unseen = estimate(jnp.zeros((14, 8)))
    assert (unseen.impact == 0).all()
    assert unseen.relative_error == 0


# Calling.


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (indicators.interaction_indicator, 1),
        (indicators.mean_attention_distance, 1),
        (indicators.knockout_impact, 4),
    ],
)
def test_functions_are_traced_once_per_shape(function, arrays, monkeypatch):
    traced = []
    count = checks.count_tokens
    monkeypatch.setattr(
        checks, "count_tokens", lambda *a: traced.append(a) or count(*a)
    )
    # A shape of its own, which no other test has compiled.
    inputs = [Layer(tokens=26, seed=seed).arrays()[:arrays] for seed in range(3)]
    for given in inputs:
        function(*given, num_prefix_tokens=1)
    assert len(traced) == 1


def test_recorded_arrays_may_be_constants_of_a_traced_function():
    attention = random_attention(2, 5)
    scaled = jax.jit(
        lambda x: x * indicators.interaction_indicator(attention, num_prefix_tokens=1)
    )
    np.testing.assert_allclose(scaled(2.0), 2 * attention[:, 1:, 1:].mean(0), rtol=1e-6)


def test_inside_jit_values_are_not_checked_and_nan_keeps_to_its_row():
    attention, values, kernel, scale = Layer().arrays()
    attention = attention.at[1, 4, 2].set(jnp.nan)
    impact = jax.jit(
        lambda attention: indicators.knockout_impact(
            attention, values, kernel, scale, num_prefix_tokens=0
        )
    )(attention)
    assert np.isnan(impact[4]).all()
    assert np.isfinite(np.delete(impact, 4, axis=0)).all()


def test_inside_jit_rows_are_taken_as_if_divided_by_their_sum():
    attention, values, kernel, scale = Layer().arrays()
    expected, scaled = (
        jax.jit(
            lambda attention: indicators.knockout_impact(
                attention, values, kernel, scale, num_prefix_tokens=0
            )
        )(factor * attention)
        for factor in (1.0, 0.5)
    )
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.at[0, 1, 2].set(jnp.nan), "NaN or infinity"),
        (lambda a: jnp.log(a), "negative numbers"),
        (lambda a: a.at[0, 0].multiply(-1), "negative numbers"),
        (lambda a: a.swapaxes(-1, -2), "swap its last two axes"),
        (lambda a: 2 * a, "away from summing to 1"),
        (lambda a: a[..., 1:], r"expected \[..., H, N, N\]"),
        (lambda a: a[0], r"expected \[..., H, N, N\]"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_attention_that_is_no_distribution_is_refused(change, message):
    attention = change(random_attention(2, 5, spread=2.0))
    with pytest.raises(UsageError, match=message):
        indicators.interaction_indicator(attention, num_prefix_tokens=1)
    with pytest.raises(UsageError, match=message):
        indicators.mean_attention_distance(attention, num_prefix_tokens=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prefix_tokens": 17}, "leaves no patches"),
        ({"num_prefix_tokens": -1}, "leaves no patches"),
        ({"num_prefix_tokens": 1, "grid": (5, 5)}, "grid"),
        ({"num_prefix_tokens": 0, "method": "distance"}, "no square grid"),
        ({"num_prefix_tokens": 1, "method": "random"}, "key=jax.random.key"),
        ({"num_prefix_tokens": 1, "method": "median"}, "expected mean, max"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_options_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        indicators.interaction_indicator(random_attention(2, 17), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_fusion": "median"}, "expected mean, max or min"),
        ({"residual_weight": 1.5}, "expected 0 to 1"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_rollout_refuses_options(arguments, message):
    with pytest.raises(UsageError, match=message):
        indicators.attention_rollout(
            random_attention(2, 3, 5), num_prefix_tokens=1, **arguments
        )


@pytest.mark.usefixtures("no_type_checks")
def test_rollout_needs_a_layer_axis():
    with pytest.raises(UsageError, match="layers in front"):
        indicators.attention_rollout(random_attention(3, 5), num_prefix_tokens=1)


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (1, lambda x: x.swapaxes(0, 1), "values has shape"),
        (1, lambda x: x.at[0, 0, 0].set(jnp.inf), "values of shape .* infinity"),
        (2, lambda x: x.reshape(-1, 8), "output_kernel has shape"),
        (2, lambda x: x[None], "output_kernel has shape"),
        (2, lambda x: x.at[0].set(jnp.nan), "output_kernel of shape .* NaN"),
        (3, lambda x: x[:-1], "residual_scale has shape"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_layers_that_do_not_fit_are_refused(position, change, message):
    arrays = list(Layer().arrays())
    arrays[position] = change(arrays[position])
    with pytest.raises(UsageError, match=message):
        indicators.knockout_impact(*arrays, num_prefix_tokens=1)


@pytest.mark.usefixtures("no_type_checks")
def test_effect_refuses_cotangents_of_another_model():
    attention, values, kernel, scale = Layer().arrays()
    with pytest.raises(UsageError, match="cotangents has shape"):
        indicators.knockout_effect(
            attention, values, kernel, jnp.ones((14, 9)), scale, num_prefix_tokens=1
        )


def test_one_probe_has_no_error():
    attention, values, kernel, scale = Layer().arrays()
    with pytest.raises(UsageError, match="use knockout_effect"):
        indicators.propagated_knockout(
            attention,
            values,
            kernel,
            lambda probe: jnp.ones((14, 8)),
            scale,
            num_probes=1,
            num_prefix_tokens=1,
        )


def test_import_is_light():
    code = (
        "import sys, wf_vit.indicators, wf_vit.fields; "
        "sys.exit(any(name in sys.modules for name in ('flax', 'tensorflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
