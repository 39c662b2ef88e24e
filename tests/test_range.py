"""Finite input gives finite output over all of float32's range, whatever its scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz import AMOUNTS, fuzz
from wf_vit import fields, interventions, tendency
from wf_vit.indicators import (
    attention_rollout,
    expected_stretch,
    interaction_indicator,
    knockout_effect,
    knockout_impact,
    mean_attention_distance,
    propagated_knockout,
)
from wf_vit.indicators.arithmetic import join, split

MAGNITUDES = (1e-40, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e19, 1e20, 1e30, 3e38)
GRIDS = st.sampled_from([(1, 1), (2, 3)])
# Every combination of shape and type is compiled.
GRIDS_AND_DTYPES = st.sampled_from(
    [
        ((2, 3), "float32"),
        ((1, 1), "float32"),
        ((1, 3), "bfloat16"),
        ((2, 2), "float16"),
    ]
)
DTYPES_AND_HEADS = st.sampled_from(
    [("float32", False), ("bfloat16", True), ("float16", False)]
)
SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.sampled_from(MAGNITUDES)
KINDS = st.sampled_from(["spread", "zeros", "one-hot", "constant", "wild"])


def numbers(seed, shape, scale, kind="spread", dtype="float32", signed=False):
    """Numbers up to a scale, which a dtype of less range cuts off."""
    generator = np.random.default_rng(seed)
    values = generator.uniform(0.05, 1, shape)
    if kind == "zeros":
        values = np.zeros(shape)
    elif kind == "constant":
        values = np.ones(shape)
    elif kind == "one-hot":
        values *= np.arange(shape[-1]) == generator.integers(shape[-1])
    elif kind == "wild":
        values = 10 ** generator.uniform(-70, 0, shape)
    if signed:
        values = values * generator.choice([-1, 1], shape)
    return jnp.asarray(
        np.clip(values * scale, -6e4, 6e4) if dtype == "float16" else values * scale,
        jnp.float32,
    ).astype(dtype)


def distributions(seed, shape, kind):
    weights = np.float64(numbers(seed, shape, 1.0, kind))
    weights = np.where(weights.sum(-1, keepdims=True) > 0, weights, 1)
    return jnp.asarray(weights / weights.sum(-1, keepdims=True), jnp.float32)


def assert_finite(tree, *, signed=False):
    for leaf in jax.tree.leaves(tree):
        assert jnp.isfinite(leaf).all()
        assert signed or (leaf >= 0).all()


@AMOUNTS
def test_splitting_is_exact(examples):
    def check(seed, scale, kind):
        array = numbers(seed, (3, 5), scale, kind, signed=True)
        for axis in (-1, (0, 1)):
            found, exponents = split(array, axis)
            product = np.float64(found) * 2.0 ** np.float64(exponents)
            largest = np.abs(np.float64(array)).max(axis, keepdims=True)
            kept = np.abs(np.float64(array)) >= largest * 2.0**-63
            np.testing.assert_array_equal(
                np.where(kept, product, 0), np.where(kept, np.float64(array), 0)
            )
            assert np.abs(found).max() <= 4
            back = np.where(np.abs(array) < 2e-38, 0, join(found, exponents))
            np.testing.assert_array_equal(
                np.where(kept, back, 0),
                np.where(kept & (np.abs(array) >= 2e-38), array, 0),
            )

    fuzz(check, examples, seed=SEEDS, scale=SCALES, kind=KINDS)


def test_splitting_and_joining_have_gradients():
    array = jnp.asarray([1e-30, 2.0, 3e38])

    def twice(array):
        return join(2 * split(array, -1)[0], split(array, -1)[1] - 2)

    np.testing.assert_array_equal(jax.grad(lambda x: twice(x).sum())(array), [0.5] * 3)


@AMOUNTS
def test_fields(examples):
    def check(seed, grid_and_dtype, scale, kind, mass):
        grid, dtype = grid_and_dtype
        count = grid[0] * grid[1]
        impact = numbers(seed, (2, count, count), scale, kind, dtype)
        field = fields.responsive_field(impact, grid, mass=mass)
        assert_finite((field.extents, field.area))
        assert_finite(field, signed=True)
        assert (field.area <= 1).all()
        assert_finite(field.geometry_share)
        assert_finite(fields.discriminability(impact))
        assert_finite(fields.heard(impact, 0), signed=True)
        summary = fields.statistics(field, axes=(0,))
        assert_finite(summary, signed=True)
        if kind == "wild" or dtype != "float32":
            return
        # Shares do not know of units: the same at another scale.
        other = fields.responsive_field(
            numbers(seed, (2, count, count), 1.0, kind), grid, mass=mass
        )
        np.testing.assert_allclose(field.area, other.area, atol=1e-6)
        np.testing.assert_allclose(
            field.displacement, other.displacement, atol=2e-5, rtol=1e-4
        )
        if scale > 1e-36:
            spread = fields.discriminability(
                numbers(seed, (2, count, count), 1.0, kind)
            )
            got = np.float64(fields.discriminability(impact)) / np.float64(scale)
            np.testing.assert_allclose(got, spread, rtol=1e-4, atol=1e-6)

    fuzz(
        check,
        examples,
        seed=SEEDS,
        grid_and_dtype=GRIDS_AND_DTYPES,
        scale=SCALES,
        kind=KINDS,
        mass=st.sampled_from([0.05, 0.5, 0.9, 0.999]),
    )


def test_rows_of_any_scale_have_the_field_of_their_shares():
    """The same matrix, each row at another end of the range."""
    impact = np.random.default_rng(0).uniform(0.1, 1, (6, 6))
    expected = fields.responsive_field(jnp.asarray(impact, jnp.float32), (2, 3))
    scales = np.asarray([1e-38, 3e38, 1.0, 1e-20, 1e30, 2e-38])[:, None]
    got = fields.responsive_field(jnp.asarray(impact * scales, jnp.float32), (2, 3))
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_allclose(got.displacement, expected.displacement, atol=1e-5)
    subnormal = fields.responsive_field(
        jnp.asarray(impact * 1e-40, jnp.float32), (2, 3)
    )
    np.testing.assert_allclose(subnormal.area, expected.area, atol=1e-6)
    np.testing.assert_allclose(subnormal.displacement, expected.displacement, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_discriminability_scales_with_its_impact(scale):
    impact = numbers(0, (5, 5), 1.0)
    expected = np.float64(fields.discriminability(impact)) * scale
    got = fields.discriminability(jnp.asarray(np.float64(impact) * scale, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@AMOUNTS
def test_statistics_and_shares(examples):
    def check(seed, scale, other, kind):
        first, second = (
            fields.statistics(
                numbers(seed + i, (3, 4), s, kind, signed=True), axes=(0,)
            )
            for i, s in enumerate((scale, other))
        )
        assert_finite((first, second, fields.merge(first, second)), signed=True)
        arrows = numbers(seed, (2, 4, 2), scale, kind, signed=True)
        by = numbers(seed + 1, (2, 4, 2), other, kind, signed=True)
        share = tendency.explained_share(arrows, by)
        assert_finite(share)
        assert (share <= 1 + 1e-5).all()
        full = tendency.explained_share(arrows, arrows)
        expected = 1.0 if jnp.split(arrows, 1)[0].any() and kind != "wild" else full
        np.testing.assert_allclose(full, expected, rtol=1e-5)

    fuzz(
        check, examples, seed=st.integers(0, 99), scale=SCALES, other=SCALES, kind=KINDS
    )


@AMOUNTS
def test_indicators_of_attention(examples):
    def check(seed, grid, kind, per_head, normalize):
        count = grid[0] * grid[1]
        attention = distributions(seed, (1, 2, 2, count + 1, count + 1), kind)
        options = {"num_prefix_tokens": 1, "per_head": per_head}
        for method in ("mean", "max", "std", "odds", "distance"):
            assert_finite(
                interaction_indicator(
                    attention, method=method, grid=grid, normalize=normalize, **options
                )
            )
        assert_finite(attention_rollout(attention, normalize=normalize, **options))
        assert_finite(mean_attention_distance(attention, grid=grid, **options))

    fuzz(
        check,
        examples,
        seed=SEEDS,
        grid=GRIDS,
        kind=KINDS,
        per_head=st.booleans(),
        normalize=st.booleans(),
    )


def layer(seed, scales, kind, dtype="float32", tokens=5):
    values, kernel, residual, cotangent = scales
    return (
        distributions(seed, (2, 3, tokens, tokens), kind),
        numbers(seed + 1, (2, tokens, 3, 4), values, "spread", dtype, signed=True),
        numbers(seed + 2, (3, 4, 6), kernel, "spread", dtype, signed=True),
        numbers(seed + 3, (6,), residual, "spread", dtype, signed=True),
        numbers(seed + 4, (2, tokens, 6), cotangent, "spread", dtype, signed=True),
    )


@functools.partial(jax.jit, static_argnames="per_head")
def impacts(attention, values, kernel, residual, cotangent, per_head):
    options = {"num_prefix_tokens": 1, "per_head": per_head}
    arrays = (attention, values, kernel)
    return (
        knockout_impact(*arrays, residual, **options),
        propagated_knockout(
            *arrays,
            lambda n: jnp.roll(cotangent, n),
            residual,
            num_probes=3,
            **options,
        ),
        knockout_effect(*arrays, cotangent, residual, **options),
    )


@AMOUNTS
def test_knockout(examples):
    def check(seed, scales, kind, dtype_and_heads):
        dtype, per_head = dtype_and_heads
        *positive, effect = impacts(*layer(seed, scales, kind, dtype), per_head)
        assert_finite(positive)
        assert_finite(effect, signed=True)

    fuzz(
        check,
        examples,
        seed=st.integers(0, 2**31),
        scales=st.tuples(SCALES, SCALES, SCALES, SCALES),
        kind=KINDS,
        dtype_and_heads=DTYPES_AND_HEADS,
    )


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    "scales",
    [
        (1e19, 1.0, 1.0, 1.0),
        (1e30, 1e-30, 1.0, 1e10),
        (1e-30, 1e25, 1e5, 1e12),
        (1.0, 1e-20, 1.0, 1e-12),
        (3e38, 1e-38, 1e-5, 1e10),
    ],
)
def test_knockout_at_any_scale_is_that_at_scale_one(scales, per_head):
    attention, *plain = layer(3, (1.0,) * 4, "spread")
    scaled = [
        jnp.asarray(np.float64(array) * scale * 0.5, jnp.float32)
        for array, scale in zip(plain, scales, strict=True)
    ]

    weight = np.prod(np.float64(scales[:3])) / 8
    (local, far, effect), (plain_local, plain_far, plain_effect) = (
        impacts(attention, *arrays, per_head) for arrays in (scaled, plain)
    )
    for got, expected, factor in (
        (local, plain_local, weight),
        (far.impact, plain_far.impact, weight * scales[3] / 2),
        (effect, plain_effect, weight * scales[3] / 2),
    ):
        expected = np.float64(expected) * factor
        np.testing.assert_allclose(
            got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
        )


@pytest.mark.parametrize("seed", range(2))
def test_patches_may_be_renamed(seed):
    """A permutation of the tokens permutes the impact, at the ends of the range too."""
    order = np.random.default_rng(seed).permutation(5)
    attention, values, kernel, residual, _ = layer(
        seed, (1e25, 1e-20, 1.0, 1.0), "spread"
    )
    impact = knockout_impact(attention, values, kernel, residual, num_prefix_tokens=0)
    renamed = knockout_impact(
        attention[..., order, :][..., order],
        values[..., order, :, :],
        kernel,
        residual,
        num_prefix_tokens=0,
    )
    expected = impact[..., order, :][..., order]
    np.testing.assert_allclose(renamed, expected, rtol=1e-4, atol=1e-4 * impact.max())


def test_gradients_are_finite_at_the_ends_of_the_range():
    attention, values, kernel, residual, _ = layer(0, (1e25, 1e-25, 1.0, 1.0), "spread")

    def total(values, kernel):
        impact = knockout_impact(
            attention, values, kernel, residual, num_prefix_tokens=1
        )
        return impact.sum()

    slopes = jax.grad(total, argnums=(0, 1))(values, kernel)
    assert_finite(slopes, signed=True)
    assert jnp.abs(slopes[0]).max() > 0
    # A function that grows with the values has their products as its value.
    np.testing.assert_allclose(
        (slopes[0] * values).sum(), total(values, kernel), rtol=1e-3
    )


@AMOUNTS
def test_stretch(examples):
    def check(seed, gain, scales, kind):
        attention = distributions(seed, (2, 1, 3, 4, 4), kind)
        token_scale = jnp.stack(
            [numbers(seed + n, (1, 4), s) for n, s in enumerate(scales)]
        )
        head_gain = numbers(seed, (2, 3), gain)
        assert_finite(expected_stretch(attention, head_gain, token_scale))

    fuzz(
        check,
        examples,
        seed=st.integers(0, 2**31),
        gain=SCALES,
        scales=st.tuples(SCALES, SCALES, SCALES),
        kind=KINDS,
    )


@AMOUNTS
def test_what_is_kept(examples):
    def check(seed, scale, kind, share, jit):
        scores = numbers(seed, (2, 1, 6, 6), scale, kind, signed=kind != "zeros")
        keep = interventions.keep_strongest
        kept = (jax.jit(keep, static_argnums=1) if jit else keep)(scores, share)
        assert kept.sum() == round(share * 72)
        assert jnp.diagonal(kept, axis1=-2, axis2=-1).all()
        if kind == "spread":
            plain = numbers(seed, (2, 1, 6, 6), 1.0, kind, signed=True)
            if scale > 1e-37:
                np.testing.assert_array_equal(kept, keep(plain, share))
        patches = interventions.keep_patches(scores[0, 0], 3)
        assert patches.shape == (6, 3)

    fuzz(
        check,
        examples,
        seed=SEEDS,
        scale=SCALES,
        kind=KINDS,
        share=st.sampled_from([1 / 6, 0.25, 0.5, 1.0]),
        jit=st.booleans(),
    )


def test_sixty_four_bits_change_no_type():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        attention = jax.nn.softmax(jnp.asarray(rng.normal(size=(2, 3, 10, 10))), -1)
        values, kernel = rng.normal(size=(2, 10, 3, 4)), rng.normal(size=(3, 4, 12))
        cotangents = jnp.asarray(rng.normal(size=(2, 10, 12)))
        layer, prefix = (attention, values, kernel), {"num_prefix_tokens": 1}
        impact = interaction_indicator(attention, **prefix)
        odds = interaction_indicator(attention, **prefix, method="odds")
        found = [
            odds,
            interaction_indicator(
                attention, **prefix, method="random", key=jax.random.key(0)
            ),
            attention_rollout(attention[:, None], **prefix),
            mean_attention_distance(attention, **prefix),
            knockout_impact(*layer, **prefix),
            knockout_impact(*layer, **prefix, per_head=True),
            knockout_effect(*layer, cotangents, **prefix),
            propagated_knockout(
                *layer, lambda probe: cotangents * (1 + probe), **prefix, num_probes=2
            ),
            fields.responsive_field(impact, (3, 3))._replace(mask=None),
            fields.discriminability(impact),
            fields.heard(attention, 1),
            interventions.attention_bias(
                interventions.keep_strongest(impact[:, None], 0.5), **prefix
            ),
        ]
        types = {str(leaf.dtype) for leaf in jax.tree.leaves(found)}
    assert types == {"float32"}
