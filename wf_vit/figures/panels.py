"""Panels over a photograph: layout, and what is drawn on them."""

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle

from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.figures.style import COLORS, flow_colors

# Layers at most that are shown beside each other, unless a figure says otherwise.
LAYERS = 4

Photograph = UInt8[np.ndarray, "height width 3"]


def telling_patches(
    image: Photograph, grid: geometry.Grid, count: int = 1
) -> Int[np.ndarray, " count"]:
    """Returns patches that tell much about an image, well apart from each other.

    A patch tells more the farther its brightness is from the image's median, the more
    brightness varies around it, the farther it is from the patches before it, and when
    it is not on the rim, where a field has only one side to grow to.
    """
    gray = image.astype(np.float32).mean(-1)
    gray -= np.median(gray)
    rows, columns = (
        np.arange(size) * cells // size
        for size, cells in zip(gray.shape, grid, strict=True)
    )
    cell = (rows[:, None] * grid[1] + columns).ravel()
    pixels, first, second = (
        np.bincount(cell, weights, minlength=grid[0] * grid[1])
        for weights in (None, gray.ravel(), np.square(gray.ravel()))
    )
    distance = geometry.distances(grid)
    near = distance < 1.5
    variance = near @ second / (near @ pixels) - (near @ first / (near @ pixels)) ** 2
    position = geometry.coordinates(grid)
    rim = np.min([position, np.array(grid[::-1]) - 1 - position], axis=(0, 2)) < 1
    score = np.sqrt(second / pixels * np.maximum(variance, 0)) + 1e-6
    score *= np.where(rim, 0.5, 1.0)
    chosen = []
    for _ in range(count):
        chosen.append(int(np.argmax(score)))
        score = score * np.minimum(distance[chosen[-1]] / max(grid), 1)
    return np.array(chosen)


def check_patches(num_patches, grid):
    """Raises UsageError unless the grid has that many patches."""
    if grid[0] * grid[1] != num_patches:
        raise UsageError(
            f"grid {tuple(grid)} has {grid[0] * grid[1]} patches, but the arrays have "
            f"{num_patches}: pass the grid as (rows, columns), and arrays without "
            "prefix tokens."
        )


def spread(count: int, at_most: int) -> list[int]:
    """Returns evenly spread indices, the first and the last included."""
    return np.linspace(0, count - 1, min(count, at_most)).round().astype(int).tolist()


def photo_grid(
    num_rows, layers, grid, width, labels=None, *, footer=0.0, layer_names=None
):
    """Lays out photographs, a column for each layer, without gaps to speak of.

    Sizes are in inches, since a layout engine cannot fit panels of fixed aspect to a
    fixed width exactly. Layers are called by ``layer_names``, or by their index.

    Returns:
      The figure, its panels [num_rows, len(layers)] and the footer's rectangle.
    """
    gap, title = 0.04, 0.15
    margin = 0.13 if labels else 0.02
    side = (width - margin - 0.02 - gap * (len(layers) - 1)) / len(layers)
    tall = side * grid[0] / grid[1]
    height = title + num_rows * (tall + gap) + footer
    figure = Figure(figsize=(width, height))
    panels = np.empty((num_rows, len(layers)), object)
    for row, column in np.ndindex(panels.shape):
        left = margin + column * (side + gap)
        bottom = height - title - (row + 1) * tall - row * gap
        panel = figure.add_axes(
            (left / width, bottom / height, side / width, tall / height)
        )
        panel.set(xticks=[], yticks=[])
        panel.grid(False)
        panel.spines[:].set_visible(False)
        panels[row, column] = panel
    for panel, layer in zip(panels[0], layers, strict=True):
        panel.set_title(f"layer {layer if layer_names is None else layer_names[layer]}")
    for panel, label in zip(panels[:, 0], labels or (), strict=False):
        panel.set_ylabel(label, labelpad=2)
    return figure, panels, (margin / width, 0.0, 1 - margin / width, footer / height)


def footer_axes(figure, foot):
    """Returns axes in the footer, with room for labels and for a legend."""
    width, height = figure.get_size_inches()
    left, bottom, right = 0.43 / width, 0.32 / height, 0.75 / width
    return figure.add_axes(
        (left, bottom, 1 - left - right, foot[3] - bottom - 0.18 / height)
    )


