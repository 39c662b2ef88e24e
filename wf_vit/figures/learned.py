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
from wf_vit.grid import HALF

# Rows and columns at most: what is readable in a column of a paper.
_IMAGES, _LAYERS = 3, 5


def learned_fields(
    images: UInt8[Any, "_ height width 3"],
    gaussians: Float[Any, "L B H P 4"],
    grid: geometry.Grid,
    *,
    patches: choice.Patches | None = None,
    source: str = "",
    width: float = COLUMN,
) -> Figure:
    """Draws a window-free transformer's learned fields over real images.

    One row an image, the first three; one column a layer, at most five: the fields of
    one patch, an ellipse for each head where its membership is one half, with an arrow
    to its centre, over the image lit by the mean membership over heads. Below, how the
    share of the grid that a field covers is distributed over images and patches, layer
    by layer.

    Args:
      images: what the fields were predicted from.
      gaussians: centre ``(x, y)`` of the fields relative to their patch and widths in x
        and y, in patches.
      grid: ``(GH, GW)``.
      patches: the patch to show in each image; by default the one whose learned
        fields differ most from the image's mean, over layers and heads.
      source: the model, drawn once at the foot.
      width: of the figure, in inches.

    Returns:
      A figure with a panel for each image and layer, and one of areas.

    Raises:
      UsageError: the fields do not fit the images or the grid.
    """
    gaussians = choice.shaped("gaussians", gaussians, "L B H P 4", grid)
    images = [draw.check_photograph(image) for image in images]
    if len(images) != gaussians.shape[1]:
        raise UsageError(
            f"{len(images)} images were given with fields of {gaussians.shape[1]}: "
            "pass the images that the fields [L, B, H, P, 4] were predicted from."
        )
    layers = choice.spread(len(gaussians), _LAYERS)
    titles = choice.layer_titles(layers, len(gaussians), None)
    shown = images[:_IMAGES]
    if patches is None:
        patches = [
            choice.telling_patches(_unlike_the_mean(gaussians[:, b]), grid)[0]
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
                _lit_fields(panel, image, gaussians[layer, b, :, patch], patch, grid)
        panel = layout.footer_axes(figure, foot)
        areas_over_depth(panel, learned_areas(gaussians, grid))
    return figure


def learned_beside_measured(
    image: draw.Photograph,
    learned: Float[Any, "L H P 4"],
    measured: Field,
    grid: geometry.Grid,
    *,
    patch: SupportsIndex | None = None,
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws the fields that a window-free transformer learned and those it uses.

    A learned field is a Gaussian, drawn where its membership is one half. A measured
    one is the smallest set of patches that holds its mass (``Field.mask``); the line is
    around the patches that at least half of the heads hold. Both are lit by the mean
    over heads.

    Args:
      image: the photograph.
      learned: centre ``(x, y)`` of the learned fields relative to their patch and
        widths in x and y, in patches.
      measured: the heads' responsive fields, ``[L, H, P, ...]``.
      grid: ``(GH, GW)``.
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
            note="Ellipses: one for each head. White line: held by half of the heads.",
            source=source,
        )
        for (upper, lower), layer in zip(panels.T, layers, strict=True):
            _lit_fields(upper, image, learned[layer, :, patch], patch, grid)
            held = mask[layer, :, patch].mean(0)
            draw.photograph(lower, image, grid)
            draw.dim(lower, held, grid)
            draw.outline(lower, held >= 0.5, grid)
            draw.mark(lower, geometry.coordinates(grid)[patch])
    return figure


def _unlike_the_mean(gaussians):
    """Returns how far the fields [L, H, P, 4] of each patch are from their mean.

    The logs of the widths and the centre in widths: fields of all sizes count alike.
    """
    widths = gaussians[..., 2:]
    numbers = np.concatenate([gaussians[..., :2] / widths, np.log(widths)], -1)
    return np.abs(numbers - numbers.mean(2, keepdims=True)).mean((0, 1, 3))


def learned_areas(
    gaussians: Float[np.ndarray, "*batch P 4"], grid: geometry.Grid
) -> Float[np.ndarray, "*batch P"]:
    """Returns the mean membership over keys: the share of the grid attended to."""
    rows, columns = _profiles(gaussians, geometry.coordinates(grid), grid)
    return rows.mean(-1) * columns.mean(-1)


def _profiles(gaussians, positions, grid):
    """Returns the membership of every grid row and column, [..., GH] and [..., GW]."""

    def profile(size, axis):
        centre = positions[..., axis] + gaussians[..., axis]
        apart = np.arange(size) - centre[..., None]
        return np.exp(-0.5 * np.square(apart / gaussians[..., 2 + axis, None]))

    return profile(grid[0], 1), profile(grid[1], 0)


def _lit_fields(panel, image, gaussians, patch, grid):
    """Draws one patch's fields [H, 4]: lit by mean membership, outlined per head."""
    position = geometry.coordinates(grid)[patch]
    rows, columns = _profiles(gaussians, position[None], grid)
    draw.photograph(panel, image, grid)
    draw.dim(panel, np.einsum("hy,hx->yx", rows, columns) / len(gaussians), grid)
    for look, own in zip(looks(), gaussians, strict=False):
        draw.ellipse(panel, position + own[:2], HALF * own[2:], grid, look)
        draw.arrows(panel, position[None], own[None, :2], color=look["color"])
    draw.mark(panel, position)
