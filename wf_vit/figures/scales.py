"""Amounts to colours: what a panel draws and its legend explains, in one place.

Amounts are a colour whose opacity is the value, so that a photograph stays visible
where nothing happens. Panels and legends take norm and colours from the same `Scale`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, to_rgb

from wf_vit.figures.style import flow_colors

_STEPS = 256
# Even the largest amount lets the photograph through a little.
_OPAQUE = 0.85


def _amounts(opaque: float) -> ListedColormap:
    """Magenta, rare in photographs, and brighter where it is opaque."""
    level = np.linspace(0, 1, _STEPS)[:, None]
    low, high = np.array(to_rgb("#E6007E")), np.array(to_rgb("#FFE14A"))
    color = low + (high - low) * np.clip(2 * level - 1, 0, 1)
    return ListedColormap(np.hstack([color, opaque * level]), "amounts")


def _signed() -> ListedColormap:
    """Blue below 0, clear at 0, red above."""
    level = np.linspace(-1, 1, _STEPS + 1)[:, None]
    color = np.where(level < 0, to_rgb("#0050FF"), to_rgb("#F0003C"))
    return ListedColormap(np.hstack([color, _OPAQUE * np.abs(level)]), "signed")


AMOUNTS, SIGNED = _amounts(_OPAQUE), _signed()
# For what most patches have much of: else the photograph would be lost.
DENSE = _amounts(0.65)


class Scale(NamedTuple):
    """How values become colours.

    Attributes:
      norm: values to [0, 1].
      cmap: [0, 1] to colours with their opacity.
      label: what the values are, with their unit.
      ticks: values to name in the legend, and their names.
    """

    norm: Normalize
    cmap: Colormap
    label: str
    ticks: Mapping[float, str]


def over_mean(
    values: Float[np.ndarray, "..."], label: str, *, least: float = 1.0
) -> Scale:
    """Returns the logarithmic scale of values whose unit is their mean.

    What is below ``least`` is clear. The scale ends where one value in a hundred is
    larger, and its legend says so: else one outlier would make all others invisible.
    """
    values = _any(values)
    top = _rounded_up(max(float(np.quantile(values, 0.99)), 4.0 * least))
    middle = 10.0 if top >= 40 else 2.0 if top <= 5 else 3.0
    more = "≥ " if values.max() > top else ""
    ticks = {least: f"≤ {least:g}", middle: f"{middle:g}", top: f"{more}{top:g}"}
    return Scale(LogNorm(least, top, clip=True), AMOUNTS, label, ticks)


def linear(values: Float[np.ndarray, "..."], label: str) -> Scale:
    """Returns the linear scale of non-negative values, where all but a few lie."""
    low, top = (float(f"{v:.2g}") for v in np.quantile(values, (0.02, 0.98)))
    if low >= top:
        low, top = 0.0, _rounded_up(top)
    ticks = {
        low: f"≤ {low:g}" if values.min() < low else f"{low:g}",
        top: f"≥ {top:g}" if values.max() > top else f"{top:g}",
    }
    return Scale(Normalize(low, top, clip=True), DENSE, label, ticks)


def signed(values: Float[np.ndarray, "..."], label: str) -> Scale:
    """Returns the diverging scale of values in their own unit, 0 in the middle.

    It ends where one value in a hundred is larger, as ``over_mean``.
    """
    size = np.abs(_any(values))
    top = _rounded_up(float(np.quantile(size, 0.99)) or float(size.max()))
    more = ("≤ ", "≥ ") if size.max() > top else ("", "")
    ticks = {
        -top: f"{more[0]}\N{MINUS SIGN}{top:g}",
        0.0: "0",
        top: f"{more[1]}{top:g}",
    }
    return Scale(Normalize(-top, top, clip=True), SIGNED, label, ticks)


def even(
    values: Float[np.ndarray, "*batch P"], counted: np.ndarray | bool = True
) -> Float[np.ndarray, "*batch P"]:
    """Returns values over their mean, so that 1 is what all have if it is even.

    Args:
      values: non-negative. Where all are 0, they stay so.
      counted: which of them the mean is over; where none is, all become 0.
    """
    values = np.asarray(values, np.float32)
    # In units of the largest: the sum of large numbers is out of range.
    largest = values.max(-1, keepdims=True)
    values = values / np.where(largest > 0, largest, 1)
    total = values.sum(-1, keepdims=True, where=counted)
    count = np.broadcast_to(counted, values.shape).sum(-1, np.float32, keepdims=True)
    return values * count / np.where(total > 0, total, 1)


def flow_layer(
    displacement: Float[np.ndarray, "*batch 2"],
) -> Float[np.ndarray, "*batch 4"]:
    """Returns colours whose hue is the direction and whose opacity the length up to 1.

    Over the grey of a photograph they are ``flow_colors``, nearly.
    """
    length = np.linalg.norm(displacement, axis=-1, keepdims=True)
    color = flow_colors(displacement / np.maximum(length, 1e-9))
    return np.concatenate([color, _OPAQUE * np.minimum(length, 1)], -1)


def _any(values: np.ndarray) -> np.ndarray:
    """Returns the values, or a 0: a patch that is alone has no others."""
    return values if values.size else np.zeros(1)


def _rounded_up(value: float) -> float:
    """Returns the next number of one digit (two from 1 to 2); 1 if there is none."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** np.floor(np.log10(value))
    steps = np.array([1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10])
    # Rounding must not take a number to the next step.
    return float(f"{unit * steps[steps >= value / unit * (1 - 1e-6)][0]:.3g}")
