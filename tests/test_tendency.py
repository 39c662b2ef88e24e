"""The tendency: stationary, planted and real rows; what the fit promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import tendency
from wf_vit.grid import coordinates, displacements, distances

GRID = (9, 12)
PATCHES = 108


def normalized(rows):
    return rows / rows.sum(-1, keepdims=True)


def local(width, floor=0.02):
    """A stationary kernel laid on the grid: near patches, and all others a little."""
    return np.exp(-0.5 * np.square(distances(GRID) / width)) + floor


def centroids(rows):
    return np.einsum("ij,ijc->ic", normalized(rows), displacements(GRID))


def around(patch, width=0.7):
    """What is 1 at a patch and falls off around it, of every patch."""
    return np.exp(-0.5 * np.square(distances(GRID)[patch] / width))


@pytest.mark.parametrize("width", [1.0, 4.0])
def test_a_stationary_kernel_is_all_geometry(width):
    found = tendency.tendency(jnp.asarray(normalized(local(width))), GRID)
    np.testing.assert_allclose(found.displacement, centroids(local(width)), atol=1e-4)
    np.testing.assert_allclose(found.excess, 0, atol=2e-3)
    np.testing.assert_allclose(found.popularity, 0, atol=2e-3)


def test_a_drift_that_all_patches_share_is_geometry():
    step = displacements(GRID) - np.array([2.0, -1.0])
    rows = np.exp(-0.5 * np.square(step).sum(-1)) + 1e-3
    found = tendency.tendency(jnp.asarray(normalized(rows)), GRID)
    # Kernels that leave the grid are cut there, which is geometry, too.
    assert np.abs(found.excess).max() < 0.02 * np.abs(found.displacement).max()


@pytest.mark.parametrize("width", [2.0, 5.0])
@pytest.mark.parametrize("strength", [3, 30])
@pytest.mark.parametrize("target", [17, 54, 106])
def test_a_planted_tendency_is_recovered(width, strength, target):
    rows = local(width) * (1 + strength * around(target))
    planted = centroids(rows) - centroids(local(width))
    found = tendency.tendency(jnp.asarray(normalized(rows)), GRID)
    error = np.linalg.norm(found.excess - planted) / np.linalg.norm(planted)
    assert error < 0.05
    # Everyone listens to it, so that it is popular, and nothing else.
    np.testing.assert_allclose(found.popularity, found.excess, atol=0.02)


def test_what_one_region_alone_hears_is_its_own():
    rows = local(3.0)
    region = np.flatnonzero(coordinates(GRID)[:, 0] < 4)
    rows[region] *= 1 + 30 * around(54)
    found = tendency.tendency(jnp.asarray(normalized(rows)), GRID)
    own = np.asarray(found.excess - found.popularity)
    toward = displacements(GRID)[:, 54]
    along = (own * toward).sum(-1) / np.maximum(np.linalg.norm(toward, axis=-1), 1)
    assert along[region].mean() > 0.3
    assert np.delete(along, region).mean() < 0


def test_a_patchs_own_part_has_no_trace_of_geometry():
    # The fit matches every offset's and every column's sum, from which it follows.
    key = jax.random.key(0)
    noise = jax.random.gamma(key, 0.5, (2, 3, PATCHES, PATCHES))
    rows = noise * local(3.0)[None, None]
    found = tendency.tendency(normalized(rows), GRID)
    own = found.excess - found.popularity
    inwards = coordinates(GRID).mean(0) - coordinates(GRID)
    inwards = jnp.broadcast_to(inwards, own.shape)
    assert tendency.explained_share(own, inwards).max() < 1e-6
    np.testing.assert_allclose(own.mean(-2), 0, atol=1e-4)


@pytest.mark.parametrize("taken", [0.9, 0.99])
@pytest.mark.parametrize("by", ["itself", "one patch"])
def test_it_has_none_either_where_one_key_takes_nearly_all(by, taken):
    noise = jax.random.gamma(jax.random.key(0), 0.5, (PATCHES, PATCHES))
    rest = np.asarray(noise * local(1.5)) * (1 - np.eye(PATCHES))
    top = np.eye(PATCHES) if by == "itself" else np.eye(PATCHES)[[17] * PATCHES]
    rows = taken * top + (1 - taken) * normalized(rest)
    found = tendency.tendency(jnp.asarray(rows, jnp.float32), GRID)
    own = np.asarray(found.excess - found.popularity)
    length = np.sqrt(np.square(np.asarray(found.displacement)).sum(-1).mean())
    inwards = np.asarray(coordinates(GRID).mean(0) - coordinates(GRID), np.float32)
    assert np.abs(own.mean(0)).max() < 1e-3 * length
    assert np.abs((own * inwards).sum(-1).mean()) < 3e-3 * length


def test_the_fit_reproduces_sums_over_offsets():
    key = jax.random.key(1)
    rows = jax.random.uniform(key, (PATCHES, PATCHES))
    step = displacements(GRID).astype(int)
    expected = np.zeros((2 * GRID[0], 2 * GRID[1]))
    np.add.at(expected, (step[..., 1], step[..., 0]), np.asarray(rows))
    sums = tendency._offset_sums(rows.reshape(*GRID, *GRID))
    np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_explained_share_is_a_squared_cosine():
    arrows = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    assert tendency.explained_share(arrows, 2 * arrows) == 1
    assert tendency.explained_share(arrows, arrows[:, ::-1]) == 0
    assert tendency.explained_share(arrows, 0 * arrows) == 0
    np.testing.assert_allclose(
        tendency.explained_share(arrows, arrows.at[1].set(0)), 9 / 25, rtol=1e-6
    )


def test_extreme_rows_stay_finite():
    nobody = np.zeros((PATCHES, PATCHES), np.float32)
    nobody[:, 5] = 1  # All listen to one patch, and nobody to the others.
    for rows in (nobody, np.eye(PATCHES), np.roll(np.eye(PATCHES), 1, 1)):
        found = tendency.tendency(jnp.asarray(rows, jnp.float32), GRID)
        assert all(np.isfinite(part).all() for part in found)
    rng = np.random.default_rng(0)
    sparse = (rng.random((40, 9, 9)) < 0.1) * rng.random((40, 9, 9)) + 1e-3 * np.eye(9)
    spread = 10.0 ** rng.uniform(-30, 0, (40, 9, 9))
    for rows, most in ((sparse, 0.5), (spread, 0.02), (spread.swapaxes(1, 2), 0.02)):
        found = tendency.tendency(jnp.asarray(normalized(rows), jnp.float32), (3, 3))
        own = np.asarray(found.excess - found.popularity)
        assert np.abs(own.mean(1)).max() < most
        place = coordinates((3, 3))
        for part in (found.geometry, found.geometry + found.popularity):
            inside = place[None] + np.asarray(part)
            assert inside.min() > -1e-4
            assert inside.max() < 2 + 1e-4
    line = tendency.tendency(jnp.full((1, 7, 7), 1 / 7), (1, 7))
    np.testing.assert_allclose(line.excess, 0, atol=1e-4)