def color_bar(figure, foot, norm, cmap, label):
    """Draws a colour bar in the footer."""
    height = figure.get_figheight()
    axes = figure.add_axes(
        (foot[0] + 0.25 * foot[2], 0.27 / height, 0.5 * foot[2], 0.07 / height)
    )
    bar = figure.colorbar(ScalarMappable(norm, cmap), axes, orientation="horizontal")
    bar.set_label(label, labelpad=1)
    bar.ax.minorticks_off()
    return bar


def wheel(figure, foot, text):
    """Draws the legend of ``flow_colors``: a disc of all displacements up to 1."""
    width, height = figure.get_size_inches()
    size = 0.42
    axes = figure.add_axes(
        (foot[0] + 0.33 * foot[2], 0.04 / height, size / width, size / height)
    )
    y, x = np.mgrid[-1:1:101j, -1:1:101j]
    inside = np.hypot(x, y) <= 1
    disc = np.dstack([flow_colors(np.dstack([x, y])), inside])
    axes.imshow(disc, extent=(-1, 1, 1, -1), interpolation="bilinear")
    axes.axis("off")
    axes.text(1.3, 0, text, va="center", fontsize=6)


def photograph(panel, image, grid, *, gray=False):
    """Draws a photograph in patch coordinates; gray and pale as a background."""
    if gray:
        luminance = image.mean(-1, keepdims=True)
        image = np.repeat(110 + 0.5 * luminance, 3, axis=-1).astype(np.uint8)
    panel.imshow(image, extent=_frame(grid), interpolation="nearest")
    panel.set(xlim=(-0.5, grid[1] - 0.5), ylim=(grid[0] - 0.5, -0.5))


def _frame(grid):
    return (-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5)


def heat(panel, image, values, grid, norm, cmap, alpha=None):
    """Lays amounts [P] over a pale photograph; opaque unless the colours are not."""
    photograph(panel, image, grid, gray=True)
    panel.imshow(
        values.reshape(grid),
        extent=_frame(grid),
        interpolation="nearest",
        norm=norm,
        cmap=cmap,
        alpha=alpha,
    )


def veil(panel, light, grid):
    """Fogs a photograph where ``light`` [P] is low; 1 leaves it as it is."""
    fog = np.full((*grid, 4), 0.35)
    fog[..., 3] = 0.75 * (1 - light.reshape(grid))
    panel.imshow(fog, extent=_frame(grid), interpolation="nearest")


def box(panel, position, extents, grid, look):
    """Outlines a field, cut at the frame so that every side stays visible."""
    low = np.maximum(position - extents[:2], -0.5)
    high = np.minimum(position + extents[2:], (grid[1] - 0.5, grid[0] - 0.5))
    panel.add_patch(Rectangle(low, *(high - low), fill=False, lw=0.8, **look))


def ellipse(panel, centre, covariance, look):
    """Outlines the covariance [2, 2] of a field, two standard deviations wide."""
    variances, axes = np.linalg.eigh(covariance)
    across, along = 4 * np.sqrt(np.maximum(variances, 0))
    angle = np.degrees(np.arctan2(axes[1, 1], axes[0, 1]))
    panel.add_patch(
        Ellipse(centre, along, across, angle=angle, fill=False, lw=0.8, **look)
    )


def arrows(panel, position, displacement, color=COLORS[0]):
    """Draws arrows [A, 2] from positions [A, 2], both in patches."""
    panel.quiver(
        *position.T,
        *displacement.T,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.012,
        headwidth=3.5,
        headlength=4,
        headaxislength=3.5,
        color=color,
    )


def strike_out(panel, position):
    """Crosses out the patches at positions [A, 2]."""
    points = 72 * panel.bbox.width / panel.figure.dpi
    size = 0.5 * points / np.ptp(panel.get_xlim())
    panel.plot(*position.T, ls="", marker="x", ms=size, mew=0.2 * size, color="white")


def mark(panel, position, color="white"):
    """Marks the patch that is shown, visible on any background."""
    panel.plot(*position, marker="o", mfc=color, mec="black", mew=0.5, ms=2.5)
