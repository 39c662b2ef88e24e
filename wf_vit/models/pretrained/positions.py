"""Position tables of another grid, resized as the libraries they come from do.

Resizing is linear and separable: ``rows @ table @ columns^T`` with one small matrix
of weights for each axis. The matrices repeat what PyTorch's ``interpolate`` (bicubic,
half-pixel centres) and SciPy's ``ndimage.zoom`` (order 1) compute.
"""

import dataclasses
import logging
import math

import numpy as np
from jaxtyping import Float

from wf_vit import settings
from wf_vit.errors import UsageError
from wf_vit.grid import Grid
from wf_vit.settings import setting

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How a library resizes position tables.

    Attributes:
      kernel: "cubic" with half-pixel centres, or "linear" with aligned corners.
      antialias: whether a cubic kernel widens when it shrinks a table. PyTorch's
        cubic has the parameter -0.75 without and -0.5 with it.
      offset: added to the new size where the scale is computed, and only there: the
        0.1 of DINO's and DINOv2's code, which their checkpoints were tuned with.

    Raises:
      UsageError: a value is out of its range.
    """

    kernel: str = setting("cubic", "of the resize", choices=("cubic", "linear"))
    antialias: bool = setting(False, "whether a cubic kernel widens")
    offset: float = setting(0.0, "added to the new size", low=0, high=1)

    def __post_init__(self):
        settings.check_fields(self, "resampling")


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
    wanted: Grid | None = None,
) -> tuple[Float[np.ndarray, "S D"], Float[np.ndarray, "GH GW D"]]:
    """Splits a checkpoint's table into the prefix tokens' part and the patches'.

    Libraries give a position to all prefix tokens, to those that are no registers, or
    to none; ``196`` entries can therefore not be told from their number alone.

    Args:
      positions: one row per token that has a position, prefix tokens first.
      num_prefix_tokens: how many prefix tokens the checkpoint has.
      grid: the grid that a config claims; it has precedence where it fits.
      wanted: the grid that the caller wants, which may be the table's own.

    Returns:
      The positions of the first S prefix tokens, and those of the patches.

    Raises:
      UsageError: no number of prefix tokens leaves such a grid, or both the caller's
        and a square grid are possible.
    """
    total, width = positions.shape
    counts = range(min(num_prefix_tokens, total - 1), -1, -1)

    def reading(grid: Grid | None) -> int | None:
        """Returns how many prefix tokens have a position, if this is the grid."""
        patches = grid[0] * grid[1] if grid else 0
        return total - patches if total - patches in counts else None

    sides = [math.isqrt(total - count) for count in counts]
    squares = [
        (side, side)
        for side, count in zip(sides, counts, strict=True)
        if side * side == total - count
    ]
    chosen = None
    if reading(grid) is not None:
        chosen = grid
    elif reading(wanted) is not None and wanted not in squares:
        alike = [s for s in squares if reading(s) == reading(wanted)]
        if alike:
            raise UsageError(
                f"The position table has {total} entries: {alike[0][0]} x "
                f"{alike[0][1]} patches, or {wanted[0]} x {wanted[1]} as is wanted. "
                "Put the config.json with the checkpoint's own image_size beside it; "
                "or load it without image_size, as square, and call resized()."
            )
        chosen = wanted
    elif squares:
        chosen = wanted if wanted in squares else squares[0]
    if chosen is None:
        raise UsageError(
            f"The position table has {total} entries: with 0 to {num_prefix_tokens} "
            "prefix tokens they leave no square grid"
            + (f", nor one of {grid[0]}x{grid[1]}" if grid else "")
            + (f", nor one of {wanted[0]}x{wanted[1]}" if wanted else "")
            + ". Put the config.json with the checkpoint's image_size beside it, or "
            "pass image_size."
        )
    count = reading(chosen)
    if grid and chosen != grid:
        _LOG.warning(
            "The config says %d x %d patches, but the position table has %d entries: "
            "it is taken as %d x %d.",
            *grid,
            total,
            *chosen,
        )
    return positions[:count], positions[count:].reshape(*chosen, width)
