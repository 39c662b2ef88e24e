"""An explanation to figures for a paper and to a page to explore."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from wf_vit import figures, measure, page
from wf_vit.explanation.explanation import Explanation
from wf_vit.workdir import replacing

FIGURES = "figures"
PAGE = "page.html"

# What draws a figure, by the figure's name.
Drawings = Mapping[str, Callable[[], Figure]]


def image_drawings(explanation: Explanation, patch: int | None) -> Drawings:
    """Returns the figures of one image.

    Args:
      explanation: of the image.
      patch: whose interactions and fields are shown; None for the telling ones.
    """
    e, photograph = explanation, explanation.photograph
    options = {"grid": e.grid, "layer_names": e.layers.tolist()}
    patches = None if patch is None else [patch]
    drawings = {
        "interactions": partial(
            figures.interactions,
            photograph,
            e.impact[e.indicator],
            patch=patch,
            **options,
        ),
        "fields": partial(
            figures.responsive_fields, photograph, e.field, patches=patches, **options
        ),
        "tendency": partial(
            figures.tendency, photograph, e.field.displacement, **options
        ),
        "indiscriminative": partial(
            figures.indiscriminative, photograph, e.discriminability, **options
        ),
    }
    if e.learned is not None:
        drawings["learned"] = partial(
            figures.learned_beside_measured,
            photograph,
            e.learned.extents,
            e.field_heads.extents,
            softness=e.learned.softness,
            patch=patch,
            **options,
        )
    by_head = None if e.field_heads is None else e.field_heads.area.mean(-1)
    return drawings | depth_drawings(
        e.layers.tolist(),
        area=e.field.area.mean(-1),
        area_spread=e.field.area.std(-1),
        area_heads=by_head,
        distance=e.attention_distance,
    )


def depth_drawings(
    layers: Sequence[int],
    *,
    area: Float[np.ndarray, " L"],
    area_spread: Float[np.ndarray, " L"],
    area_heads: Float[np.ndarray, "L H"] | None,
    distance: Float[np.ndarray, "L H"],
    distance_spread: Float[np.ndarray, "L H"] | None = None,
) -> Drawings:
    """Returns the figures over depth, of one image or of many.

    Args:
      layers: their numbers.
      area: share of the grid that a field covers, mean over patches (and images).
      area_spread: its standard deviation over the same.
      area_heads: the same for each head, if heads were told apart.
      distance: mean attention distance in patches.
      distance_spread: its standard deviation over images.
    """
    profile = partial(figures.depth_profile, layer_names=layers)
    drawings = {
        "field_area": partial(
            profile,
            100 * area[:, None],
            "field area (% of grid),\nmean ± std",
            spread=100 * area_spread[:, None],
        ),
        "attention_distance": partial(
            profile,
            distance,
            "mean attention\ndistance (patches)",
            spread=distance_spread,
        ),
    }
    if area_heads is not None:
        drawings["field_area_heads"] = partial(
            profile, 100 * area_heads, "field area (% of grid)"
        )
    return drawings


def save_figures(drawings: Drawings, folder: Path) -> None:
    """Writes figures as PDF and PNG into ``folder``."""
    folder.mkdir(exist_ok=True)
    with figures.style():
        for name, draw in drawings.items():
            figure = draw()
            for suffix in ("pdf", "png"):
                figure.savefig(folder / f"{name}.{suffix}")


def save_page(
    explanation: Explanation, path: Path, *, mass: float, title: str, model: str
) -> None:
    """Writes the page of one image, which opens with the main indicator."""
    e = explanation
    shown = {
        e.indicator: page.Indicator(
            e.impact[e.indicator],
            e.impact_heads.get(e.indicator),
            e.field,
            e.field_heads,
        )
    }
    for name in e.impact:
        heads = e.impact_heads.get(name)
        shown.setdefault(name, page.Indicator(e.impact[name], heads))
    html = page.explorer(
        e.photograph,
        {measure.INDICATORS[name]: indicator for name, indicator in shown.items()},
        e.grid,
        extents=None if e.learned is None else e.learned.extents,
        layers=e.layers.tolist(),
        mass=mass,
        title=title,
        model=model,
    )
    with replacing(path) as partial_file:
        partial_file.write_text(html, encoding="utf-8")
