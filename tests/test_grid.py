"""Patch-grid geometry on grids that can be checked by hand."""

import numpy as np
import pytest

from wf_vit import grid
from wf_vit.errors import UsageError


def test_patches_run_row_by_row():
    np.testing.assert_array_equal(
        grid.coordinates((2, 3)), [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    )


def test_displacements_point_from_query_to_key():
    offset = grid.displacements((2, 3))
    np.testing.assert_array_equal(offset[0, 5], [2, 1])
    np.testing.assert_array_equal(offset, -np.swapaxes(offset, 0, 1))
    assert grid.distances((2, 3))[0, 5] == pytest.approx(5**0.5)


@pytest.mark.parametrize(
    ("tokens", "prefix", "given", "expected"),
    [
        (197, 1, None, (14, 14)),
        (196, 0, None, (14, 14)),
        (261, 5, None, (16, 16)),
        (13, 1, (3, 4), (3, 4)),
    ],
)
def test_grid_is_inferred(tokens, prefix, given, expected):
    got = grid.infer_grid(tokens, num_prefix_tokens=prefix, grid=given)
    assert got == expected


@pytest.mark.parametrize(
    ("tokens", "prefix", "given", "message"),
    [
        # 196 tokens are a square without a CLS token, and none with one.
        (196, 1, None, "no square grid"),
        (197, 0, None, "no square grid"),
        (13, 1, (3, 5), "has 15"),
        (4, 4, None, "at least 1"),
    ],
)
def test_impossible_grids_are_refused(tokens, prefix, given, message):
    with pytest.raises(UsageError, match=message):
        grid.infer_grid(tokens, num_prefix_tokens=prefix, grid=given)
