"""From a model and a batch of images to what the patches do to one another.

Everything that measures a model comes through here: guidance, explanations, protocols
and benchmarks. A call takes one batch, which the caller chooses to fit the memory
(``models.recording.bytes_per_image``). What runs the model is jitted for the model and
the layers; within ``jax.jit`` what is not used costs nothing. Cuts are followed through
values; what the heads of a WinfT report is left out.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from wf_vit import indicators
from wf_vit.arrays import shapes_of
from wf_vit.errors import UsageError
from wf_vit.models.parameters import output_projection
from wf_vit.models.recording import Recording, forward, linearize, random_signs
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Keys, Labels, Params

# Every indicator by name, and what it is called in a figure or a page.
INDICATORS = {
    "mean": "mean attention",
    "max": "largest attention of a head",
    "std": "spread of attention over heads",
    "odds": "attention odds",
    "rollout": "attention rollout",
    "knockout": "knockout, effect in its layer",
    "propagated": "knockout, effect on the output",
    "distance": "distance",
    "random": "random",
}
# Those that look at no image: controls of the others.
CONTROLS = ("distance", "random")

# What "propagated" can look at.
OUTPUTS = ("tokens", "cls", "pooled")

# On the host or the device.
AnyImages = Shaped[Array | np.ndarray, "B height width 3"]


class Impact(NamedTuple):
    """An indicator of one batch of images.

    Attributes:
      impact: of patch j on patch i, heads together; N for P with ``prefix_tokens``.
      heads: the same for each head on its own; None unless it was asked for.
      relative_error: of "propagated", see `indicators.PropagatedKnockout`.
      recording: the forward pass that it was measured in.
    """

    impact: Float[Array, "L B P P"]
    heads: Float[Array, "L B H P P"] | None
    relative_error: Float[Array, "L B"] | None
    recording: Recording

    __repr__ = shapes_of


def impact(
    model: ViT,
    params: Params,
    images: AnyImages,
    indicator: str,
    *,
    per_head: bool = False,
    layers: Sequence[int] | None = None,
    target: str = "tokens",
    num_probes: int = 16,
    key: Keys | None = None,
    prefix_tokens: bool = False,
    recording: Recording | None = None,
) -> Impact:
    """Returns how much each interaction matters, by the name of an indicator.

    "propagated" takes one forward pass and ``num_probes`` backward passes, heads
    included; every other one takes a forward pass, or none with a ``recording``.

    Args:
      model: a ViT or a window-free transformer, of any computation dtype.
      params: its parameters.
      images: normalised images, on the host or the device.
      indicator: a name of ``INDICATORS``.
      per_head: whether to measure each head on its own too.
      layers: indices from 0, in the order they are wanted; None for all.
      target: the output that "propagated" looks at, one of ``OUTPUTS``.
      num_probes: of "propagated", at least 2.
      key: randomness of "propagated" and of "random", as in `propagate`.
      prefix_tokens: whether to keep the interactions with the prefix tokens, which
        come first. ``CONTROLS`` know none: there they are 0.
      recording: of the same images and layers, say another indicator's.

    Returns:
      The impact, with the recording that it was measured in.

    Raises:
      UsageError: an unknown indicator, layer or target; a key or layers that it needs
        are missing; images, keys or a recording that do not fit.
    """
    if indicator not in INDICATORS:
        raise UsageError(
            f"The indicator is {indicator!r}: choose one of {', '.join(INDICATORS)}."
        )
    if indicator in ("propagated", "random") and key is None:
        raise UsageError(
            f"The indicator {indicator!r} was given no key: pass "
            "key=jax.random.key(seed)."
        )
    if indicator == "propagated":
        knockout, recording = propagate(
            model,
            params,
            images,
            target=target,
            key=key,
            num_probes=num_probes,
            layers=layers,
            per_head=per_head,
            prefix_tokens=prefix_tokens,
        )
        heads = knockout.heads.impact if per_head else None
        return Impact(knockout.impact, heads, knockout.relative_error, recording)
    chosen = model.check_layers(layers)
    if indicator == "rollout" and chosen != model.check_layers(None):
        raise UsageError(
            f"layers is {chosen}, but the rollout needs all layers: pass None, or "
            "choose another indicator."
        )
    if recording is None:
        recording = record(model, params, images, layers=layers)
    size = len(chosen), len(images), model.num_heads, *[model.num_tokens] * 2
    if recording.attention.shape != size:
        raise UsageError(
            f"recording has attention of shape {recording.attention.shape}, expected "
            f"{size}: record the same images and layers."
        )
    control = indicator in CONTROLS
    dropped = 0 if prefix_tokens and not control else model.num_prefix_tokens
    options = {"num_prefix_tokens": dropped}
    inputs = [recording.attention]
    match indicator:
        case "knockout":
            of = indicators.knockout_impact
            inputs += [recording.values, *output_projection(model, params, layers)]
        case "rollout":
            of = indicators.attention_rollout
        case _:
            of = indicators.interaction_indicator
            options |= {"method": indicator}
            options |= {"grid": model.grid, "key": key} if control else {}
    of = functools.partial(of, *inputs, **options)
    found = of(per_head=False), of(per_head=True) if per_head else None
    if control and prefix_tokens:
        to = [(model.num_prefix_tokens, 0)] * 2
        found = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + to), found)
    return Impact(*found, None, recording)


def record(
    model: ViT,
    params: Params,
    images: AnyImages,
    *,
    layers: Sequence[int] | None = None,
) -> Recording:
    """Runs a model on a batch and returns what its layers did.

    Args:
      model: a ViT or a window-free transformer, of any computation dtype.
      params: its parameters.
      images: normalised images, on the host or the device.
      layers: indices from 0, in the order they are wanted; None for all.

    Raises:
      UsageError: unknown or repeated layers, images that do not fit the model.
    """
    chosen = model.check_layers(layers)
    check_images(images)
    return _record(params, images, model=model, layers=chosen)


def propagate(
    model: ViT,
    params: Params,
    images: AnyImages,
    *,
    target: str,
    key: Keys,
    num_probes: int = 16,
    layers: Sequence[int] | None = None,
    per_head: bool = False,
    shrink: bool = True,
    prefix_tokens: bool = False,
) -> tuple[indicators.PropagatedKnockout, Recording]:
    """Returns how far cutting each interaction moves the model's output.

    The propagated indicator of ``indicators.propagated_knockout`` for a vector
    output: one forward pass and ``num_probes`` backward passes.

    Args:
      model: a ViT or a window-free transformer.
      params: its parameters.
      images: normalised images.
      target: one of ``OUTPUTS``: all final "tokens", the "cls" token, or "pooled", what
        the head reads. For a class use ``propagate_logit``.
      key: randomness of the probes, one ``[]`` for all images or ``[B]`` for each. An
        image's impact depends on its own key, or on the one key and the place in the
        batch, but not on the other images.
      num_probes: M, at least 2.
      layers: indices from 0; None for all.
      per_head: whether to cut in one head at a time too.
      shrink: whether to draw the noisy mean over probes towards the local norm.
      prefix_tokens: whether to keep the interactions with the prefix tokens.

    Returns:
      Impacts ``[L, B, P, P]``, per head ``[L, B, H, P, P]``, and their relative
      errors; with ``prefix_tokens``, N in place of P. And the recording.

    Raises:
      UsageError: an unknown target or layer, or images that do not fit the model.
    """
    check_target(model, target)
    chosen = model.check_layers(layers)
    check_images(images)
    return _propagate(
        params,
        images,
        key,
        model=model,
        layers=chosen,
        target=target,
        num_probes=num_probes,
        per_head=per_head,
        shrink=shrink,
        prefix_tokens=prefix_tokens,
    )


def propagate_logit(
    model: ViT,
    params: Params,
    images: AnyImages,
    *,
    classes: int | Sequence[int] | np.ndarray | Labels,
    layers: Sequence[int] | None = None,
    per_head: bool = False,
    prefix_tokens: bool = False,
) -> Float[Array, "L B ..."]:
    """Returns how much each interaction adds to a class logit, to first order, signed.

    The propagated indicator of ``indicators.knockout_effect``: cutting the
    interaction lowers the logit by about as much. One forward and one backward pass.

    Args:
      model: a classifier.
      params: its parameters.
      images: normalised images.
      classes: the class to explain, of all images or of each.
      layers: indices from 0; None for all.
      per_head: the effect in each head alone; the fused effect is their sum.
      prefix_tokens: whether to keep the interactions with the prefix tokens.

    Returns:
      Effects in units of the logit, ``[L, B, P, P]`` or ``[L, B, H, P, P]``; with
      ``prefix_tokens``, N in place of P.

    Raises:
      UsageError: unknown classes or layers, or images that do not fit the model.
    """
    classes = np.asarray(classes)
    if classes.shape not in ((), (len(images),)):
        raise UsageError(
            f"classes has the shape {classes.shape}, expected one class, or one for "
            f"each of {len(images)} images."
        )
    classes = np.broadcast_to(classes, (len(images),))
    if classes.size and not 0 <= classes.min() <= classes.max() < model.num_classes:
        raise UsageError(
            f"The classes run from {classes.min()} to {classes.max()}, but the model "
            f"has {model.num_classes}: name classes from 0 to C - 1."
        )
    chosen = model.check_layers(layers)
    check_images(images)
    return _propagate_logit(
        params,
        images,
        classes,
        model=model,
        layers=chosen,
        per_head=per_head,
        prefix_tokens=prefix_tokens,
    )


def check_target(model: ViT, target: str) -> None:
    """Raises UsageError if a model has no such output of ``OUTPUTS``."""
    if target not in OUTPUTS:
        raise UsageError(
            f"The target is {target!r}, expected one of {', '.join(OUTPUTS)}; for a "
            "class, call propagate_logit."
        )
    if target == "cls" and not model.cls_token:
        raise UsageError("target='cls', but the model has no CLS token: use 'pooled'.")


def check_images(images: AnyImages) -> None:
    """Raises UsageError if images are not floats, so cannot be normalised."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UsageError(
            f"The images are {images.dtype}, expected normalised images, floats: pass "
            "what the preprocess of models.pretrained.load returns."
        )


