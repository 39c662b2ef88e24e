"""The closed form of a knockout, against masking the key in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.indicators.layer import Layer
from wf_vit import indicators


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
@pytest.mark.parametrize("sharpness", [30.0, 60.0, 80.0, 95.0])
def test_gradients_are_finite_however_sure_a_head_is(sharpness, per_head):
    layer = Layer()
    _, *others = layer.arrays()
    # One key is above all others by that much, which differ by up to 1.
    logits = layer.logits / np.ptp(layer.logits)
    logits = jnp.asarray(logits, jnp.float32).at[:, :, 3].add(sharpness)

    def impact(logits):
        attention = jax.nn.softmax(logits, axis=-1)
        return indicators.knockout_impact(
            attention, *others, num_prefix_tokens=1, per_head=per_head
        ).sum()

    assert jnp.isfinite(jax.grad(impact)(logits)).all()


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
