"""Pictures of a model in training: where fixed held-out images make it look."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wf_vit import fields, figures, measure
from wf_vit.data import augment
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import WindowFreeViT
from wf_vit.shapes import Params

# Images that have figures of their own; the learned fields are drawn over more.
_IMAGES = 2
_MASS, _DOTS_PER_INCH = 0.5, 150

Pixels = UInt8[np.ndarray, "1 _ _ 3"]


def draw_pictures(
    model: ViT,
    params: Params,
    images: UInt8[np.ndarray, "B height width 3"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> dict[str, Pixels]:
    """Draws what a model does to a few images, in one forward pass.

    Args:
      model: the module.
      params: its parameters.
      images: held-out images, the same at each call.
      mean: by which the images are normalised.
      std: likewise.

    Returns:
      By name: for the first images, where fields tend to beyond geometry (of mean
      attention) and what CLS and registers attend to, if there are any; and, over all
      images, the learned fields of a window-free transformer.
    """
    normal = augment.normalize(jnp.asarray(images), mean, std)
    found = measure.impact(model, params, normal, "mean")
    excess = fields.responsive_field(found.impact, model.grid, mass=_MASS).excess
    prefix = model.num_prefix_tokens
    attention = found.recording.attention[..., :prefix, prefix:]
    excess, attention = jax.device_get((excess, attention))
    pictures = {}
    for b, image in enumerate(images[:_IMAGES]):
        drawn = figures.tendency(image, excess[:, b], model.grid)
        pictures[f"tendency/{b}"] = _pixels(drawn)
        if prefix:
            names = [f"prefix {token}" for token in range(prefix)]
            drawn = figures.class_attention(image, attention[:, b], model.grid, names)
            pictures[f"class_attention/{b}"] = _pixels(drawn)
    if isinstance(model, WindowFreeViT):
        drawn = figures.learned_fields(
            images,
            np.asarray(found.recording.gaussians),
            model.grid,
        )
        pictures["learned_fields"] = _pixels(drawn)
    return pictures


def _pixels(figure: Figure) -> Pixels:
    """Returns a figure as an image on white."""
    figure.set_dpi(_DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    with figures.style():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[None, ..., :3]
