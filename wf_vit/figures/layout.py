"""Where panels, titles and legends of a figure lie, in inches.

A layout engine cannot fit panels of fixed aspect to a fixed width exactly.
"""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from wf_vit import grid as geometry
from wf_vit.figures import scales
from wf_vit.figures.style import ShownFigure

_GAP, _TITLE, _LABEL, _EDGE = 0.04, 0.15, 0.13, 0.02
_LETTER = 0.052  # Width of a letter of a label, on average and a little more.
_LINE = 0.11  # Height of a line of the smallest type.
_SMALL = 6  # Points: the smallest type that is readable in print.

# Heights of the footers that hold a legend.
BARS, WHEEL = 0.44, 0.5


class Block(NamedTuple):
    """A grid of photographs.

    Attributes:
      columns: a title for each column, of one line or several.
      rows: a label for each row; one empty label where there is nothing to say.
    """

    columns: Sequence[str]
    rows: Sequence[str] = ("",)


def lay_out(
    blocks: Sequence[Block],
    grid: geometry.Grid,
    width: float,
    *,
    title: str = "",
    note: str = "",
    source: str = "",
    footer: float = 0.0,
) -> tuple[Figure, list[np.ndarray], tuple[float, float, float, float]]:
    """Lays out blocks of photographs below each other, each as wide as the figure.

    Labels of rows stand on end, but upright where a row is too low for that.

    Args:
      blocks: from the top down.
      grid: ``(GH, GW)``, the aspect of the photographs.
      width: of the figure, in inches.
      title: above all.
      note: what lines and arrows mean, in small type at the foot.
      source: what was measured on which model, below all.
      footer: height of the room for a legend, above the source.

    Returns:
      The figure, each block's panels [rows, columns], and the footer's rectangle, in
      shares of the figure.
    """
    labels = [label for block in blocks for label in block.rows if label]
    left = _LABEL if labels else _EDGE
    heading = _lines(title, width * 17)
    notes = [_lines(text, width * 22) for text in (note, source)]
    sides = _sides(blocks, width - left - _EDGE)
    lowest = min(sides) * grid[0] / grid[1]
    least = 0.0  # From a row to the next, for labels not to touch.
    upright = lowest < _LETTER * max(map(len, labels), default=0)
    if upright:
        broken = {label: textwrap.wrap(label, 8) for label in labels}
        longest = max(len(line) for lines in broken.values() for line in lines)
        left = _LETTER * longest + 0.09
        least = 0.13 * max(map(len, broken.values()))
        sides = _sides(blocks, width - left - _EDGE)
    tall = [side * grid[0] / grid[1] for side in sides]
    pitches = [max(high + _GAP, least) for high in tall]
    tops, y = [], 0.16 * len(heading)
    for block, pitch in zip(blocks, pitches, strict=True):
        lines = max(title.count("\n") + 1 for title in block.columns)
        y += lines * _TITLE if any(block.columns) else _GAP
        tops.append(y)
        y += len(block.rows) * pitch
    below = _LINE * sum(map(len, notes)) + 0.04
    height = y + footer + below
    figure = ShownFigure(figsize=(width, height))
    all_panels = []
    for block, side, high, top, pitch in zip(
        blocks, sides, tall, tops, pitches, strict=True
    ):
        panels = np.empty((len(block.rows), len(block.columns)), object)
        for row, column in np.ndindex(panels.shape):
            x = left + column * (side + _GAP)
            bottom = height - top - high - row * pitch
            panel = figure.add_axes(
                (x / width, bottom / height, side / width, high / height)
            )
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            panel.spines[:].set_visible(False)
            panels[row, column] = panel
        for panel, text in zip(panels[0], block.columns, strict=True):
            panel.set_title(text)
        for panel, text in zip(panels[:, 0], block.rows, strict=True):
            if text and upright:
                text, look = "\n".join(broken[text]), {"rotation": 0, "va": "center"}
                panel.set_ylabel(text, labelpad=2, ha="right", **look)
            else:
                panel.set_ylabel(text, labelpad=2)
        all_panels.append(panels)
    if heading:
        figure.text(
            0.5, 1 - 0.02 / height, "\n".join(heading), ha="center", va="top",
            fontsize=8,
        )  # fmt: skip
    for lines, color, y in zip(
        notes, ("black", "0.35"), (0.02 + _LINE * len(notes[1]), 0.02), strict=True
    ):
        if lines:
            figure.text(
                0.5, y / height, "\n".join(lines), ha="center", va="bottom",
                fontsize=_SMALL, color=color,
            )  # fmt: skip
    foot = (left / width, below / height)
    return figure, all_panels, (*foot, 1 - (left + _EDGE) / width, footer / height)


