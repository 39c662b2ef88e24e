"""Learned fields against their definition, written out pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.models.attention import DROPPED
from wf_vit.models.windowfree import (
    FieldConfig,
    PredictedFields,
    inverse_softplus,
    make_fields,
)

GRID = (3, 5)


def random_extents(seed=0):
    return 3 * jax.random.uniform(jax.random.key(seed), (2, 4, 15, 4))


def log_membership_by_definition(extents, softness):
    """The formula of the module's docstring, in float64, one pair at a time."""
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    left, top, right, bottom = np.moveaxis(np.asarray(extents, np.float64), -1, 0)
    result = np.zeros((*left.shape, left.shape[-1]))
    for i, (yi, xi) in enumerate(np.ndindex(*GRID)):
        for j, (yj, xj) in enumerate(np.ndindex(*GRID)):
            dx, dy = xj - xi, yj - yi
            sides = (
                dx + left[..., i],
                right[..., i] - dx,
                dy + top[..., i],
                bottom[..., i] - dy,
            )
            result[..., i, j] = sum(log_sigmoid(side / softness) for side in sides)
    return result


@pytest.mark.parametrize("softness", [0.25, 0.5, 2.0])
def test_membership_follows_its_definition(softness):
    extents = random_extents()
    fields = make_fields(extents, grid=GRID, softness=softness)
    expected = log_membership_by_definition(extents, softness)
    np.testing.assert_allclose(fields.log_membership(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fields.area(), np.exp(expected).mean(-1), rtol=1e-4)


def test_hard_fields_drop_keys_but_never_the_patch_itself():
    extents = random_extents().at[:, 0].set(0.0)  # Own membership is 1/16 in head 0.
    soft = make_fields(extents, grid=GRID, softness=0.5)
    hard = make_fields(extents, grid=GRID, softness=0.5, threshold=0.3)
    log_m, cut = soft.log_membership(), hard.log_membership()
    own = np.broadcast_to(np.eye(15, dtype=bool), log_m.shape)
    kept = (np.exp(log_m) >= 0.3) | own
    np.testing.assert_allclose(cut[kept], log_m[kept])
    assert np.all(cut[~kept] == np.float32(DROPPED))
    weights = jax.nn.softmax(hard.attention_bias(num_prefix_tokens=0))
    assert np.all(weights[~kept] == 0)
    area = np.where(kept, np.exp(log_m), 0).mean(-1)
    np.testing.assert_allclose(hard.area(), area, rtol=1e-5)


def test_prefix_tokens_see_and_are_seen_by_everything():
    fields = make_fields(random_extents(), grid=GRID, softness=0.5)
    bias = fields.attention_bias(num_prefix_tokens=2)
    assert bias.shape == (2, 4, 17, 17)
    assert np.all(bias[..., :2, :] == 0)
    assert np.all(bias[..., :2] == 0)
    np.testing.assert_array_equal(bias[..., 2:, 2:], fields.log_membership())


def test_prediction_starts_at_the_extents_of_the_heads():
    config = FieldConfig(extents=(1.0, 4.0, 1e3))
    module = PredictedFields(num_heads=6, grid=GRID, config=config, layer=0)
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))  # One prefix token.
    fields = module.apply(module.init(jax.random.key(1), x), x)
    assert fields.extents.shape == (2, 6, 15, 4)
    for head, radius in enumerate([1.0, 4.0, 1e3] * 2):
        np.testing.assert_allclose(fields.extents[:, head], radius, rtol=1e-5)


def test_fields_of_later_layers_start_wider_until_they_reach_across_the_grid():
    config = FieldConfig(extents=(1.0, 1.5, 9.0, 0.0), growth=2.0)
    starts = [config.extents_of(4, GRID, layer) for layer in range(3)]
    wide = 4 + 12 * 0.5
    np.testing.assert_allclose(
        starts, [[1, 1.5, 9, wide], [3, 3.5, 9, wide], [4, 4, 9, wide]]
    )


def test_every_patch_and_head_predicts_its_own_field():
    module = PredictedFields(num_heads=2, grid=GRID, config=FieldConfig(), layer=0)
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))  # One prefix token.
    variables = module.init(jax.random.key(1), x)
    # The kernel starts at zero, so that fields start as configured.
    variables = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), variables
    )
    base = module.apply(variables, x).extents
    assert np.all(np.abs(base[:, 0] - base[:, 1]).max(-1) > 0)
    changed = module.apply(variables, x.at[1, 1 + 4].add(1.0)).extents != base
    where = np.zeros((2, 15), bool)
    where[1, 4] = True
    np.testing.assert_array_equal(changed.any((1, 3)), where)


@pytest.mark.parametrize("softness", [0.5, 2.0])
def test_an_extent_of_zero_covers_the_grid_and_still_has_a_gradient(softness):
    config = FieldConfig(extents=(0.0,), softness=softness)
    module = PredictedFields(num_heads=1, grid=(3, 28), config=config, layer=0)
    x = jax.random.normal(jax.random.key(0), (1, 84, 4))
    variables = module.init(jax.random.key(1), x)

    def lowest(variables):
        return module.apply(variables, x).log_membership().min()

    value, gradient = jax.value_and_grad(lowest)(variables)
    assert -2e-5 < value < -5e-6
    assert np.abs(gradient["params"]["extents"]["bias"]).max() > 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extents": ()}, "expected one or more numbers from 0"),
        ({"extents": (-1.0,)}, "expected one or more numbers from 0"),
        ({"growth": -0.5}, "expected a number from 0"),
        ({"softness": 0.0}, "above 0"),
        ({"threshold": 1.0}, "below 1"),
    ],
)
def test_impossible_fields_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        FieldConfig(**options)


def test_inverse_softplus():
    x = np.array([1e-4, 0.5, 1.5, 30.0, 1e3])
    np.testing.assert_allclose(jax.nn.softplus(inverse_softplus(x)), x, rtol=1e-5)


def test_extents_get_gradients_towards_what_they_cover():
    """A patch that gains from its right-hand neighbour reaches further right."""
    target = geometry.distances(GRID).argmin(0)[7] + 1

    def gain(extents):
        fields = make_fields(extents, grid=GRID, softness=0.5)
        return fields.log_membership()[0, 0, 7, target]

    gradient = jax.grad(gain)(jnp.full((1, 1, 15, 4), 0.5))[0, 0, 7]
    left, top, right, bottom = gradient
    assert right > max(left, top, bottom) > 0
