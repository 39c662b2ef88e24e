"""What patches listen to, drawn over the photograph."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from wf_vit import grid as geometry
from wf_vit.fields import Field
from wf_vit.figures import panels as draw
from wf_vit.figures.style import COLUMN, flow_colors, looks, style


def interactions(
    image: draw.Photograph,
    impact: Float[np.ndarray, "L P P"],
    grid: geometry.Grid,
    *,
    patch: int | None = None,
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws what one patch listens to, and who listens to it, over the photograph.

    Both are in units of a uniform row: 1 is what every patch would have if the query
    listened to all alike. The unit makes layers and grids comparable.

    Args:
      image: the photograph.
      impact: of patch j (column) on patch i (row), non-negative.
      grid: ``(GH, GW)``.
      patch: whose interactions; by default the image's most telling one
        (``telling_patches``).
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with a row for each direction and a column for each layer.

    Raises:
      UsageError: the impact does not fit the grid.
    """
    draw.check_patches(impact.shape[-1], grid)
    patch = int(draw.telling_patches(image, grid)[0]) if patch is None else patch
    shares = _normalized(impact) * impact.shape[-1]
    layers = draw.spread(len(shares), draw.LAYERS)
    top = max(shares[layers, patch].max(), shares[layers, :, patch].max(), 10.0)
    norm = LogNorm(0.1, top, clip=True)
    # The photograph shows through, most where there is little to see.
    colors = mpl.colormaps["viridis"](np.linspace(0, 1, 256))
    colors[:, 3] = np.linspace(0.3, 0.95, 256)
    cmap = ListedColormap(colors)
    with style():
        labels = ("listens to", "is heard by")
        figure, panels, foot = draw.photo_grid(
            2, layers, grid, width, labels, footer=0.42, layer_names=layer_names
        )
        for column, layer in zip(panels.T, layers, strict=True):
            for panel, values in zip(
                column, (shares[layer, patch], shares[layer, :, patch]), strict=True
            ):
                draw.heat(panel, image, values, grid, norm, cmap)
                draw.mark(panel, geometry.coordinates(grid)[patch])
        bar = draw.color_bar(figure, foot, norm, cmap, "impact (uniform = 1)")
        bar.set_ticks([0.1, 1, 10], labels=["≤ 0.1", "1", "10"])
    return figure


def _normalized(impact):
    """Returns rows that sum to 1; a row of zeros stays so."""
    total = impact.sum(-1, keepdims=True)
    return impact / np.where(total > 0, total, 1)