def _sides(blocks, room):
    """Returns the width of each block's panels."""
    counts = [len(block.columns) for block in blocks]
    return [(room - _GAP * (count - 1)) / count for count in counts]


def _lines(text, most):
    """Returns lines of at most so many characters, about equally long."""
    count = len(textwrap.wrap(text, int(most)))
    for length in range(len(text) // max(count, 1), int(most) + 1):
        lines = textwrap.wrap(text, max(length, 1))
        if len(lines) <= count:
            return lines
    return textwrap.wrap(text, int(most))


def legend_bars(figure, foot, legends: Sequence[scales.Scale]) -> None:
    """Draws a bar for each scale, beside each other in the footer.

    Half of a bar lies on a light ground and half on a dark one, since colours over a
    photograph lie on both.
    """
    height = figure.get_figheight()
    room = foot[2] / len(legends)
    share = 0.5 if len(legends) == 1 else 0.72
    for place, scale in enumerate(legends):
        axes = figure.add_axes(
            (
                foot[0] + (place + 0.5 - share / 2) * room,
                foot[1] + 0.25 / height,
                share * room,
                0.1 / height,
            )
        )
        axes.imshow(
            [[0.95], [0.3]], cmap="gray", vmin=0, vmax=1, extent=(0, 1, 0, 1),
            aspect="auto",
        )  # fmt: skip
        axes.imshow(
            np.linspace(0, 1, 256)[None], cmap=scale.cmap, extent=(0, 1, 0, 1),
            vmin=0, vmax=1, aspect="auto",
        )  # fmt: skip
        axes.grid(False)
        axes.spines[:].set(visible=True, linewidth=0.4)
        axes.set(yticks=[], xlim=(0, 1), ylim=(0, 1))
        axes.set_xticks(
            [float(scale.norm(at)) for at in scale.ticks], scale.ticks.values()
        )
        axes.tick_params(pad=1)
        axes.set_xlabel(scale.label, labelpad=1)


def wheel(figure, foot, text: str) -> None:
    """Draws the legend of a flow: a disc of all displacements up to 1, over grey."""
    width, height = figure.get_size_inches()
    size = 0.42
    axes = figure.add_axes(
        (foot[0] + 0.1 * foot[2], foot[1] + 0.03 / height, size / width, size / height)
    )
    y, x = np.mgrid[-1:1:101j, -1:1:101j]
    inside = np.hypot(x, y)[..., None] <= 1
    ground = np.broadcast_to(np.append([0.6] * 3, 1.0), (*x.shape, 4))
    for layer in (ground, scales.flow_layer(np.dstack([x, y]))):
        axes.imshow(layer * np.where(inside, 1.0, [1, 1, 1, 0]), extent=(-1, 1, 1, -1))
    axes.axis("off")
    axes.text(1.3, 0, text, va="center", fontsize=_SMALL)


def footer_axes(figure, foot):
    """Returns axes in the footer, with room for labels and for a legend."""
    width, height = figure.get_size_inches()
    left, bottom, right = 0.43 / width, 0.32 / height, 0.75 / width
    return figure.add_axes(
        (left, foot[1] + bottom, 1 - left - right, foot[3] - bottom - 0.18 / height)
    )
