"""Responsive fields over the photograph: their masks, their size, their tendency."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from wf_vit import grid as geometry
from wf_vit.fields import Field
from wf_vit.figures import choice, layout, scales
from wf_vit.figures import panels as draw
from wf_vit.figures.style import COLUMN, style

# Colours between two patches of the flow, so that it is smooth at any size.
_FINER = 8
# Arrows shorter than that, in patches, are not drawn at full length.
_LEAST_LENGTH = 1e-3


def responsive_fields(
    image: draw.Photograph,
    field: Field,
    grid: geometry.Grid,
    *,
    patches: choice.Patches | None = None,
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Outlines the responsive fields of some patches on the photograph.

    A field is the smallest set of patches that holds its mass (``Field.mask``),
    outlined along the patches' edges; what is outside is darker. The arrow is the
    field's excess: where it tends to beyond what geometry alone gives, longer or
    shorter than true by the factor that the figure names.

    Args:
      image: the photograph.
      field: the fields, fused over heads, ``[L, P, ...]``.
      grid: ``(GH, GW)``.
      patches: which to show; by default three that are well apart and are part of the
        fields of some but not of others (``telling_patches`` of the masks).
      source: model and indicator, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with a row for each patch and a column for each layer.

    Raises:
      UsageError: the fields do not fit the grid.
    """
    image = draw.check_photograph(image)
    mask = choice.shaped("field.mask", field.mask, "L P P", grid)
    excess = choice.shaped("field.excess", field.excess, "L P 2", grid, L=len(mask))
    if patches is None:
        count = min(3, mask.shape[-1])
        patches = choice.most_discriminative(mask, grid, count)
    patches = [choice.check_patch(patch, grid) for patch in patches]
    position = geometry.coordinates(grid)
    layers = choice.spread(len(mask), choice.LAYERS)
    titles = choice.layer_titles(layers, len(mask), layer_names)
    rows = [_place(patch, grid) for patch in patches]
    drawn = excess[np.ix_(layers, patches)]
    factor, _ = _arrow_factor(drawn, max(grid) / 6)
    note = f"White: field. Arrow: tendency beyond geometry, {factor:g} times as long."
    with style():
        figure, (panels,), _ = layout.lay_out(
            [layout.Block(titles, rows)], grid, width, note=note, source=source
        )
        for row, patch in zip(panels, patches, strict=True):
            for panel, layer in zip(row, layers, strict=True):
                own = mask[layer, patch]
                draw.photograph(panel, image, grid)
                draw.dim(panel, own, grid, 0.4)
                draw.outline(panel, own, grid)
                draw.mark(panel, position[patch])
                arrow = factor * excess[layer, [patch]]
                draw.arrows(
                    panel, position[[patch]], arrow, width=0.025, color="#FFC400"
                )
    return figure


def _arrow_factor(excess, length):
    """Returns by what to draw arrows so that most are shorter than ``length``.

    And how long those are that are not quite the longest: one in ten is longer.
    """
    lengths = np.linalg.norm(excess, axis=-1)
    rim = float(np.quantile(lengths, 0.9)) or float(lengths.max())
    # What is shorter may be rounding, and must not look like a tendency.
    rim = max(rim, _LEAST_LENGTH)
    return float(f"{length / rim:.2g}"), rim


def _place(patch, grid):
    row, column = divmod(patch, grid[1])
    return f"patch {row},\N{NO-BREAK SPACE}{column}"


def field_size(
    image: draw.Photograph,
    area: Float[Any, "L P"],
    grid: geometry.Grid,
    *,
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws how large the field of every patch is, over the photograph.

    Args:
      image: the photograph.
      area: of each patch's field, as a share of the grid (``Field.area``).
      grid: ``(GH, GW)``.
      source: model and indicator, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with a panel for each layer and one legend, linear between the sizes
      that all but the smallest and the largest few have.

    Raises:
      UsageError: the areas do not fit the grid.
    """
    image = draw.check_photograph(image)
    percent = 100 * choice.shaped("area", area, "L P", grid)
    layers = choice.spread(len(percent), choice.LAYERS)
    titles = choice.layer_titles(layers, len(percent), layer_names)
    legend = scales.linear(percent[layers], "size of the field (% of the picture)")
    with style():
        figure, (panels,), foot = layout.lay_out(
            [layout.Block(titles)], grid, width, source=source, footer=layout.BARS
        )
        for panel, layer in zip(panels[0], layers, strict=True):
            draw.photograph(panel, image, grid)
            draw.amounts(panel, percent[layer], grid, legend)
        layout.legend_bars(figure, foot, [legend])
    return figure


def tendency(
    image: draw.Photograph,
    excess: Float[Any, "L P 2"],
    grid: geometry.Grid,
    *,
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws where the fields of all patches tend to beyond geometry, and its flow.

    Arrows are all drawn longer or shorter by the factor that the legend names, and for
    every other patch (or fewer) where the grid is too fine for them. The flow has the
    same arrows as colours over the photograph's luminance, smoothly between the
    patches: the hue is the direction (``flow_colors``), the opacity the length.

    Args:
      image: the photograph.
      excess: of each patch, in patches (``Field.excess``).
      grid: ``(GH, GW)``.
      source: model and indicator, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with arrows in the upper row, flow in the lower one, and the wheel that
      explains its colours.

    Raises:
      UsageError: the arrows do not fit the grid.
    """
    image = draw.check_photograph(image)
    excess = choice.shaped("excess", excess, "L P 2", grid)
    layers = choice.spread(len(excess), choice.LAYERS)
    titles = choice.layer_titles(layers, len(excess), layer_names)
    stride = -(-max(grid) // 12)
    factor, rim = _arrow_factor(excess[layers], 1.2 * stride)
    position = geometry.coordinates(grid)
    kept = np.all(position.astype(int) % stride == stride // 2, axis=-1)
    with style():
        figure, (panels,), foot = layout.lay_out(
            [layout.Block(titles, ("arrows", "flow"))],
            grid,
            width,
            source=source,
            footer=layout.WHEEL,
        )
        for (upper, lower), layer in zip(panels.T, layers, strict=True):
            draw.photograph(upper, image, grid)
            draw.dim(upper, np.zeros(len(position)), grid, 0.25)
            draw.arrows(upper, position[kept], factor * excess[layer, kept])
            smooth = _finer(excess[layer].reshape(*grid, 2) / rim, _FINER)
            draw.flow(lower, image, smooth, grid)
        layout.wheel(
            figure,
            foot,
            "where fields tend to beyond geometry (excess)\n"
            f"rim of the wheel: {rim:.2g} patches\n"
            f"arrows: {factor:g} times their true length",
        )
    return figure


def _finer(values, times):
    """Returns a picture [GH, GW, C] with ``times`` as many rows and columns.

    Linear between the centres of the patches, constant beyond the outermost.
    """
    for axis in (0, 1):
        size = values.shape[axis]
        at = np.clip((np.arange(times * size) + 0.5) / times - 0.5, 0, size - 1)
        low = np.minimum(at.astype(int), max(size - 2, 0))
        weight = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, size - 1)
        values = (1 - weight) * values.take(low, axis) + weight * values.take(
            high, axis
        )
    return values
