"""CLS and registers, every head, and what the final tokens have in common."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from wf_vit import grid as geometry
from wf_vit.arrays import as_array
from wf_vit.errors import UsageError
from wf_vit.figures import choice, layout, scales
from wf_vit.figures import panels as draw
from wf_vit.figures.style import COLUMN, style

# Inches that a small multiple needs: six beside each other in a column of a paper.
_SMALL = 0.52


def class_attention(
    image: draw.Photograph,
    rows: Float[Any, "L T P"] | Float[Any, "L H T P"],
    grid: geometry.Grid,
    names: Sequence[str] = ("CLS",),
    *,
    layer: int = -1,
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws what CLS and the registers listen to, over the photograph.

    Each row counts relative to its mean over the patches: 1 is what every patch would
    have if the token listened to all alike, and what is below is clear. What the token
    gives to prefix tokens is left out. Works for attention and for impact.

    Args:
      image: the photograph.
      rows: of each prefix token, non-negative: ``[L, T, P]``, or with heads
        ``[L, H, T, P]``, which are drawn for one layer; their mean is drawn for all.
      grid: ``(GH, GW)``.
      names: of the T tokens.
      layer: index of the one whose heads are drawn, from the back if negative.
      source: model and indicator, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches.

    Returns:
      A figure with a row for each token and a column for each layer; below it, if
      there are heads, a row for each token and a column for each head.

    Raises:
      UsageError: rows that do not fit grid and names, are negative or not finite.
    """
    image = draw.check_photograph(image)
    with_heads = np.ndim(rows) == 4
    axes = "L H T P" if with_heads else "L T P"
    rows = choice.shaped("rows", rows, axes, grid, T=len(names))
    if rows.min() < 0:
        raise UsageError(
            f"rows of the shape {rows.shape} are as low as {rows.min():.3g}, expected "
            "numbers from 0 on: use `heads` or `class_map` for signed effects."
        )
    if not -len(rows) <= layer < len(rows):
        raise UsageError(
            f"layer is {layer}, expected an index of the {len(rows)} layers of rows."
        )
    layers = choice.spread(len(rows), choice.LAYERS)
    titles = choice.layer_titles(range(len(rows)), len(rows), layer_names)
    # The sum of large numbers is out of float32's range.
    fused = rows.mean(1, dtype=np.float64) if with_heads else rows
    fused = scales.even(fused)[layers]
    note = ""
    blocks = [layout.Block([titles[i] for i in layers], names)]
    shown = [fused.swapaxes(0, 1)]
    if with_heads:
        heads = choice.spread(rows.shape[1], _at_most(width))
        blocks.append(layout.Block([f"head {h}" for h in heads], names))
        note = f"Above: mean over heads. Below: the heads of {titles[layer]}."
        shown.append(scales.even(rows[layer, heads]).swapaxes(0, 1))
    label = "listens to (uniform = 1)"
    legend = scales.over_mean(np.concatenate([s.ravel() for s in shown]), label)
    with style():
        figure, all_panels, foot = layout.lay_out(
            blocks, grid, width, note=note, source=source, footer=layout.BARS
        )
        for panels, values in zip(all_panels, shown, strict=True):
            _fill(panels, image, values, grid, legend)
        layout.legend_bars(figure, foot, [legend])
    return figure


def _at_most(width):
    return max(1, round(width / _SMALL))


def _fill(panels, image, values, grid, legend):
    """Draws values [rows, columns, P] over the photograph."""
    for panel, own in zip(panels.flat, values.reshape(panels.size, -1), strict=True):
        draw.photograph(panel, image, grid)
        draw.amounts(panel, own, grid, legend)


