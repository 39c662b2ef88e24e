"""An explanation to figures for a paper and to a page to explore."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from wf_vit import figures, measure, page
from wf_vit.explanation.explanation import REMOVED, Explanation

FIGURES = "figures"
PAGE = "page.html"

# What draws a figure, by the figure's name.
Drawings = Mapping[str, Callable[[], Figure]]


def image_drawings(
    explanation: Explanation, *, patch: int | None = None, model: str = ""
) -> Drawings:
    """Returns the figures of one image.

    Args:
      explanation: of the image.
      patch: whose interactions and fields are shown; None for the telling ones.
      model: what the model is called.
    """
    e, photograph = explanation, explanation.photograph
    shape = {"grid": e.grid, "layer_names": e.layers.tolist()}
    source = " · ".join(filter(None, [model, measure.INDICATORS[e.indicator]]))
    options = shape | {"source": source}
    count = min(3, e.discriminability.shape[-1])
    # The sum of large numbers is out of float32's range.
    mean = e.discriminability.mean(0, dtype=np.float64)
    telling = figures.telling_patches(mean, e.grid, count).tolist()
    first = telling[0] if patch is None else patch
    patches = telling if patch is None else [patch]

    def of(draw, *arrays, **others):
        return partial(draw, photograph, *arrays, **options | others)

    drawings = {
        "interactions": of(figures.interactions, e.patch_impact(), patch=first),
        "fields": of(figures.responsive_fields, e.field, patches=patches),
        "field_size": of(figures.field_size, e.field.area),
        "tendency": of(figures.tendency, e.field.excess),
        "indiscriminative": of(figures.indiscriminative, e.discriminability),
    }
    attention = " · ".join(filter(None, [model, "attention"]))
    if e.prefix:
        drawings["class_attention"] = of(
            figures.class_attention,
            e.prefix_attention,
            names=e.prefix,
            source=attention,
        )
        t = len(e.prefix)
        rows = e.impact_heads.get(e.indicator, e.impact[e.indicator])[..., :t, t:]
        drawings["class_impact"] = of(figures.class_attention, rows, names=e.prefix)
    if e.impact_heads:
        heads = e.of_patches(e.impact_heads[e.indicator])
        drawings["heads"] = of(figures.heads, heads, patch=first)
    if e.components is not None:
        drawings["principal_components"] = partial(
            figures.principal_components,
            photograph,
            e.components,
            grid=e.grid,
            source=model,
        )
    if e.class_effect is not None:
        c = e.class_effect
        drawings["class_map"] = of(
            figures.class_map,
            c.class_map,
            c.by_layer,
            class_name=c.name,
            probability=c.probability,
            source=model,
        )
        drawings["class_interactions"] = of(
            figures.interactions,
            e.of_patches(c.effect),
            patch=first,
            unit="added to the logit",
        )
    if e.removal is not None:
        r = e.removal
        drawings["removal"] = partial(
            figures.removal,
            photograph,
            r.order,
            r.cosine,
            e.grid,
            REMOVED,
            layer_names=r.layers.tolist(),
            source=model,
        )
    if e.learned is not None:
        drawings["learned"] = of(
            figures.learned_beside_measured,
            e.learned,
            e.field_heads,
            patch=first,
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


def save_figures(drawings: Drawings, folder: Path, *, pdf: bool) -> None:
    """Writes figures into ``folder``, as PNG and, if wanted, as PDF.

    A PDF takes several times as long as a PNG: its fonts are cut to what it shows.
    """
    folder.mkdir(exist_ok=True)
    with figures.style():
        for name, draw in drawings.items():
            figure = draw()
            # Files are 7 % larger than by default, and are written in half the time.
            quick = {"compress_level": 3}
            figure.savefig(folder / f"{name}.png", pil_kwargs=quick)
            if pdf:
                figure.savefig(folder / f"{name}.pdf")


def page_html(
    explanation: Explanation,
    *,
    mass: float,
    title: str,
    model: str = "",
    max_bytes: int,
) -> str:
    """Returns the page of one image, which opens with the main indicator.

    Args:
      explanation: of the image.
      mass: share of its impact that a field holds.
      title: of the page.
      model: what the model is called.
      max_bytes: size of the page at most.
    """
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
    effect = None
    if e.class_effect is not None:
        c = e.class_effect
        effect = page.ClassEffect(
            c.effect, c.class_map, c.by_layer, c.name, c.probability
        )
    return page.explorer(
        e.photograph,
        {measure.INDICATORS[name]: indicator for name, indicator in shown.items()},
        e.grid,
        prefix=e.prefix,
        class_effect=effect,
        learned=e.learned,
        layers=e.layers.tolist(),
        mass=mass,
        title=title,
        model=model,
        max_bytes=max_bytes,
    )
