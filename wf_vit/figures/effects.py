"""What speaks for a class, and what against it."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure

from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.figures import choice, layout, scales
from wf_vit.figures import panels as draw
from wf_vit.figures.style import COLUMN, style


def class_map(
    image: draw.Photograph,
    total: Float[Any, " P"],
    by_layer: Float[Any, "L P"],
    grid: geometry.Grid,
    class_name: str,
    probability: float,
    *,
    unit: str = "added to the logit",
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws what each patch adds to the logit of a class, over the photograph.

    Zero is clear, red speaks for the class and blue against it. All layers together
    and single layers have a scale each.

    Args:
      image: the photograph.
      total: what the interactions of each patch add, summed over layers, signed.
      by_layer: the same in each layer.
      grid: ``(GH, GW)``.
      class_name: the class.
      probability: that the model gives it, from 0 to 1.
      unit: of the values, for the legend.
      source: model and indicator, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with the photograph and all layers together in the upper row, and
      single layers below.

    Raises:
      UsageError: maps that do not fit the grid or are not finite, or a probability
        outside of [0, 1].
    """
    image = draw.check_photograph(image)
    total = choice.shaped("total", total, "P", grid)
    by_layer = choice.shaped("by_layer", by_layer, "L P", grid)
    if not 0 <= probability <= 1:
        raise UsageError(
            f"probability is {probability}, expected a number from 0 to 1: pass the "
            "softmax of the logits."
        )
    layers = choice.spread(len(by_layer), choice.LAYERS)
    titles = choice.layer_titles(layers, len(by_layer), layer_names)
    single = by_layer[layers]
    legends = [
        scales.signed(total, f"all layers: {unit}"),
        scales.signed(single, f"one layer: {unit}"),
    ]
    with style():
        figure, (upper, lower), foot = layout.lay_out(
            [layout.Block(("photograph", "all layers")), layout.Block(titles)],
            grid,
            width,
            title=f"{class_name}, probability {100 * probability:.0f} %",
            source=source,
            footer=layout.BARS,
        )
        draw.photograph(upper[0, 0], image, grid)
        draw.photograph(upper[0, 1], image, grid)
        draw.amounts(upper[0, 1], total, grid, legends[0])
        for panel, values in zip(lower[0], single, strict=True):
            draw.photograph(panel, image, grid)
            draw.amounts(panel, values, grid, legends[1])
        layout.legend_bars(figure, foot, legends)
    return figure
