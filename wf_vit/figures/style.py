"""One look for all figures: sizes, colours, and colours for directions."""

import io
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

# Widths of a column and of a page of text, in inches.
COLUMN, PAGE = 3.3, 6.9

# Okabe and Ito's palette, darkest and most distinct first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")

_STYLE = {
    "axes.grid": True,
    "axes.labelsize": 7,
    "axes.linewidth": 0.5,
    "axes.prop_cycle": mpl.cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlepad": 2,
    "axes.titlesize": 7,
    "figure.dpi": 300,
    "font.size": 7,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.4,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.title_fontsize": 6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "xtick.labelsize": 6,
    "xtick.major.size": 2,
    "xtick.major.width": 0.5,
    "ytick.labelsize": 6,
    "ytick.major.size": 2,
    "ytick.major.width": 0.5,
}


class ShownFigure(Figure):
    """A figure that shows itself in a notebook, without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with style():
            self.savefig(file, format="png")
        return file.getvalue()


def style() -> AbstractContextManager:
    """Returns the context that gives every figure of the project its look."""
    return mpl.rc_context(_STYLE)


def looks() -> Iterator[dict]:
    """Yields a colour and a dash for each head or patch, endlessly."""
    for dash in itertools.cycle(DASHES):
        for color in COLORS:
            yield {"color": color, "ls": dash}


def flow_colors(
    displacement: Float[np.ndarray, "*batch 2"],
) -> Float[np.ndarray, "*batch 3"]:
    """Returns colours that tell directions apart, also to the colour-blind.

    The hue is the direction, the saturation the length up to 1; no displacement is
    gray. In the OKLab colour space (Ottosson, 2020) left to right runs from blue to
    yellow, which all common kinds of colour vision tell apart; up to down runs from
    red to green and also from light to dark, for those who see no red and green.

    Args:
      displacement: ``(x, y)``, y downwards; longer than 1 is taken as 1.

    Returns:
      sRGB in [0, 1].
    """
    length = np.linalg.norm(displacement, axis=-1, keepdims=True)
    x, y = np.moveaxis(displacement / np.maximum(length, 1.0), -1, 0)
    lightness, red, yellow = 0.7 - 0.14 * y, -0.12 * y, 0.14 * x
    lms = lightness[..., None] + red[..., None] * np.array(
        [0.3963377774, -0.1055613458, -0.0894841775]
    )
    lms = lms + yellow[..., None] * np.array(
        [0.2158037573, -0.0638541728, -1.2914855480]
    )
    linear = lms**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = np.clip(linear, 0, 1)
    return np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    )
