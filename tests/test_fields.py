"""Fields on hand-computed cases and on a Gaussian; statistics against all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import fields
from wf_vit.errors import UsageError
from wf_vit.grid import coordinates

GRID = (3, 4)
PATCHES = 12


def one_hot_at(shift):
    """Every patch's whole impact lies ``shift`` patches further on, cyclically."""
    return jnp.roll(jnp.eye(PATCHES), shift, axis=1)


def gaussian(grid, offset, spread):
    """Impact that falls off around the point ``offset`` away from each patch."""
    position = coordinates(grid)
    step = position[None] - position[:, None] - np.asarray(offset)
    weight = np.exp(-0.5 * np.square(step / np.asarray(spread)).sum(-1))
    return jnp.asarray(weight, jnp.float32)


def test_patches_that_see_only_themselves():
    field = fields.responsive_field(7 * one_hot_at(0), GRID, mass=0.8)
    # A patch is 1 wide, and its middle 80 % reach 0.4 to each side.
    np.testing.assert_allclose(field.extents, np.full((PATCHES, 4), 0.4), rtol=1e-5)
    np.testing.assert_allclose(field.area, 1 / PATCHES, rtol=1e-6)
    np.testing.assert_array_equal(field.displacement, 0)
    np.testing.assert_array_equal(field.covariance, 0)
    np.testing.assert_array_equal(field.mask, np.eye(PATCHES, dtype=bool))


def test_patches_that_see_another_patch():
    field = fields.responsive_field(one_hot_at(6), GRID, mass=0.8)
    # Patch 1 (x 1, y 0) sees patch 7 (x 3, y 1): its box reaches from its own
    # centre to 2.4 on the right and 1.4 below.
    np.testing.assert_allclose(field.extents[1], [0, 0, 2.4, 1.4], atol=1e-5)
    np.testing.assert_allclose(field.displacement[1], [2, 1], rtol=1e-6)
    np.testing.assert_allclose(field.covariance[1], 0, atol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(field.mask[1]), [1, 7])
    np.testing.assert_allclose(field.area[1], 1 / PATCHES, rtol=1e-6)


def test_uniform_impact():
    field = fields.responsive_field(jnp.full((PATCHES, PATCHES), 3.0), GRID, mass=0.5)
    # The middle half of 4 columns and 3 rows, from the centre of patch 5 (1, 1).
    np.testing.assert_allclose(field.extents[5], [0.5, 0.75, 1.5, 0.75], atol=1e-5)
    np.testing.assert_allclose(field.area, 0.5, rtol=1e-6)
    np.testing.assert_allclose(field.displacement[0], [1.5, 1.0], rtol=1e-5)
    expected = np.diag([np.var(np.arange(4)), np.var(np.arange(3))])
    np.testing.assert_allclose(
        field.covariance, np.broadcast_to(expected, (PATCHES, 2, 2)), atol=1e-5
    )
    assert set(np.asarray(field.mask.sum(-1))) <= {6, 7}


def test_area_and_mask_of_unequal_shares():
    row = np.zeros(PATCHES)
    row[[2, 3, 7, 8]] = [0.4, 0.3, 0.2, 0.1]
    indicator = jnp.asarray(np.tile(row, (PATCHES, 1)), jnp.float32)
    for mass, members in (
        (0.3, [2]),
        (0.4, [2]),
        (0.41, [2, 3]),
        (0.7, [2, 3]),
        (0.9, [2, 3, 7]),
        (0.95, [2, 3, 7, 8]),
    ):
        field = fields.responsive_field(indicator, GRID, mass=mass)
        np.testing.assert_allclose(field.area, len(members) / PATCHES, rtol=1e-6)
        np.testing.assert_array_equal(np.flatnonzero(field.mask[2]), members)
        np.testing.assert_array_equal(
            np.flatnonzero(field.mask[0]), sorted({0, *members})
        )


def test_a_lone_outlier_moves_the_mean_but_not_the_box():
    grid = (1, 21)
    near = gaussian(grid, (0, 0), 1.0)
    outlier = near.at[0, 20].add(0.02 * near[0].sum())
    boxes = [fields.responsive_field(x, grid).extents[0, 2] for x in (near, outlier)]
    assert float(boxes[1] - boxes[0]) < 0.5
    moved = fields.responsive_field(outlier, grid).displacement[0, 0]
    assert float(moved - fields.responsive_field(near, grid).displacement[0, 0]) > 0.3


