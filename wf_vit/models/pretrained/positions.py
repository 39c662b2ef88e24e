"""Position tables of another grid, resized as the libraries they come from do.

Resizing is linear and separable: ``rows @ table @ columns^T`` with one small matrix
of weights for each axis. The matrices repeat what PyTorch's ``interpolate`` (bicubic,
half-pixel centres) and SciPy's ``ndimage.zoom`` (order 1) compute.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from wf_vit.errors import UsageError
from wf_vit.grid import Grid


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How a library resizes position tables.

    Attributes:
      kernel: "cubic" with half-pixel centres, or "linear" with aligned corners.
      antialias: whether a cubic kernel widens when it shrinks a table. PyTorch's
        cubic has the parameter -0.75 without and -0.5 with it.
      offset: added to the new size where the scale is computed, and only there: the
        0.1 of DINO's and DINOv2's code, which their checkpoints were tuned with.
    """

    kernel: str = "cubic"
    antialias: bool = False
    offset: float = 0.0


TORCH_CUBIC = Resampling()
TORCH_CUBIC_ANTIALIAS = Resampling(antialias=True)
META_CUBIC = Resampling(offset=0.1)
SCIPY_LINEAR = Resampling(kernel="linear")


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) with parameter ``a``."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_weights(
    old: int, new: int, resampling: Resampling
) -> Float[np.ndarray, "{new} {old}"]:
    """Returns the matrix that resizes one axis from ``old`` to ``new`` positions."""
    target = np.arange(new)
    if resampling.kernel == "linear":
        source = target * ((old - 1) / max(new - 1, 1))
        return np.maximum(1 - np.abs(source[:, None] - np.arange(old)), 0)
    scale = old / (new + resampling.offset)
    source = (target + 0.5) * scale - 0.5
    if resampling.antialias:
        widening = max(scale, 1.0)
        distance = (np.arange(old) - source[:, None]) / widening
        weights = _cubic(distance, a=-0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    # Taps beyond the border read the border.
    taps = np.floor(source).astype(int)[:, None] + np.arange(-1, 3)
    weights = np.zeros((new, old))
    np.add.at(
        weights,
        (target[:, None], np.clip(taps, 0, old - 1)),
        _cubic(source[:, None] - taps, a=-0.75),
    )
    return weights


def resize_table(
    table: Float[np.ndarray, "GH GW D"], grid: Grid, resampling: Resampling
) -> Float[np.ndarray, "newGH newGW D"]:
    """Returns the position table for another grid, in float32."""
    if table.shape[:2] == tuple(grid):
        return table.astype(np.float32)
    rows, columns = (
        resize_weights(old, new, resampling)
        for old, new in zip(table.shape[:2], grid, strict=True)
    )
    resized = np.einsum("yh,hwd,xw->yxd", rows, table, columns, optimize=True)
    return resized.astype(np.float32)


def split_positions(
    positions: Float[np.ndarray, "T D"],
    *,
    num_prefix_tokens: int,
    grid: Grid | None,
) -> tuple[Float[np.ndarray, "S D"], Float[np.ndarray, "GH GW D"]]:
    """Splits a checkpoint's table into the prefix tokens' part and the patches'.

    Libraries give a position to all prefix tokens, to those that are no registers, or
    to none; ``196`` entries can therefore not be told from their number alone.

    Args:
      positions: one row per token that has a position, prefix tokens first.
      num_prefix_tokens: how many prefix tokens the checkpoint has.
      grid: the grid that a config claims; where it does not fit, or is None, the
        table must be square.

    Returns:
      The positions of the first S prefix tokens, and those of the patches.

    Raises:
      UsageError: no number of prefix tokens leaves such a grid.
    """
    total, width = positions.shape
    for count in range(min(num_prefix_tokens, total - 1) + 1):
        patches = total - count
        side = math.isqrt(patches)
        for rows, columns in (grid, (side, side)) if grid else ((side, side),):
            if rows * columns == patches:
                table = positions[count:].reshape(rows, columns, width)
                return positions[:count], table
    raise UsageError(
        f"The position table has {total} entries: with 0 to {num_prefix_tokens} "
        "prefix tokens they leave no square grid"
        + (f", nor one of {grid[0]}x{grid[1]}" if grid else "")
        + ". Put the config.json with the checkpoint's image_size beside it."
    )
