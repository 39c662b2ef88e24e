"""Geometry of the patch grid: positions, displacements, distances.

A grid is ``(GH, GW)``, its number of rows and of columns; it need not be square.
Positions and displacements are ``(x, y)`` in patches. All functions return NumPy
arrays: the grid is static, so they are constants under ``jax.jit``.
"""

import math

import numpy as np
from jaxtyping import Float

from wf_vit.errors import UsageError

Grid = tuple[int, int]

# Standard deviations from the centre of a Gaussian to where it is half as high.
HALF = math.sqrt(2 * math.log(2))


def infer_grid(
    num_tokens: int, *, num_prefix_tokens: int, grid: Grid | None = None
) -> Grid:
    """Returns the patch grid of a sequence of tokens.

    Args:
      num_tokens: N, prefix tokens included.
      num_prefix_tokens: how many tokens before the patches (CLS, registers,
        distillation token). It is never guessed.
      grid: the grid, if known. It is checked; without it the grid must be square.

    Returns:
      ``(GH, GW)`` with ``GH * GW = num_tokens - num_prefix_tokens``.

    Raises:
      UsageError: no such grid exists.
    """
    patches = num_tokens - num_prefix_tokens
    found = f"{num_tokens} tokens less {num_prefix_tokens} prefix tokens"
    if num_prefix_tokens < 0 or patches < 1:
        raise UsageError(
            f"{found} leave {patches} patches, expected at least 1: pass "
            "num_prefix_tokens as the number of CLS, register and distillation tokens."
        )
    if grid is not None:
        if grid[0] * grid[1] != patches:
            raise UsageError(
                f"{found} leave {patches} patches, but grid {tuple(grid)} has "
                f"{grid[0] * grid[1]}: correct num_prefix_tokens or grid."
            )
        return (int(grid[0]), int(grid[1]))
    side = math.isqrt(patches)
    if side * side != patches:
        raise UsageError(
            f"{found} leave {patches} patches, which is no square grid: pass "
            "grid=(rows, columns), or correct num_prefix_tokens."
        )
    return (side, side)


def coordinates(grid: Grid) -> Float[np.ndarray, "P 2"]:
    """Returns the ``(x, y)`` position of every patch, in patches."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.stack([x, y], axis=-1).astype(np.float32)


def displacements(grid: Grid) -> Float[np.ndarray, "P P 2"]:
    """Returns ``position(j) - position(i)`` as ``(dx, dy)`` for every i, j."""
    position = coordinates(grid)
    return position[None, :, :] - position[:, None, :]


def distances(grid: Grid) -> Float[np.ndarray, "P P"]:
    """Returns the Euclidean distance of every two patches, in patches."""
    return np.linalg.norm(displacements(grid), axis=-1)