def test_shifted_gaussian_gives_back_its_moments():
    grid, offset, spread = (25, 31), (2.0, -1.5), (2.5, 1.5)
    field = fields.responsive_field(gaussian(grid, offset, spread), grid, mass=0.9)
    centre = 12 * 31 + 15
    np.testing.assert_allclose(field.displacement[centre], offset, atol=1e-3)
    np.testing.assert_allclose(
        field.covariance[centre], np.diag(np.square(spread)), atol=1e-2
    )
    # 1.645 standard deviations on each side hold 90 % of a Gaussian, to which the
    # width of a patch adds a variance of 1 / 12.
    reach = 1.645 * np.sqrt(np.square(spread) + 1 / 12)
    expected = [reach[0] - 2, reach[1] + 1.5, reach[0] + 2, reach[1] - 1.5]
    np.testing.assert_allclose(field.extents[centre], expected, atol=0.06)
    # The smallest set that holds 90 % is an ellipse of this area.
    ellipse = -2 * np.log(0.1) * np.pi * spread[0] * spread[1]
    assert float(field.area[centre]) * 25 * 31 == pytest.approx(ellipse, rel=0.05)


def test_covariance_is_signed_like_the_picture():
    # From upper left to lower right: x and y grow together.
    diagonal = jnp.asarray(np.tile(np.eye(3).ravel(), (9, 1)), jnp.float32)
    covariance = fields.responsive_field(diagonal, (3, 3)).covariance[4]
    np.testing.assert_allclose(covariance, np.full((2, 2), 2 / 3), rtol=1e-5)


def test_rows_without_impact_count_as_the_patch_alone():
    indicator = one_hot_at(3).at[4].set(0.0)
    field = fields.responsive_field(indicator, GRID)
    alone = fields.responsive_field(one_hot_at(0), GRID)
    for name in set(field._fields) - {"excess"}:  # That is relative to the others.
        got, expected = getattr(field, name), getattr(alone, name)
        np.testing.assert_allclose(got[4], expected[4], atol=1e-6)


def test_leading_axes_scale_and_half_precision():
    indicator = jax.random.uniform(jax.random.key(0), (2, 3, PATCHES, PATCHES))
    field = fields.responsive_field(indicator, GRID)
    alone = fields.responsive_field(100 * indicator[1, 2], GRID)
    for got, expected in zip(field, alone, strict=True):
        np.testing.assert_allclose(got[1, 2], expected, rtol=1e-4, atol=1e-5)
    half = fields.responsive_field(indicator.astype(jnp.bfloat16), GRID)
    assert half.covariance.dtype == jnp.float32
    np.testing.assert_allclose(half.displacement, field.displacement, atol=0.02)


def test_gradients_are_finite():
    def total(indicator):
        field = fields.responsive_field(indicator, GRID)
        return field.extents.sum() + field.displacement.sum() + field.covariance.sum()

    for indicator in (one_hot_at(0), one_hot_at(2).at[0].set(0.0)):
        assert np.isfinite(jax.grad(total)(indicator)).all()


def test_discriminability_is_the_spread_over_queries():
    # Patch 0 matters equally to both, patch 1 to itself only.
    indicator = jnp.asarray([[[0.5, 0.0], [0.5, 4.0]]])
    np.testing.assert_allclose(fields.discriminability(indicator), [[0.0, 2.0]])


@pytest.mark.parametrize("mass", [0.9, 0.999999, 0.99999999])
def test_extents_end_where_the_impact_ends(mass):
    impact = np.zeros((8, 8), np.float32)
    impact[:, 2:6] = [0.1, 0.3, 0.3, 0.3]
    field = fields.responsive_field(jnp.asarray(impact), (1, 8), mass=mass)
    left, _, right, _ = field.extents[3]
    cut = (1 - mass) / 2  # Of 3.5 - 2 = 1.5 to the left and 6 - 3.5 = 2.5 to the right.
    np.testing.assert_allclose(left, 1.5 - cut / 0.1, rtol=1e-5)
    np.testing.assert_allclose(right, 2.5 - cut / 0.3, rtol=1e-5)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda x: -x, {}, "absolute value"),
        (lambda x: x.at[0, 0].set(jnp.nan), {}, "NaN or infinite"),
        (lambda x: x[:, 1:], {}, r"expected \[..., P, P\]"),
        (lambda x: x, {"grid": (4, 4)}, "has 16 patches"),
        (lambda x: x, {"mass": 1.0}, "mass is 1.0"),
        (lambda x: x, {"mass": 0.0}, "mass is 0.0"),
    ],
)
def test_bad_input_is_refused(change, arguments, message):
    with pytest.raises(UsageError, match=message):
        fields.responsive_field(change(one_hot_at(1)), **{"grid": GRID} | arguments)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("function", [fields.discriminability, fields.heard])
