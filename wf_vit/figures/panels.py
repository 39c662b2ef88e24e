"""What is drawn on a panel, in patch coordinates, over a photograph."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.collections import LineCollection
from matplotlib.patches import Polygon
from matplotlib.patheffects import Normal, Stroke

from wf_vit.arrays import as_array
from wf_vit.errors import UsageError
from wf_vit.figures import scales

Photograph = UInt8[Any, "height width 3"]


def check_photograph(image: Any) -> UInt8[np.ndarray, "height width 3"]:
    """Returns a photograph as a NumPy array; UsageError if it is none."""
    array = np.asarray(as_array(image, "image"))
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise UsageError(
            f"The image has the shape {array.shape} and the type {array.dtype}, "
            "expected [height, width, 3] of uint8: pass the photograph itself, not "
            "what is normalised for the model."
        )
    return array


def _frame(grid):
    return (-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5)


def photograph(panel, image, grid):
    """Draws a photograph in patch coordinates."""
    panel.imshow(image, extent=_frame(grid), interpolation="antialiased")
    panel.set(xlim=(-0.5, grid[1] - 0.5), ylim=(grid[0] - 0.5, -0.5))


def amounts(panel, values, grid, scale):
    """Lays a colour over a photograph whose opacity is the value [P]."""
    panel.imshow(
        values.reshape(grid),
        extent=_frame(grid),
        interpolation="nearest",
        norm=scale.norm,
        cmap=scale.cmap,
    )


def flow(panel, image, displacement, grid):
    """Lays directions [height, width, 2] as colours over a photograph's luminance."""
    luminance = image @ np.array([0.2126, 0.7152, 0.0722]) / 255
    photograph(panel, np.repeat(luminance[..., None], 3, -1), grid)
    panel.imshow(
        scales.flow_layer(displacement), extent=_frame(grid), interpolation="nearest"
    )


def dim(panel, light, grid, most=0.65):
    """Darkens a photograph where ``light`` [P] is low; its largest stays as it is."""
    light = light / max(light.max(), 1e-6)
    shade = np.full((*grid, 4), 0.1)
    shade[..., 3] = most * (1 - light.reshape(grid))
    panel.imshow(shade, extent=_frame(grid), interpolation="nearest")


def outline(panel, mask, grid):
    """Draws the border of a set of patches [P], exactly along the patches' edges."""
    inside = np.pad(mask.reshape(grid), 1)
    y, x = np.nonzero(inside[1:] != inside[:-1])
    across = np.stack([x - 1.5, y - 0.5, x - 0.5, y - 0.5], -1)
    y, x = np.nonzero(inside[:, 1:] != inside[:, :-1])
    down = np.stack([x - 0.5, y - 1.5, x - 0.5, y - 0.5], -1)
    panel.add_collection(
        LineCollection(
            np.concatenate([across, down]).reshape(-1, 2, 2),
            colors="white",
            linewidths=0.8,
            capstyle="projecting",
            # A dark rim, which makes the line visible on light photographs.
            path_effects=[
                Stroke(linewidth=1.5, foreground="black", alpha=0.6),
                Normal(),
            ],
        ),
        autolim=False,
    )


def ellipse(panel, centre, radii, grid, look):
    """Outlines an ellipse, cut at the frame so that every side stays visible."""
    angles = np.linspace(0, 2 * np.pi, 97)
    points = centre + radii * np.stack([np.cos(angles), np.sin(angles)], -1)
    points = points.clip(-0.5, (grid[1] - 0.5, grid[0] - 0.5))
    panel.add_patch(Polygon(points, fill=False, lw=0.9, joinstyle="round", **look))


def arrows(panel, position, displacement, *, width=0.014, color="white"):
    """Draws arrows [A, 2] from positions [A, 2], both in patches."""
    panel.quiver(
        *position.T,
        *displacement.T,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=width,
        headwidth=3.5,
        headlength=4,
        headaxislength=3.5,
        minlength=0,
        color=color,
        edgecolor="black",
        linewidth=0.3,
        zorder=3,  # Above the mark of the patch that they start from.
    )


def mark(panel, position):
    """Marks the patch that is shown, visible on any background."""
    panel.plot(*position, marker="o", mfc="white", mec="black", mew=0.7, ms=3.2)


def colors(panel, values, grid):
    """Draws a colour [P, 3] for each patch, without a photograph."""
    photograph(panel, values.reshape(*grid, 3), grid)
