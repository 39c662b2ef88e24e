"""Interactions of one patch, and the patches that a model can do without."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from wf_vit import grid as geometry
from wf_vit.figures import choice, layout, scales
from wf_vit.figures import panels as draw
from wf_vit.figures.style import COLUMN, style
from wf_vit.interventions import num_kept


def interactions(
    image: draw.Photograph,
    impact: Float[Any, "L P P"],
    grid: geometry.Grid,
    *,
    patch: SupportsIndex | None = None,
    unit: str = "effect",
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws what one patch listens to, and who listens to it, over the photograph.

    Impact is drawn as shares of each listener's row, a colour whose opacity is the
    value. The unit of "listens to" is a uniform row: 1 is what every patch would have
    if the query listened to all alike. The unit of "is heard by" is the mean over the
    other listeners: 1 is a patch that gives the shown one an average share. What is
    below 1 is clear. The own patch, often far above all others, does not stretch the
    scale.

    Where any value is negative, the values are drawn in their own unit, 0 clear,
    blue below and red above it.

    Args:
      image: the photograph.
      impact: of patch j (column) on patch i (row).
      grid: ``(GH, GW)``.
      patch: whose interactions; by default the one whose influence depends most on
        who listens (``telling_patches`` of the shares' discriminability).
      unit: of signed values, for the legend, such as "added to the logit".
      source: model and indicator, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with a row for each direction and a column for each layer.

    Raises:
      UsageError: the impact does not fit the grid or is not finite.
    """
    image = draw.check_photograph(image)
    impact = choice.shaped("impact", impact, "L P P", grid)
    signed = impact.min() < 0
    values = impact if signed else scales.even(impact)
    if patch is None:
        patch = choice.most_discriminative(values, grid)[0]
    patch = choice.check_patch(patch, grid)
    layers = choice.spread(len(values), choice.LAYERS)
    listens, heard = values[layers, patch], values[layers, :, patch]
    others = np.arange(values.shape[-1]) != patch
    if signed:
        both = np.stack([listens, heard])
        legends = [scales.signed(both[..., others], unit)]
        legend_of = legends * 2
    else:
        heard = scales.even(heard, others)
        legends = legend_of = [
            scales.over_mean(listens[:, others], "listens to (uniform = 1)"),
            scales.over_mean(heard[:, others], "is heard by (mean = 1)"),
        ]
    titles = choice.layer_titles(layers, len(values), layer_names)
    with style():
        figure, (panels,), foot = layout.lay_out(
            [layout.Block(titles, ("listens to", "is heard by"))],
            grid,
            width,
            source=source,
            footer=layout.BARS,
        )
        for row, shown, legend in zip(panels, (listens, heard), legend_of, strict=True):
            for panel, of_layer in zip(row, shown, strict=True):
                draw.photograph(panel, image, grid)
                draw.amounts(panel, of_layer, grid, legend)
                draw.mark(panel, geometry.coordinates(grid)[patch])
        layout.legend_bars(figure, foot, legends)
    return figure


def indiscriminative(
    image: draw.Photograph,
    discriminability: Float[Any, "L P"],
    grid: geometry.Grid,
    *,
    share: float = 0.5,
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Darkens the patches whose influence depends least on who is asking.

    Args:
      image: the photograph.
      discriminability: of every patch; each layer is shown relative to its mean.
      grid: ``(GH, GW)``.
      share: of the patches that are darkened, lowest discriminability first.
      source: model and indicator, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with the photograph without these patches and, below it, the
      discriminability itself.

    Raises:
      UsageError: the values do not fit the grid.
    """
    image = draw.check_photograph(image)
    values = choice.shaped("discriminability", discriminability, "L P", grid)
    layers = choice.spread(len(values), choice.LAYERS)
    titles = choice.layer_titles(layers, len(values), layer_names)
    relative = scales.even(values[layers])
    legend = scales.over_mean(relative, "discriminability (layer mean = 1)", least=0.5)
    legend = legend._replace(cmap=scales.DENSE)
    count = round(share * values.shape[1])
    with style():
        figure, (panels,), foot = layout.lay_out(
            [layout.Block(titles, (f"without {100 * share:.0f} %", "measured"))],
            grid,
            width,
            source=source,
            footer=layout.BARS,
        )
        for (upper, lower), of_layer in zip(panels.T, relative, strict=True):
            light = np.ones(len(of_layer))
            light[np.argsort(of_layer, kind="stable")[:count]] = 0
            draw.photograph(upper, image, grid)
            draw.dim(upper, light, grid, 0.85)
            draw.photograph(lower, image, grid)
            draw.amounts(lower, of_layer, grid, legend)
        layout.legend_bars(figure, foot, [legend])
    return figure


def removal(
    image: draw.Photograph,
    order: Int[Any, "S P"],
    cosine: Float[Any, "S shares"],
    grid: geometry.Grid,
    shares: Sequence[float],
    *,
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Darkens the patches that a model does without, and says how well it does.

    Args:
      image: the photograph.
      order: how late each patch is removed before each of some layers, from 1
        (`wf_vit.selection.select_patches`).
      cosine: of what the head reads without them, and in the full model.
      grid: ``(GH, GW)``.
      shares: of the patches that are removed.
      source: the model, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to S - 1.
      width: of the figure, in inches.

    Returns:
      A figure with a row for each share and a column for each layer.

    Raises:
      UsageError: the order or the cosines do not fit.
    """
    image = draw.check_photograph(image)
    order = choice.shaped("order", order, "S P", grid)
    cosine = choice.shaped(
        "cosine", cosine, "S shares", grid, S=len(order), shares=len(shares)
    )
    titles = choice.layer_titles(range(len(order)), len(order), layer_names)
    blocks = [
        layout.Block(
            [
                (f"{title}\n" if row == 0 else "") + f"{of_layer[row]:.3f}"
                for title, of_layer in zip(titles, cosine, strict=True)
            ],
            (f"without {100 * share:.0f} %",),
        )
        for row, share in enumerate(shares)
    ]
    with style():
        figure, rows, _ = layout.lay_out(
            blocks,
            grid,
            width,
            note="Dark: removed before the layer. Above: cosine of what the head reads "
            "with that of the full model.",
            source=source,
        )
        for panels, share in zip(rows, shares, strict=True):
            removed = order.shape[1] - num_kept(share, order.shape[1])
            for panel, of_layer in zip(panels[0], order, strict=True):
                draw.photograph(panel, image, grid)
                draw.dim(panel, (of_layer > removed).astype(float), grid, 0.85)
    return figure