def test_what_is_no_matrix_is_refused(function):
    options = (0,) if function is fields.heard else ()
    with pytest.raises(UsageError, match=r"shape \(3, 4\), expected \[..., "):
        function(jnp.ones((3, 4)), *options)
    with pytest.raises(UsageError, match="NaN or infinite"):
        function(jnp.full((3, 3), jnp.nan), *options)


@pytest.mark.parametrize("prefix", [-1, 3])
def test_what_is_heard_of_no_patch_is_refused(prefix):
    with pytest.raises(UsageError, match=f"num_prefix_tokens is {prefix} with 3"):
        fields.heard(jnp.ones((3, 3)), prefix)


# Statistics.


def stream(samples, sizes, axes):
    ends = np.cumsum(sizes)
    batches = [
        samples[:, end - size : end] for end, size in zip(ends, sizes, strict=True)
    ]
    parts = [fields.statistics(batch, axes=axes) for batch in batches]
    return functools.reduce(fields.merge, parts)


def assert_statistics(got, samples, axes, rtol=1e-5):
    samples = np.asarray(samples, np.float64)
    assert int(got.count) == samples.shape[axes[0]]
    np.testing.assert_allclose(got.mean, samples.mean(axes), rtol=rtol)
    np.testing.assert_allclose(got.variance, samples.var(axes), rtol=rtol)


@pytest.mark.parametrize("axes", [(1,), (1, 3)])
def test_merged_statistics_are_those_of_all_images(axes):
    samples = 3 + jax.random.normal(jax.random.key(0), (2, 13, 3, 5))
    assert_statistics(stream(samples, (4, 1, 8), axes), samples, axes)


def test_statistics_of_many_batches_far_from_zero():
    samples = 1000 + jax.random.normal(jax.random.key(1), (1, 600, 4))
    got = stream(samples, [2] * 300, (1, 2))
    assert_statistics(got, samples, (1, 2), rtol=1e-3)


def test_merge_does_not_depend_on_the_order_or_grouping():
    samples = jax.random.normal(jax.random.key(2), (1, 9, 4))
    a, b, c = (
        fields.statistics(samples[:, part], axes=(1,))
        for part in (slice(0, 2), slice(2, 3), slice(3, 9))
    )
    left = fields.merge(fields.merge(a, b), c)
    right = fields.merge(c, fields.merge(b, a))
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_images_that_fill_up_a_batch_do_not_count():
    samples = jax.random.normal(jax.random.key(3), (2, 5, 3)).at[:, 3:].set(jnp.nan)
    valid = jnp.arange(5) < 3
    got = fields.statistics(samples, axes=(1, 2), valid=valid)
    assert_statistics(got, samples[:, :3], (1, 2))
    none = fields.statistics(samples, axes=(1, 2), valid=jnp.zeros(5, bool))
    assert int(none.count) == 0
    for merged in (fields.merge(got, none), fields.merge(none, got)):
        for x, y in zip(merged, got, strict=True):
            np.testing.assert_allclose(x, y)


def test_fields_stream_in_a_scan():
    indicator = jax.random.uniform(jax.random.key(4), (6, 2, 3, PATCHES, PATCHES))

    def field_statistics(batch):
        return fields.statistics(fields.responsive_field(batch, GRID), axes=(0, 2))

    def add(total, batch):
        return fields.merge(total, field_statistics(batch)), None

    start = jax.tree.map(jnp.zeros_like, field_statistics(indicator[0]))
    got, _ = jax.jit(lambda x: jax.lax.scan(add, start, x))(indicator)
    everything = field_statistics(indicator.reshape(12, 3, PATCHES, PATCHES))
    assert got.mean.extents.shape == (3, 4)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(everything), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": (-1,)}, "counted from the front"),
        ({"axes": (3,)}, "counted from the front"),
        ({"axes": ()}, "at least the batch axis"),
        ({"axes": (1,), "valid": jnp.ones(2, bool)}, "valid has shape"),
    ],
)
def test_statistics_refuse_what_does_not_fit(arguments, message):
    with pytest.raises(UsageError, match=message):
        fields.statistics(jnp.ones((2, 5, 3)), **arguments)


def test_what_is_heard_leaves_out_the_patch_itself():
    matrix = jnp.arange(16.0).reshape(4, 4)
    # Of the last three tokens: columns 1 to 3 without the diagonal.
    np.testing.assert_array_equal(fields.heard(matrix, 1), [28 - 5, 32 - 10, 36 - 15])


def test_what_is_heard_is_not_lost_beside_the_patch_itself():
    matrices = np.full((3, 3), 1e-6, np.float32) + 1e6 * np.eye(3, dtype=np.float32)
    np.testing.assert_allclose(fields.heard(jnp.asarray(matrices), 1), 2e-6, rtol=1e-6)