def responsive_fields(
    image: draw.Photograph,
    field: Field,
    grid: geometry.Grid,
    *,
    patches: Sequence[int] | None = None,
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws the responsive fields of some patches, as boxes and as ellipses.

    Args:
      image: the photograph.
      field: the fields, fused over heads, ``[L, P, ...]``. The axes of an ellipse
        are two standard deviations: the rim of a disc that is listened to evenly.
      grid: ``(GH, GW)``.
      patches: which to show; by default the three most telling ones.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with boxes in the upper row and ellipses, with the arrow from patch to
      centroid, in the lower one.

    Raises:
      UsageError: the fields do not fit the grid.
    """
    extents, displacement, covariance = map(
        np.asarray, (field.extents, field.displacement, field.covariance)
    )
    draw.check_patches(extents.shape[1], grid)
    patches = draw.telling_patches(image, grid, 3) if patches is None else patches
    position = geometry.coordinates(grid)
    layers = draw.spread(len(extents), draw.LAYERS)
    with style():
        labels = ("boxes", "ellipses")
        figure, panels, _ = draw.photo_grid(
            2, layers, grid, width, labels, layer_names=layer_names
        )
        for (upper, lower), layer in zip(panels.T, layers, strict=True):
            for panel in (upper, lower):
                draw.photograph(panel, image, grid, gray=True)
            for look, p in zip(looks(), patches, strict=False):
                draw.box(upper, position[p], extents[layer, p], grid, look)
                draw.mark(upper, position[p], look["color"])
                centre = position[p] + displacement[layer, p]
                draw.ellipse(lower, centre, covariance[layer, p], look)
                draw.mark(lower, position[p], look["color"])
                arrow = displacement[layer, p][None]
                draw.arrows(lower, position[p][None], arrow, look["color"])
    return figure


def tendency(
    image: draw.Photograph,
    displacement: Float[np.ndarray, "L P 2"],
    grid: geometry.Grid,
    *,
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws where the fields of all patches tend to, as arrows and as flow.

    Arrows are drawn shorter than true, all by the factor that the figure names, and
    for every other patch (or fewer) where the grid is too fine for them.

    Args:
      image: the photograph.
      displacement: from each patch to the centroid of its field, in patches.
      grid: ``(GH, GW)``.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with arrows in the upper row, ``flow_colors`` in the lower one, and the
      wheel that explains the colours.

    Raises:
      UsageError: the displacements do not fit the grid.
    """
    draw.check_patches(displacement.shape[1], grid)
    layers = draw.spread(len(displacement), draw.LAYERS)
    rim = max(float(np.quantile(np.linalg.norm(displacement, axis=-1), 0.98)), 1e-6)
    stride = -(-max(grid) // 12)
    factor = min(1.0, 1.4 * stride / rim)
    position = geometry.coordinates(grid)
    kept = np.all(position.astype(int) % stride == stride // 2, axis=-1)
    with style():
        labels = ("arrows", "flow")
        figure, panels, foot = draw.photo_grid(
            2, layers, grid, width, labels, footer=0.5, layer_names=layer_names
        )
        for (upper, lower), layer in zip(panels.T, layers, strict=True):
            draw.photograph(upper, image, grid, gray=True)
            draw.arrows(upper, position[kept], factor * displacement[layer, kept])
            flow = flow_colors(displacement[layer] / rim).reshape(*grid, 3)
            draw.photograph(lower, flow, grid)
        draw.wheel(
            figure, foot, f"rim: {rim:.2g} patches\narrows: {factor:.2g} of true length"
        )
    return figure


def indiscriminative(
    image: draw.Photograph,
    discriminability: Float[np.ndarray, "L P"],
    grid: geometry.Grid,
    *,
    share: float = 0.5,
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Marks the patches whose influence depends least on who is asking.

    Args:
      image: the photograph.
      discriminability: of every patch; each layer is shown relative to its mean.
      grid: ``(GH, GW)``.
      share: of the patches that are marked, lowest discriminability first.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with the marked patches struck out over the photograph, and below it
      the discriminability itself.

    Raises:
      UsageError: the values do not fit the grid.
    """
    draw.check_patches(discriminability.shape[1], grid)
    layers = draw.spread(len(discriminability), draw.LAYERS)
    count = round(share * discriminability.shape[1])
    norm = LogNorm(0.25, 4, clip=True)
    with style():
        labels = (f"lowest {100 * share:.0f} %", "measured")
        figure, panels, foot = draw.photo_grid(
            2, layers, grid, width, labels, footer=0.42, layer_names=layer_names
        )
        for (upper, lower), layer in zip(panels.T, layers, strict=True):
            values = discriminability[layer]
            marked = np.argsort(values, kind="stable")[:count]
            light = np.ones(len(values))
            light[marked] = 0
            draw.photograph(upper, image, grid)
            draw.veil(upper, light, grid)
            draw.strike_out(upper, geometry.coordinates(grid)[marked])
            shares = values / values.mean()
            draw.heat(lower, image, shares, grid, norm, "cividis", alpha=0.8)
        label = "discriminability (layer mean = 1)"
        bar = draw.color_bar(figure, foot, norm, "cividis", label)
        bar.set_ticks([0.25, 1, 4], labels=["≤ ¼", "1", "≥ 4"])
    return figure
