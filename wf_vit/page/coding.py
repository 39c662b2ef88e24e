"""How the explorer stores numbers: few bits each, with a known error.

Interactions are shares of their row. A share is stored by its square root, as a code
0 .. levels of the root of the row's largest: against equal steps this keeps the many
small shares, which hold most of the mass, at the same size. The error is known,

    |decoded - share| <= largest * (1 / levels + 1 / (4 levels^2)),

and it shrinks with the root of the share. The browser decodes with two look-ups
(``explorer.js``); ``decode`` is the same in NumPy.
"""

import base64
import dataclasses
import zlib

import numpy as np
from jaxtyping import Float, Int16, UInt8, UInt16

_SCALE_STEPS = 65535


@dataclasses.dataclass(frozen=True)
class Coded:
    """Rows of interactions as codes.

    Attributes:
      codes: of each interaction, at most ``levels``.
      scales: root of each row's largest share, in 65535ths.
      levels: number of steps from 0 to the row's largest.
    """

    codes: UInt8[np.ndarray, "*rows P"]
    scales: UInt16[np.ndarray, "*rows"]
    levels: int

    def decode(
        self, total: float | Float[np.ndarray, "*rows"] = 1.0
    ) -> Float[np.ndarray, "*rows P"]:
        """Returns the shares as the page shows them, of what each row has in all."""
        largest = np.square(self.scales.astype(np.float32) / _SCALE_STEPS) * total
        # Rounding must not take a number out of float32's range.
        largest = np.minimum(largest, np.finfo(np.float32).max).astype(np.float32)
        steps = np.square(np.arange(self.levels + 1, dtype=np.float32) / self.levels)
        return steps[self.codes] * largest[..., None]

    def error_bound(self) -> float:
        """Returns the largest error of a share, relative to its row's largest."""
        return 1 / self.levels + 1 / (4 * self.levels**2)


def over_largest(
    rows: Float[np.ndarray, "*batch N"],
) -> Float[np.ndarray, "*batch N"]:
    """Returns rows in units of their largest number, so that no sum is out of range.

    They are float32; rows of zeros stay.
    """
    rows = np.asarray(rows, np.float32)
    largest = rows.max(-1, keepdims=True)
    return rows / np.where(largest > 0, largest, 1)


def row_shares(
    impact: Float[np.ndarray, "*batch rows P"],
) -> Float[np.ndarray, "*batch rows P"]:
    """Returns rows that sum to 1; one without any impact is the patch itself alone.

    Rows beyond the P-th are no patches: without impact they stay 0.
    """
    impact = over_largest(impact)
    total = impact.sum(-1, keepdims=True)
    share = impact / np.where(total > 0, total, 1)
    return np.where(total > 0, share, np.eye(*impact.shape[-2:], dtype=share.dtype))


def encode(shares: Float[np.ndarray, "*rows P"], levels: int) -> Coded:
    """Returns the codes of shares in [0, 1], with 1 to 255 levels."""
    roots = np.sqrt(np.asarray(shares, np.float32))
    largest = roots.max(-1, keepdims=True)
    codes = np.rint(levels * roots / np.where(largest > 0, largest, 1))
    return Coded(
        codes=codes.astype(np.uint8),
        scales=np.rint(_SCALE_STEPS * largest[..., 0]).astype(np.uint16),
        levels=levels,
    )


def fixed_point(
    values: Float[np.ndarray, "*shape"], steps_per_unit: int
) -> Int16[np.ndarray, "*shape"]:
    """Returns values in steps of ``1 / steps_per_unit``, the error at most half one."""
    return np.rint(values * steps_per_unit).clip(-32768, 32767).astype(np.int16)


def pack(array: np.ndarray) -> str:
    """Returns an array's bytes, compressed, as text; the browser can undo both.

    Numbers of two bytes go low bytes first, then high bytes: the high ones hardly
    vary, and so compress to next to nothing.
    """
    planes = array.reshape(-1, 1).view(np.uint8).T if array.itemsize > 1 else array
    # Codes repeat by chance more than by structure: short matches do not pay.
    deflate = zlib.compressobj(strategy=zlib.Z_FILTERED)
    packed = deflate.compress(planes.tobytes()) + deflate.flush()
    return base64.b64encode(packed).decode("ascii")
