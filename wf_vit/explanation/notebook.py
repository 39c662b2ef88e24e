"""One line from a model and a picture to figures, for notebooks and scripts."""

import base64
import dataclasses
import functools
import html
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from wf_vit.arrays import as_array, is_module
from wf_vit.errors import UsageError
from wf_vit.explanation import draw, images
from wf_vit.explanation.explanation import Explanation
from wf_vit.explanation.measuring import Settings, explain_attention, explain_batch
from wf_vit.grid import Grid
from wf_vit.models import pretrained
from wf_vit.models.pretrained import Pretrained
from wf_vit.models.pretrained.readers import name_of
from wf_vit.workdir import write_text

# The figures that stand for an explanation where it is displayed.
_SHOWN = ("class_map", "fields", "interactions", "tendency")


def explain(
    model: Any,
    image: Any,
    *,
    target: str = "tokens",
    indicators: Sequence[str] = ("mean", "knockout", "propagated"),
    image_size: int | tuple[int, int] | None = None,
    fit: str = "whole",
    layers: Sequence[int] | None = None,
    heads: bool = False,
    mass: float = 0.5,
    num_probes: int = 16,
    removal: bool = False,
    seed: int = 0,
    num_prefix_tokens: int | None = None,
    grid: Grid | None = None,
) -> "Explained | list[Explained]":
    """Explains what the patches of a picture do to one another in a model.

        wf_vit.explain("hf://facebook/dinov2-small", "photo.jpg")

    Args:
      model: a path or ``hf://owner/name``, as `models.pretrained.load` opens them; what
        it returned; a vision transformer of timm or Hugging Face, of which the weights
        and the config are read; or attention after the softmax, [L, H, N, N], or with
        a batch axis [L, B, H, N, N], also as the list of layers that transformers
        returns.
      image: a path, an image of Pillow, or an array of NumPy, JAX or PyTorch,
        [height, width, 3] or [height, width], in 8 bits or floats in [0, 1], not
        normalised; or a list of them.
      target: what "propagated" looks at: all final "tokens", the "cls" token, what the
        head reads ("pooled"); "class" for the class that the model predicts, or
        "class:NAME_OR_INDEX".
      indicators: names of `measure.INDICATORS`; the last one is that of the figures.
        With attention alone it is mean attention.
      image_size: height and width in pixels, or the side of a square; None: the
        model's own. With attention it is not needed.
      fit: "whole", "crop" or "model" (`images.fitted`); by default nothing is cropped.
      layers: indices; None for all.
      heads: whether to measure every head on its own too.
      mass: share of its impact that a patch's field holds.
      num_probes: of "propagated"; each costs about 1.4 forward passes.
      removal: whether to find out which patches the model can do without before the
        first layer of each quarter (`selection.select_patches`), for a figure of it.
        This takes many times as long as the rest.
      seed: of the probes.
      num_prefix_tokens: with attention only, where it is required: CLS and registers.
      grid: with attention only: rows and columns of patches, unless they are a square.

    Returns:
      The explanation, which shows itself in a notebook: ``.figures``, ``.page()``,
      ``.save(folder)``, and all arrays. A list of them for a list of images.

    Raises:
      UsageError: the model or an image is none of those above, or does not fit.
    """
    several = isinstance(image, list | tuple)
    pictures = [images.as_photograph(i) for i in (image if several else [image])]
    if not pictures:
        raise UsageError("image is an empty list: pass at least one image.")
    settings = Settings(
        indicators=tuple(indicators),
        target=target,
        num_probes=num_probes,
        layers=None if layers is None else tuple(layers),
        heads=heads,
        mass=mass,
        removal=removal,
    )
    if _is_attention(model):
        unused = {"target": target != "tokens", "image_size": image_size is not None}
        unused |= {"layers": layers is not None, "removal": removal}
        if any(unused.values()):
            raise UsageError(
                f"{', '.join(n for n, given in unused.items() if given)} needs a "
                "model, but attention was given: leave it out, or pass the model."
            )
        found = _by_attention(model, pictures, num_prefix_tokens, grid, mass)
    else:
        if num_prefix_tokens is not None or grid is not None:
            raise UsageError(
                "num_prefix_tokens and grid go with attention only: a model knows its "
                "own. Leave them out; for another size pass image_size."
            )
        found = _by_model(model, pictures, settings, image_size, fit, seed)
    name = _name(model)
    results = [Explained.of(explanation, model=name) for explanation in found]
    return results if several else results[0]


