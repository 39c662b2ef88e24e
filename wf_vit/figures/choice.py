"""What a figure shows: its arrays, checked, and the layers and patches it picks."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Int, Shaped

from wf_vit import grid as geometry
from wf_vit.arrays import as_array
from wf_vit.errors import UsageError

# Layers at most that are shown beside each other, unless a figure says otherwise.
LAYERS = 4

# Numbers of patches, as a list or as `telling_patches` returns them.
Patches = Sequence[int] | Int[np.ndarray, " _"]


def telling_patches(
    discriminability: Float[Any, " P"], grid: geometry.Grid, count: int = 1
) -> Int[np.ndarray, " count"]:
    """Returns the patches whose influence depends most on who listens, well apart.

    The first has the largest discriminability. Each further one has the largest among
    those that are far from all before it: nearer than a third of the grid counts less.
    So does the rim, by half, where a field has only one side to grow to.

    Args:
      discriminability: of every patch (`wf_vit.fields.discriminability`).
      grid: ``(GH, GW)``.
      count: how many, at most P.

    Raises:
      UsageError: the values do not fit the grid, or fewer than ``count`` patches.
    """
    values = shaped("discriminability", discriminability, "P", grid)
    if not 0 <= count <= len(values):
        raise UsageError(
            f"count is {count}, expected 0 to {len(values)}: the grid {tuple(grid)} "
            "has no more patches."
        )
    distance = geometry.distances(grid)
    position = geometry.coordinates(grid)
    rim = np.min([position, np.array(grid[::-1]) - 1 - position], axis=(0, 2)) < 1
    # Above 0, so that patches are still told apart by distance where all are equal.
    values = values.astype(float)
    score = values - values.min() + 1e-6 * (np.ptp(values) or 1.0)
    score *= np.where(rim, 0.5, 1.0)
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(np.argmax(score)))
        score *= np.minimum(distance[chosen[-1]] / (max(grid) / 3), 1)
    return np.array(chosen, int)


def most_discriminative(
    matrices: Shaped[np.ndarray, "*batch P P"], grid: geometry.Grid, count: int = 1
) -> Int[np.ndarray, " count"]:
    """Returns the telling patches by shares, or masks, ``[..., i, j]``.

    The discriminability of each matrix counts relative to its mean, so that each
    layer and head has one vote. A patch's influence on itself is left out: a patch
    that listens to nobody else would always be chosen.
    """
    size = matrices.shape[-1]
    # Who is alone has no others.
    other = ~np.eye(size, dtype=bool) | (size == 1)
    # In units of the largest: squares are in range.
    largest = np.abs(matrices).max((-2, -1), keepdims=True)
    largest = np.where(largest > 0, largest, 1)
    matrices = np.divide(matrices, largest, dtype=np.float32)
    spread = np.std(matrices, -2, where=other).reshape(-1, size)
    mean = spread.mean(-1, keepdims=True)
    votes = spread / np.where(mean > 0, mean, 1)
    return telling_patches(votes.mean(0), grid, count)


def spread(count: int, at_most: int) -> list[int]:
    """Returns evenly spread indices, the first and the last included."""
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(int).tolist()


def layer_titles(
    layers: Sequence[int], count: int, layer_names: Sequence[int] | None
) -> list[str]:
    """Returns the titles of some of ``count`` layers."""
    names = range(count) if layer_names is None else layer_names
    if len(names) != count:
        raise UsageError(
            f"layer_names are {list(names)}, but the arrays have {count} layers: pass "
            "one name for each."
        )
    return [f"layer {names[layer]}" for layer in layers]


def shaped(
    name: str, values: Any, axes: str, grid: geometry.Grid, **sizes: int
) -> Shaped[np.ndarray, "..."]:
    """Returns values as a NumPy array of finite numbers, checked by its axes.

    Args:
      name: of the argument, for the error.
      values: an array from anywhere (`wf_vit.arrays`).
      axes: one letter or number for each, where P is the number of patches.
      grid: ``(GH, GW)``.
      **sizes: what other letters must be, if it is known.

    Raises:
      UsageError: another shape, or values that are NaN or infinite.
    """
    array = np.asarray(as_array(values, name))
    letters = axes.split()
    known: Mapping[str, int] = {"P": grid[0] * grid[1], **sizes}
    wanted = [int(a) if a.isdigit() else known.get(a) for a in letters]
    if array.ndim != len(letters) or any(
        want not in (None, size) for want, size in zip(wanted, array.shape, strict=True)
    ):
        expected = ", ".join(
            a if want is None else str(want)
            for a, want in zip(letters, wanted, strict=True)
        )
        raise UsageError(
            f"{name} has the shape {array.shape}, expected [{', '.join(letters)}] = "
            f"[{expected}], since the grid {tuple(grid)} has {grid[0] * grid[1]} "
            "patches: pass the grid as (rows, columns), and arrays without prefix "
            "tokens."
        )
    if 0 in array.shape:
        raise UsageError(
            f"{name} has the shape {array.shape}: there is nothing to draw."
        )
    if not np.isfinite(array).all():
        raise UsageError(
            f"{name} of the shape {array.shape} is NaN or infinite somewhere, expected "
            "finite numbers: look for the layer where they begin."
        )
    return array


def check_patch(patch: SupportsIndex, grid: geometry.Grid) -> int:
    """Returns the number of a patch, which must lie on the grid."""
    count, patch = grid[0] * grid[1], operator.index(patch)
    if not 0 <= patch < count:
        raise UsageError(
            f"patch is {patch}, expected a number from 0 to {count - 1}: patches of "
            f"the grid {tuple(grid)} are counted row by row, without prefix tokens."
        )
    return patch
