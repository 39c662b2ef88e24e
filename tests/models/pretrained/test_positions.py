"""Position tables: resized as their libraries do, and told from the prefix."""

import math

import numpy as np
import pytest
from scipy import ndimage

from tests.models.pretrained.checkpoints import FIXTURES
from wf_vit.errors import UsageError
from wf_vit.models.pretrained import positions


@pytest.mark.parametrize(
    ("rule", "resampling"),
    [
        ("plain", positions.TORCH_CUBIC),
        ("antialias", positions.TORCH_CUBIC_ANTIALIAS),
        ("offset", positions.META_CUBIC),
    ],
)
def test_tables_are_resized_as_pytorch_does(rule, resampling):
    with np.load(FIXTURES / "resize.npz") as file:
        table = file["table"]
        for key in [k for k in file.files if k.startswith(rule)]:
            grid = tuple(map(int, key.split("/")[1].split("x")))
            got = positions.resize_table(table, grid, resampling)
            # PyTorch computes coordinates in float32.
            np.testing.assert_allclose(got, file[key], atol=5e-6, err_msg=key)


@pytest.mark.parametrize("grid", [(3, 3), (5, 12), (7, 4), (1, 9)])
def test_tables_are_resized_as_google_does(grid):
    table = np.random.default_rng(0).normal(size=(7, 7, 3)).astype(np.float32)
    zoom = (grid[0] / 7, grid[1] / 7, 1)
    got = positions.resize_table(table, grid, positions.SCIPY_LINEAR)
    np.testing.assert_allclose(got, ndimage.zoom(table, zoom, order=1), atol=1e-6)


@pytest.mark.parametrize(
    ("entries", "prefix_tokens", "grid", "with_position"),
    [
        (196, 1, (14, 14), 0),  # a CLS token without a position
        (197, 1, (14, 14), 1),
        (198, 2, (14, 14), 2),
        (1370, 5, (37, 37), 1),  # registers without positions
        (201, 5, (14, 14), 5),
        (256, 0, (16, 16), 0),
    ],
)
def test_positions_of_prefix_tokens_are_counted(
    entries, prefix_tokens, grid, with_position
):
    table = np.random.default_rng(0).normal(size=(entries, 4))
    first, patches = positions.split_positions(
        table, num_prefix_tokens=prefix_tokens, grid=None
    )
    assert patches.shape[:2] == grid
    np.testing.assert_array_equal(first, table[:with_position])
    np.testing.assert_array_equal(patches[0, 1], table[with_position + 1])


def test_a_table_without_patches_is_refused():
    with pytest.raises(UsageError, match="2 entries: with 0 to 0"):
        positions.split_positions(np.zeros((2, 4)), num_prefix_tokens=0, grid=(2, 2))


GRIDS = [(1, 3), (2, 4), (3, 5), (4, 6), (5, 3), (4, 4), (1, 1), (2, 7), (6, 1)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefixes", [0, 1, 2, 5])
@pytest.mark.parametrize("placed", ["all", "cls", "none"])
def test_a_known_grid_is_taken_for_every_count_of_prefix_tokens(grid, prefixes, placed):
    """Of n x (n + 2) patches and CLS there are (n + 1)^2 entries."""
    count = {"all": prefixes, "cls": min(prefixes, 1), "none": 0}[placed]
    table = np.arange(count + grid[0] * grid[1], dtype=np.float32)[:, None]
    options = {"num_prefix_tokens": prefixes}
    for known in ({"grid": grid}, {"grid": None, "wanted": grid}):
        side = math.isqrt(grid[0] * grid[1])
        if "wanted" in known and side * side == grid[0] * grid[1] != side * grid[0]:
            continue  # As likely a square one; see below.
        before, patches = positions.split_positions(table, **options, **known)
        assert patches.shape == (*grid, 1)
        np.testing.assert_array_equal(before[:, 0], np.arange(count))


def test_a_table_that_may_be_square_or_as_wanted_is_not_guessed():
    table = np.zeros((17, 1), np.float32)
    with pytest.raises(UsageError, match=r"4 x 4 patches, or 2 x 8 as is wanted"):
        positions.split_positions(table, num_prefix_tokens=1, grid=None, wanted=(2, 8))
    _, patches = positions.split_positions(
        table, num_prefix_tokens=1, grid=(2, 8), wanted=(2, 8)
    )
    assert patches.shape == (2, 8, 1)
    # Another size is wanted than the table's own.
    _, patches = positions.split_positions(
        table, num_prefix_tokens=1, grid=None, wanted=(3, 8)
    )
    assert patches.shape == (4, 4, 1)
