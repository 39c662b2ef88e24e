"""The fields that a window-free transformer learned."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.fields import Field
from wf_vit.figures import choice, layout
from wf_vit.figures import panels as draw
from wf_vit.figures.curves import areas_over_depth
from wf_vit.figures.style import COLUMN, looks, style

# Rows and columns at most: what is readable in a column of a paper.
_IMAGES, _LAYERS = 3, 5


def learned_fields(
    images: UInt8[Any, "_ height width 3"],
    extents: Float[Any, "L B H P 4"],
    grid: geometry.Grid,
    *,
    softness: float = 0.5,
    patches: choice.Patches | None = None,
    source: str = "",
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
      patches: the patch to show in each image; by default the one whose learned
        fields differ most in size from the image's mean, over layers and heads.
      source: the model, drawn once at the foot.
      width: of the figure, in inches.

    Returns:
      A figure with a panel for each image and layer, and one of areas.

    Raises:
      UsageError: the extents do not fit the images or the grid.
    """
    extents = choice.shaped("extents", extents, "L B H P 4", grid)
    images = [draw.check_photograph(image) for image in images]
    if len(images) != extents.shape[1]:
        raise UsageError(
            f"{len(images)} images were given with extents of {extents.shape[1]}: "
            "pass the images that the extents [L, B, H, P, 4] were predicted from."
        )
    layers = choice.spread(len(extents), _LAYERS)
    titles = choice.layer_titles(layers, len(extents), None)
    shown = images[:_IMAGES]
    if patches is None:
        patches = [
            choice.telling_patches(_unlike_the_mean(extents[:, b]), grid)[0]
            for b in range(len(shown))
        ]
    if len(patches) != len(shown):
        raise UsageError(
            f"{len(patches)} patches were given for {len(shown)} images that are "
            "drawn: pass one patch for each."
        )
    patches = [choice.check_patch(patch, grid) for patch in patches]
    with style():
        figure, (panels,), foot = layout.lay_out(
            [layout.Block(titles, [""] * len(shown))],
            grid,
            width,
            source=source,
            footer=0.43 * width,
        )
        for b, (image, patch) in enumerate(zip(shown, patches, strict=True)):
            for panel, layer in zip(panels[b], layers, strict=True):
                own = extents[layer, b, :, patch]
                _lit_fields(panel, image, own, patch, grid, softness)
        panel = layout.footer_axes(figure, foot)
        areas_over_depth(panel, learned_areas(extents, grid, softness))
    return figure


def learned_beside_measured(
    image: draw.Photograph,
    learned: Float[Any, "L H P 4"],
    measured: Field,
    grid: geometry.Grid,
    *,
    softness: float = 0.5,
    patch: SupportsIndex | None = None,
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws the fields that a window-free transformer learned and those it uses.

    A learned field is a box. A measured one is the smallest set of patches that holds
    its mass (``Field.mask``); the line is around the patches that at least half of the
    heads hold. Both are lit by the mean over heads.

    Args:
      image: the photograph.
      learned: extents of the learned fields to the left, top, right and bottom, in
        patches.
      measured: the heads' responsive fields, ``[L, H, P, ...]``.
      grid: ``(GH, GW)``.
      softness: of the learned fields' border, in patches.
      patch: whose fields; by default the one that is part of the measured fields of
        some but not of others (``telling_patches`` of the masks).
      source: model and indicator, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with learned fields in the upper row and measured ones in the lower
      one; learned fields have a colour for each head.

    Raises:
      UsageError: the fields do not fit the grid or each other.
    """
    image = draw.check_photograph(image)
    learned = choice.shaped("learned", learned, "L H P 4", grid)
    sizes = dict(zip("LH", learned.shape, strict=False))
    mask = choice.shaped("measured.mask", measured.mask, "L H P P", grid, **sizes)
    if patch is None:
        patch = choice.most_discriminative(mask, grid)[0]
    patch = choice.check_patch(patch, grid)
    layers = choice.spread(len(learned), choice.LAYERS)
    titles = choice.layer_titles(layers, len(learned), layer_names)
    with style():
        figure, (panels,), _ = layout.lay_out(
            [layout.Block(titles, ("learned", "measured"))],
            grid,
            width,
            note="Boxes: one for each head. White line: held by half of the heads.",
            source=source,
        )
        for (upper, lower), layer in zip(panels.T, layers, strict=True):
            own = learned[layer, :, patch]
            _lit_fields(upper, image, own, patch, grid, softness)
            held = mask[layer, :, patch].mean(0)
            draw.photograph(lower, image, grid)
            draw.dim(lower, held, grid)
            draw.outline(lower, held >= 0.5, grid)
            draw.mark(lower, geometry.coordinates(grid)[patch])
    return figure


def _unlike_the_mean(extents):
    """Returns how far widths and heights of fields [L, H, P, 4] are from their mean.

    Not the extents, whose two sides differ near the border of any picture.
    """
    sizes = extents[..., :2] + extents[..., 2:]
    return np.abs(sizes - sizes.mean(2, keepdims=True)).mean((0, 1, 3))


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
    draw.dim(panel, np.einsum("hy,hx->yx", rows, columns) / len(extents), grid)
    for look, own in zip(looks(), extents, strict=False):
        draw.box(panel, position, own, grid, look)
    draw.mark(panel, position)
