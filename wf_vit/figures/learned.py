"""The fields that a window-free transformer learned."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.figures import panels as draw
from wf_vit.figures.curves import areas_over_depth
from wf_vit.figures.style import COLUMN, looks, style

# Rows and columns at most: what is readable in a column of a paper.
_IMAGES, _LAYERS = 3, 5


def learned_fields(
    images: UInt8[np.ndarray, "_ height width 3"],
    extents: Float[np.ndarray, "L B H P 4"],
    grid: geometry.Grid,
    *,
    softness: float = 0.5,
    patches: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws a window-free transformer's learned fields over real images.

    One row an image, the first three; one column a layer, at most five: the fields of
    one patch, a box for each head where the border's membership is one half, over the
    image lit by the mean membership over heads (so the soft border shows). Below, how
    the share of the grid that a field covers is distributed over images and patches,
    layer by layer.

    Args:
      images: what the fields were predicted from.
      extents: to the left, top, right and bottom of every patch, in patches.
      grid: ``(GH, GW)``.
      softness: of the fields' border, in patches.
      patches: the patch to show in each image; by default the most telling one
        (``telling_patches``).
      width: of the figure, in inches.

    Returns:
      A figure with a panel for each image and layer, and one of areas.

    Raises:
      UsageError: the extents do not fit the images or the grid.
    """
    draw.check_patches(extents.shape[3], grid)
    if len(images) != extents.shape[1]:
        raise UsageError(
            f"{len(images)} images were given with extents of {extents.shape[1]}: "
            "pass the images that the extents [L, B, H, P, 4] were predicted from."
        )
    layers = draw.spread(len(extents), _LAYERS)
    shown = images[:_IMAGES]
    if patches is None:
        patches = [draw.telling_patches(image, grid)[0] for image in shown]
    with style():
        figure, panels, foot = draw.photo_grid(
            len(shown), layers, grid, width, footer=0.43 * width
        )
        for b, (image, patch) in enumerate(zip(shown, patches, strict=True)):
            for panel, layer in zip(panels[b], layers, strict=True):
                own = extents[layer, b, :, patch]
                _lit_fields(panel, image, own, patch, grid, softness)
        panel = draw.footer_axes(figure, foot)
        areas_over_depth(panel, learned_areas(extents, grid, softness))
    return figure


def learned_beside_measured(
    image: draw.Photograph,
    learned: Float[np.ndarray, "L H P 4"],
    measured: Float[np.ndarray, "L H P 4"],
    grid: geometry.Grid,
    *,
    softness: float = 0.5,
    patch: int | None = None,
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws the fields that a window-free transformer learned and those it uses.

    Args:
      image: the photograph.
      learned: extents of the learned fields to the left, top, right and bottom, in
        patches.
      measured: extents of the heads' responsive fields.
      grid: ``(GH, GW)``.
      softness: of the learned fields' border, in patches.
      patch: whose fields; by default the most telling one.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with learned fields in the upper row and measured ones in the lower
      one, a box for each head.

    Raises:
      UsageError: the fields do not fit the grid.
    """
    draw.check_patches(learned.shape[2], grid)
    patch = int(draw.telling_patches(image, grid)[0]) if patch is None else patch
    layers = draw.spread(len(learned), draw.LAYERS)
    position = geometry.coordinates(grid)[patch]
    with style():
        labels = ("learned", "measured")
        figure, panels, _ = draw.photo_grid(
            2, layers, grid, width, labels, layer_names=layer_names
        )
        for (upper, lower), layer in zip(panels.T, layers, strict=True):
            own = learned[layer, :, patch]
            _lit_fields(upper, image, own, patch, grid, softness)
            draw.photograph(lower, image, grid)
            for look, own in zip(looks(), measured[layer, :, patch], strict=False):
                draw.box(lower, position, own, grid, look)
            draw.mark(lower, position)
    return figure


def learned_areas(
    extents: Float[np.ndarray, "*batch P 4"], grid: geometry.Grid, softness: float
) -> Float[np.ndarray, "*batch P"]:
    """Returns the mean membership over keys: the share of the grid attended to."""
    rows, columns = _profiles(extents, geometry.coordinates(grid), grid, softness)
    return rows.mean(-1) * columns.mean(-1)


def _profiles(extents, positions, grid, softness):
    """Returns the membership of every grid row and column, [..., GH] and [..., GW]."""

    def inside(x):
        return 0.5 * (1 + np.tanh(0.5 * x / softness))

    def profile(size, position, before, after):
        offset = np.arange(size) - position[..., None]
        return inside(offset + before[..., None]) * inside(after[..., None] - offset)

    left, top, right, bottom = np.moveaxis(extents, -1, 0)
    x, y = np.moveaxis(positions, -1, 0)
    return profile(grid[0], y, top, bottom), profile(grid[1], x, left, right)


def _lit_fields(panel, image, extents, patch, grid, softness):
    """Draws one patch's fields [H, 4]: lit by mean membership, outlined per head."""
    position = geometry.coordinates(grid)[patch]
    rows, columns = _profiles(extents, position[None], grid, softness)
    draw.photograph(panel, image, grid)
    draw.veil(panel, np.einsum("hy,hx->yx", rows, columns) / len(extents), grid)
    for look, own in zip(looks(), extents, strict=False):
        draw.box(panel, position, own, grid, look)
    draw.mark(panel, position)
