"""Positions that are computed, not learned: sine-cosine tables, and rotations."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wf_vit import grid as geometry
from wf_vit import settings
from wf_vit.settings import Setting

# How a model may add positions to its patches.
POSITIONS = ("learned", "sincos", "sincos_mae", "none")


def sincos_positions(
    grid: geometry.Grid, width: int, kind: str = "sincos"
) -> Float[np.ndarray, "P D"]:
    """Returns fixed 2-D sine-cosine positions.

    The frequencies fall from 1 to 1 / 10,000: for "sincos" the last is 1 / 10,000
    (MoCo v3, arXiv 2104.02057), for "sincos_mae" it would be the one after the last
    (MAE, arXiv 2111.06377).
    """
    count = width // 4
    last = count - 1 if kind == "sincos" else count
    omega = 10_000.0 ** -(np.arange(count) / last)
    phase = geometry.coordinates(grid)[:, :, None] * omega
    x, y = phase[:, 0], phase[:, 1]
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return table.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions (RoPE, arXiv 2104.09864) of the patches of a grid.

    Of a head's K channels, channel c < K / 2 and channel c + K / 2 are the two
    coordinates of a point, which is rotated by the patch's position times a frequency:
    the row for the first half of the points, the column for the other. The attention
    logit of two patches then depends on the displacement between them. Prefix tokens
    stay as they are.

    Attributes:
      temperature: T; the frequencies are ``T ** (-4 k / K)``, k from 0 to K / 4 - 1.
      span: how far the rotation turns over all rows and over all columns, in radians,
        at the frequency 1: on a larger grid the steps are smaller. None: a patch is
        one radian on any grid.
      offset: of the first row and column, in patches; None places the centre of the
        grid at 0. Only what patches and prefix tokens do to each other depends on it.

    Raises:
      UsageError: a number is out of range.
    """

    temperature: float
    span: tuple[float, float] | None = None
    offset: float | None = 0.0

    def __post_init__(self):
        declared = {
            "temperature": Setting(100.0, "of the frequencies", above=0, high=1e12),
            "span": Setting(None, "radians", kind=tuple, length=2, above=0, high=1e6),
            "offset": Setting(None, "patches", kind=float, low=-1e6, high=1e6),
        }
        settings.check(declared, dataclasses.asdict(self), "rotary")

    def waves(
        self, grid: geometry.Grid, head_width: int
    ) -> tuple[Float[np.ndarray, "P half"], Float[np.ndarray, "P half"]]:
        """Returns cosine and sine of the angle of every patch and point of a head."""
        count = head_width // 4
        frequencies = self.temperature ** -(np.arange(count) / count)
        place = geometry.coordinates(grid)[:, ::-1].astype(np.float64)
        sides = np.asarray(grid, np.float64)
        offset = 0.5 - sides / 2 if self.offset is None else self.offset
        steps = 1.0 if self.span is None else np.asarray(self.span) / sides
        angles = ((place + offset) * steps)[:, :, None] * frequencies
        angles = angles.reshape(len(place), -1)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


# DINOv3: the centres of the patches lie between -1 and 1, which is one full turn each.
DINOV3_ROTARY = Rotary(100.0, span=(4 * math.pi, 4 * math.pi), offset=None)


def rotate(
    x: Float[Array, "B N H K"],
    rotary: Rotary,
    grid: geometry.Grid,
    patches: Int[Array, "B kept"] | None = None,
) -> Float[Array, "B N H K"]:
    """Rotates the queries or keys of the patches by their positions.

    Args:
      x: prefix tokens first.
      rotary: how.
      grid: ``(GH, GW)``.
      patches: which patches of the grid the tokens after the prefix are; None for all.

    Returns:
      The same in the dtype of ``x``, computed in float32.
    """
    waves = rotary.waves(grid, x.shape[-1])
    if patches is None:
        cosine, sine = (jnp.asarray(wave)[None] for wave in waves)
    else:
        cosine, sine = (jnp.asarray(wave)[patches] for wave in waves)
    before = ((0, 0), (x.shape[1] - cosine.shape[1], 0), (0, 0))
    cosine = jnp.pad(cosine, before, constant_values=1)[:, :, None]
    sine = jnp.pad(sine, before)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
