"""Numbers over steps and over depth."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wf_vit.errors import UsageError
from wf_vit.figures.style import (
    COLORS,
    COLUMN,
    DASHES,
    ShownFigure,
    looks,
    style,
)

Row = Mapping[str, Any]


def training_curves(
    metrics: Sequence[Row] | Mapping[str, Sequence[Row]],
    *,
    width: float = COLUMN,
) -> Figure:
    """Draws loss and top-1 accuracy against the step, for one or several runs.

    Colours tell the runs apart, dashes the splits (training is solid and faint).

    Args:
      metrics: rows of ``metrics.jsonl``, or such rows by the label of their run. A row
        has ``step`` and any of ``train/loss``, ``<split>/loss`` and ``<split>/top1``
        (a fraction).
      width: of the figure, in inches.

    Returns:
      A figure with a panel for the loss and one for the accuracy.

    Raises:
      UsageError: no row has a loss or an accuracy.
    """
    runs = metrics if isinstance(metrics, Mapping) else {"": metrics}
    names = {name for rows in runs.values() for row in rows for name in row}
    losses, accuracies = _splits(names, "loss"), _splits(names, "top1")
    if not losses and not accuracies:
        raise UsageError(
            f"{sum(map(len, runs.values()))} rows of metrics with the keys "
            f"{sorted(names)} hold neither <split>/loss nor <split>/top1: pass the "
            "rows of a run's metrics.jsonl."
        )
    splits = sorted({*losses, *accuracies}, key=lambda split: (split != "train", split))
    dashes = dict(zip(splits, itertools.cycle(DASHES), strict=False))
    with style():
        figure = ShownFigure(figsize=(width, 0.45 * width), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        for color, (label, rows) in zip(
            itertools.cycle(COLORS), runs.items(), strict=False
        ):
            for panel, metric, scale in ((loss, "loss", 1), (accuracy, "top1", 100)):
                for split in splits:
                    x, y = _series(rows, f"{split}/{metric}")
                    look = {"ls": dashes[split], "marker": "." if len(x) < 20 else ""}
                    if split == "train":
                        look |= {"lw": 0.7, "alpha": 0.6}
                    panel.plot(x, scale * y, color=color, **look)
            if label:
                accuracy.plot([], [], color=color, label=label)
        for split in splits:
            loss.plot([], [], color="0.3", ls=dashes[split], label=split)
        loss.set_ylabel("loss")
        accuracy.set_ylabel("top-1 (%)")
        for panel in (loss, accuracy):
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            if panel.get_legend_handles_labels()[1]:
                panel.legend()
    return figure


def _splits(names: set[str], metric: str) -> list[str]:
    suffix = f"/{metric}"
    return sorted(n.removesuffix(suffix) for n in names if n.endswith(suffix))


def _series(rows, name):
    points = [(row["step"], row[name]) for row in rows if name in row]
    return np.asarray(points, float).reshape(-1, 2).T


def depth_profile(
    values: Float[np.ndarray, "L H"],
    ylabel: str,
    *,
    spread: Float[np.ndarray, "L H"] | None = None,
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws one number for each layer and head, such as the mean attention distance.

    Args:
      values: the number, for example the mean field area over a data set; one column
        for what is not told apart by heads.
      ylabel: what it is, with its unit.
      spread: its standard deviation, drawn as bars on each head's dot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with a dot for each head and a line through their mean.
    """
    num_layers, num_heads = values.shape
    layers = np.arange(num_layers) if layer_names is None else np.array(layer_names)
    offset = np.linspace(-0.25, 0.25, num_heads) if num_heads > 1 else np.zeros(1)
    with style():
        figure = ShownFigure(figsize=(width, 0.55 * width), layout="constrained")
        panel = figure.subplots()
        panel.plot(layers, values.mean(1), color="0.3", zorder=1)
        for head, look in zip(range(num_heads), looks(), strict=False):
            panel.errorbar(
                layers + offset[head],
                values[:, head],
                None if spread is None else spread[:, head],
                fmt="o",
                color=look["color"],
                mfc=look["color"] if head < len(COLORS) else "white",
                ms=2.5,
                elinewidth=0.5,
                label=str(head),
            )
        _layer_axis(panel, ylabel)
    return figure


def areas_over_depth(panel: Axes, areas: Float[np.ndarray, "L B H P"]) -> None:
    """Draws each head's median area, over where all heads lie, by layer."""
    percent = 100 * areas
    layers = np.arange(len(areas))
    flat = percent.reshape(len(areas), -1)
    for low, high, gray in ((5, 95, "0.88"), (25, 75, "0.76")):
        panel.fill_between(
            layers, *np.percentile(flat, (low, high), axis=1), color=gray, lw=0
        )
    for head, (median, look) in enumerate(
        zip(np.median(percent, axis=(1, 3)).T, looks(), strict=False)
    ):
        panel.plot(layers, median, marker=".", **look, label=str(head))
    panel.set_ylim(bottom=0)
    panel.set_title("heads' medians; the middle 50 % and 90 % of all fields")
    _layer_axis(panel, "field area (%)")


def _layer_axis(panel, ylabel):
    panel.set_xlabel("layer")
    panel.set_ylabel(ylabel)
    panel.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    heads = len(panel.get_legend_handles_labels()[1])
    if heads == 1:
        return
    panel.legend(
        title="head",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        ncols=1 + heads // 9,
        columnspacing=0.8,
    )
