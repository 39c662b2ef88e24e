"""What an indicator chooses, against controls of equal size."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wf_vit.errors import UsageError
from wf_vit.figures.style import COLUMN, ShownFigure, looks, style


class Curve(NamedTuple):
    """A measure over a share, with its interval.

    Attributes:
      x: where it was measured.
      mean: the measure there.
      low: lower end of its interval.
      high: upper end.
    """

    x: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]


def evidence(
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    *,
    own: Collection[str],
    aside: Collection[str] = (),
    ylabel: str = "",
    width: float = COLUMN,
) -> Figure:
    """Draws curves with their intervals, a look for each rule in all panels.

    What is put to the test is drawn thick and above its controls.

    Args:
      panels: curves by rule, by the title of their panel.
      xlabel: what the horizontal axis is, with its unit.
      own: the rules that are put to the test.
      aside: rules, such as the reverse of what is tested, for which the vertical axes
        make no room: what they would squeeze together is told apart.
      ylabel: what the vertical axes are, if the titles do not say it.
      width: of the figure, in inches.

    Returns:
      A figure with up to three columns of panels and one legend below them.

    Raises:
      UsageError: there are no curves.
    """
    rules = list(dict.fromkeys(rule for curves in panels.values() for rule in curves))
    if not rules:
        raise UsageError("There are no curves to draw: pass at least one panel of one.")
    look_of = dict(zip(rules, looks(), strict=False))
    columns = len(panels) if len(panels) <= 3 else 2
    rows = math.ceil(len(panels) / columns)
    # Inches: the legend has a row for every two rules.
    height = 0.42 * width * rows + 0.15 + 0.13 * math.ceil(len(rules) / 2)
    with style():
        figure = ShownFigure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for panel, (title, curves) in zip(axes.flat, panels.items(), strict=False):
            panel.set_title(title)
            for rule, curve in curves.items():
                mine = rule in own
                look = look_of[rule] | {"zorder": 3 if mine else 2}
                panel.fill_between(
                    curve.x, curve.low, curve.high, color=look["color"], alpha=0.2, lw=0
                )
                panel.plot(
                    curve.x, curve.mean, marker=".", lw=1.6 if mine else 0.8, **look
                )
                if len(curve.x) <= 5:
                    _mark(panel, curve.x)
            _make_room([c for rule, c in curves.items() if rule not in aside], panel)
        for panel in axes.flat[len(panels) :]:
            panel.remove()
        handles = [
            axes[0, 0].plot([], [], lw=1.6 if rule in own else 0.8, **look_of[rule])[0]
            for rule in rules
        ]
        # Of three panels only the middle one has room.
        for panel in axes[-1, 1:2] if columns == 3 else axes[-1]:
            panel.set_xlabel(xlabel)
        for panel in axes[:, 0]:
            panel.set_ylabel(ylabel)
        names = [f"{rule} (if in view)" if rule in aside else rule for rule in rules]
        figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


def _mark(panel: Axes, x: Float[np.ndarray, " points"]) -> None:
    """Marks every point of the horizontal axis, in logarithms where some lie close."""
    if x.min() > 0 and len(x) > 1 and np.diff(np.sort(x)).min() < 0.15 * np.ptp(x):
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.set_xticks(x, labels=[f"{value:g}" for value in x])


def _make_room(curves: Sequence[Curve], panel: Axes) -> None:
    """Fits the vertical axis to some of the curves."""
    ends = np.array([end for curve in curves for end in (*curve.low, *curve.high)])
    ends = ends[np.isfinite(ends)]
    if ends.size:
        margin = 0.05 * np.ptp(ends) or 0.05
        panel.set_ylim(ends.min() - margin, ends.max() + margin)