def heads(
    image: draw.Photograph,
    impact_heads: Float[Any, "L H P P"] | Float[Any, "L H P"],
    grid: geometry.Grid,
    *,
    patch: SupportsIndex | None = None,
    unit: str = "effect",
    source: str = "",
    layer_names: Sequence[int] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draws what one token listens to in every head, over the photograph.

    Rows count relative to their mean: 1 is what every patch would have if the head
    listened to all alike, and what is below is clear. Where any value is negative, all
    are drawn in their own unit, 0 clear, blue below and red above it.

    Args:
      image: the photograph.
      impact_heads: of patch j (column) on patch i (row) in each head, or the row of
        one token alone, say of CLS.
      grid: ``(GH, GW)``.
      patch: whose rows; by default the one whose influence depends most on who
        listens (``telling_patches``). With rows of one token it is only marked.
      unit: of signed values, for the legend, such as "added to the logit".
      source: model and indicator, drawn once at the foot.
      layer_names: what the layers are called, by default 0 to L - 1.
      width: of the figure, in inches. A column has room for six heads and layers, a
        page for 13; of more, some that are evenly spread are shown.

    Returns:
      A figure with a row for each layer and a column for each head.

    Raises:
      UsageError: the impact does not fit the grid or is not finite.
    """
    image = draw.check_photograph(image)
    whole = np.ndim(impact_heads) == 4
    axes = "L H P P" if whole else "L H P"
    values = choice.shaped("impact_heads", impact_heads, axes, grid)
    signed = values.min() < 0
    values = values if signed else scales.even(values)
    if whole and patch is None:
        patch = choice.most_discriminative(values, grid)[0]
    others = np.ones(values.shape[-1], bool)
    if patch is not None:
        others[choice.check_patch(patch, grid)] = False
    layers = choice.spread(len(values), _at_most(width))
    columns = choice.spread(values.shape[1], _at_most(width))
    rows = values[..., patch, :] if whole else values
    rows = rows[np.ix_(layers, columns)]
    if signed:
        legend = scales.signed(rows[..., others], unit)
    else:
        legend = scales.over_mean(rows[..., others], "listens to (uniform = 1)")
    titles = choice.layer_titles(layers, len(values), layer_names)
    with style():
        figure, (panels,), foot = layout.lay_out(
            [layout.Block([f"head {h}" for h in columns], titles)],
            grid,
            width,
            source=source,
            footer=layout.BARS,
        )
        _fill(panels, image, rows, grid, legend)
        if patch is not None:
            for panel in panels.flat:
                draw.mark(panel, geometry.coordinates(grid)[patch])
        layout.legend_bars(figure, foot, [legend])
    return figure


def principal_components(
    image: draw.Photograph,
    components: Float[Any, "P 3"],
    grid: geometry.Grid,
    *,
    source: str = "",
    width: float = COLUMN,
) -> Figure:
    """Draws the first three principal components of the patches as colours.

    Args:
      image: the photograph.
      components: in [0, 1], as ``components_of`` returns them: red, green and blue.
      grid: ``(GH, GW)``.
      source: the model, drawn once at the foot.
      width: of the figure, in inches.

    Returns:
      A figure with the photograph and, beside it, the colours.

    Raises:
      UsageError: components that do not fit the grid or lie outside of [0, 1].
    """
    image = draw.check_photograph(image)
    components = choice.shaped("components", components, "P 3", grid)
    low, high = components.min(), components.max()
    if low < 0 or high > 1:
        raise UsageError(
            f"components run from {low:.3g} to {high:.3g}, expected 0 to 1: pass what "
            "components_of returns."
        )
    with style():
        titles = ("photograph", "principal components 1 to 3")
        figure, (panels,), _ = layout.lay_out(
            [layout.Block(titles)], grid, width, source=source
        )
        draw.photograph(panels[0, 0], image, grid)
        draw.colors(panels[0, 1], components, grid)
    return figure


def components_of(tokens: Float[Any, "P D"]) -> Float[np.ndarray, "P 3"]:
    """Returns the first three principal components of tokens, as colours.

    The sign of each is chosen so that its largest score is positive. Of each component
    the middle 96 % of the patches span [0, 1]; the others are cut there, so that a few
    outliers leave contrast to all others. A component without variance is 0.5.

    Args:
      tokens: of the patches, without prefix tokens.

    Raises:
      UsageError: not two axes, no tokens, or NaN.
    """
    tokens = np.asarray(as_array(tokens, "tokens"), np.float32)
    if tokens.ndim != 2 or not tokens.size or not np.isfinite(tokens).all():
        raise UsageError(
            f"tokens have the shape {tokens.shape}, expected [P, D] of finite numbers: "
            "pass the patch tokens of one image."
        )
    # In units of the largest: no sum is out of range.
    tokens = tokens / (np.abs(tokens).max() or 1)
    centred = tokens - tokens.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    colors = np.full((len(tokens), 3), 0.5, np.float32)
    # Below this a component is rounding, not variance.
    least = 1e-5 * np.sqrt(tokens.size)
    for place in range(min(3, len(size))):
        if size[place] <= least:
            continue
        score = left[:, place]
        score = score * np.sign(score[np.argmax(np.abs(score))])
        low, high = np.quantile(score, (0.02, 0.98))
        if high <= low:
            low, high = score.min(), score.max()
        colors[:, place] = np.clip((score - low) / (high - low), 0, 1)
    return colors