@dataclasses.dataclass(frozen=True, repr=False)
class Explained(Explanation):
    """An explanation that draws and shows itself."""

    @classmethod
    def of(cls, explanation: Explanation, *, model: str) -> "Explained":
        """Returns an explanation that can draw itself, with the name of the model."""
        members = {
            field.name: getattr(explanation, field.name)
            for field in dataclasses.fields(explanation)
        }
        return cls(**members | {"model": model})

    @functools.cached_property
    def figures(self) -> Mapping[str, Figure]:
        """The figures by name; each is drawn when it is asked for."""
        return _Figures(draw.image_drawings(self, model=self.model))

    def page(self, *, max_bytes: int = 25_000_000) -> "Page":
        """Returns the page to explore, which shows itself in a notebook."""
        return Page(
            draw.page_html(
                self,
                mass=self.mass,
                title="Patch interactions",
                model=self.model,
                max_bytes=max_bytes,
            )
        )

    def save(self, folder: str | Path) -> None:
        """Writes ``data.npz``, ``figures/`` and ``page.html`` into a folder.

        They take the place of those of an earlier explanation.
        """
        folder = Path(folder)
        self.save_data(folder)
        drawings = draw.image_drawings(self, model=self.model)
        shutil.rmtree(folder / draw.FIGURES, ignore_errors=True)
        draw.save_figures(drawings, folder / draw.FIGURES, pdf=True)
        write_text(folder / draw.PAGE, self.page())

    def __repr__(self) -> str:
        return (
            f"Explained({len(self.layers)} layers, {self.grid[0]} x {self.grid[1]} "
            f"patches, by {', '.join(self.impact)}; figures: {', '.join(self.figures)})"
        )

    def _repr_html_(self) -> str:
        shown = [name for name in _SHOWN if name in self.figures]
        pictures = "".join(
            f'<img alt="{name}" style="max-width:100%" src="data:image/png;base64,'
            f'{base64.b64encode(self.figures[name]._repr_png_()).decode()}">'
            for name in shown
        )
        return f"<div>{pictures}<p>{html.escape(repr(self))}</p></div>"

    def _repr_png_(self) -> bytes:
        return next(self.figures[n] for n in _SHOWN if n in self.figures)._repr_png_()


class Page(str):
    """The HTML of a page; in a notebook the page itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Page({len(self) / 1e6:.1f} MB of HTML; print it to a file to open it)"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self)}" width="100%" height="760" '
            'style="border:0"></iframe>'
        )


class _Figures(Mapping[str, Figure]):
    """Figures by name, each drawn once, when it is asked for."""

    def __init__(self, drawings: draw.Drawings):
        self._drawings, self._drawn = drawings, {}

    def __getitem__(self, name: str) -> Figure:
        if name not in self._drawn:
            if name not in self._drawings:
                raise KeyError(
                    f"There is no figure {name!r}: choose one of {', '.join(self)}."
                )
            self._drawn[name] = self._drawings[name]()
        return self._drawn[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._drawings)

    def __len__(self) -> int:
        return len(self._drawings)

    def __repr__(self) -> str:
        return f"Figures({', '.join(self)})"


def _is_attention(model: Any) -> bool:
    if isinstance(model, list | tuple):
        return True
    return hasattr(model, "shape") and not is_module(model)


def _by_attention(
    attention: Any,
    pictures: Sequence[images.Photograph],
    num_prefix_tokens: int | None,
    grid: Grid | None,
    mass: float,
) -> list[Explanation]:
    attention = as_array(attention, "attention")
    if attention.ndim == 4:
        attention = attention[:, None]
    if attention.ndim != 5 or attention.shape[1] != len(pictures):
        raise UsageError(
            f"attention has the shape {attention.shape} with {len(pictures)} images, "
            "expected [L, B, H, N, N] with B images, or [L, H, N, N] with one: stack "
            "the layers in front."
        )
    if num_prefix_tokens is None:
        raise UsageError(
            "num_prefix_tokens is missing: with attention, say how many tokens come "
            "before the patches, 1 for CLS alone, 0 for none."
        )
    return [
        explain_attention(
            attention[:, b],
            picture,
            num_prefix_tokens=num_prefix_tokens,
            grid=grid,
            mass=mass,
        )
        for b, picture in enumerate(pictures)
    ]


def _by_model(
    model: Any,
    pictures: Sequence[images.Photograph],
    settings: Settings,
    image_size: int | tuple[int, int] | None,
    fit: str,
    seed: int,
) -> list[Explanation]:
    loaded = model if isinstance(model, Pretrained) else pretrained.load(model)
    wanted = () if image_size is None else np.atleast_1d(image_size).tolist()
    key = jax.random.key(seed)
    found = []
    for n, picture in enumerate(pictures):
        size = images.seen_size(
            picture.shape[:2],
            loaded.model.image_size,
            loaded.model.patch_size,
            wanted,
            fit,
        )
        sized = loaded.resized(size)
        seen = images.fitted(picture, sized.preprocess, fit)
        keys = jax.random.fold_in(key, n)[None]
        found += explain_batch(sized, seen[None], settings, keys)
    return found


def _name(model: Any) -> str:
    if isinstance(model, str | Path):
        return name_of(model)
    if isinstance(model, Pretrained):
        model = model.model
    return "" if _is_attention(model) else type(model).__name__