@functools.partial(jax.jit, static_argnames=("model", "layers"))
def _record(
    params: Params, images: Images, *, model: ViT, layers: tuple[int, ...]
) -> Recording:
    return forward(model, layers, {"params": params}, images)[1]


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "layers",
        "target",
        "num_probes",
        "per_head",
        "shrink",
        "prefix_tokens",
    ),
)
def _propagate(
    params: Params,
    images: Images,
    key: Keys,
    *,
    model: ViT,
    layers: tuple[int, ...],
    target: str,
    num_probes: int,
    per_head: bool,
    shrink: bool,
    prefix_tokens: bool,
) -> tuple[indicators.PropagatedKnockout, Recording]:
    output, gradients, recording = linearize(
        model, layers, params, images, operator.itemgetter(target)
    )
    signs = random_signs(output, key)
    projection = output_projection(model, params, layers)
    knockout = indicators.propagated_knockout(
        recording.attention,
        recording.values,
        projection.output_kernel,
        lambda probe: gradients(signs(probe)),
        projection.residual_scale,
        num_probes=num_probes,
        num_prefix_tokens=0 if prefix_tokens else model.num_prefix_tokens,
        per_head=per_head,
        shrink=shrink,
    )
    return knockout, recording


@functools.partial(
    jax.jit, static_argnames=("model", "layers", "per_head", "prefix_tokens")
)
def _propagate_logit(
    params: Params,
    images: Images,
    classes: Labels,
    *,
    model: ViT,
    layers: tuple[int, ...],
    per_head: bool,
    prefix_tokens: bool,
) -> Float[Array, "L B ..."]:
    def read(outputs):
        return jnp.take_along_axis(outputs["logits"], classes[:, None], axis=1)[:, 0]

    output, gradients, recording = linearize(model, layers, params, images, read)
    projection = output_projection(model, params, layers)
    return indicators.knockout_effect(
        recording.attention,
        recording.values,
        projection.output_kernel,
        gradients(jnp.ones_like(output)),
        projection.residual_scale,
        num_prefix_tokens=0 if prefix_tokens else model.num_prefix_tokens,
        per_head=per_head,
    )
