"""What the indicators need of a model: attention, values, and gradients.

Images stream through in batches of one shape, the last one padded, so that a model is
traced once and memory is bounded by the batch, not by the number of images. Every
function is jitted for its model and layers: calling it again traces nothing.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from wf_vit import indicators
from wf_vit.errors import UsageError
from wf_vit.indicators.arithmetic import einsum
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Key, Labels, Params

OUTPUTS = ("tokens", "cls", "pooled")

# On the host or the device; their dtype is checked with a message.
AnyImages = Shaped[Array | np.ndarray, "B height width 3"]


class Recording(NamedTuple):
    """One batch of images, as the chosen layers saw it.

    Attributes:
      attention: weights after the softmax; rows sum to 1.
      values: value vectors.
      scale: what the layer norm before each chosen layer divides each token by, and,
        last, the final norm.
      tokens: the residual stream after the final norm.
      logits: of the head, or the pooled representation of a model without one.
    """

    attention: Float[Array, "L B H N N"]
    values: Float[Array, "L B N H K"]
    scale: Float[Array, "layers_and_1 B N"]
    tokens: Float[Array, "B N D"]
    logits: Float[Array, "B C"]


class OutputProjection(NamedTuple):
    """How the heads of the chosen layers write to the residual stream.

    Attributes:
      output_kernel: slice of the output projection that belongs to each head.
      residual_scale: LayerScale after it, or None if the model has none.
    """

    output_kernel: Float[Array, "L H K D"]
    residual_scale: Float[Array, "L D"] | None


def bytes_per_image(model: ViT, layers: Sequence[int] | None = None) -> int:
    """Returns the size in bytes of one image in a ``Recording``, all in float32.

    ``4 (L H N^2 + (L + 1) N (D + 1) + C)``: 24.2 MB for all layers of a ViT-S/14 at 224
    pixels, nearly all of it attention, which grows with the fourth power of the
    image's side.
    """
    count = len(_check_layers(model, layers))
    tokens = model.num_tokens
    attention = count * model.num_heads * tokens**2
    streams = (count + 1) * tokens * (model.width + 1)
    return 4 * (attention + streams + model.num_classes)


def output_projection(
    model: ViT, params: Params, layers: Sequence[int] | None = None
) -> OutputProjection:
    """Returns the parameters that belong to a recording of the same layers."""
    blocks = [params[f"blocks_{layer}"] for layer in _check_layers(model, layers)]
    scale = None
    if model.layer_scale is not None:
        scale = jnp.stack([block["attention_scale"] for block in blocks])
    kernels = [block["attention"]["out"]["kernel"] for block in blocks]
    return OutputProjection(jnp.stack(kernels), scale)


def head_gain(model: ViT, params: Params) -> Float[Array, "L H"]:
    """Returns how far each head stretches what it is given, all directions alike.

    The root mean square over random directions, for ``indicators.expected_stretch``:
    the Frobenius norm of the map from the normalised stream to what the head writes,
    with the norm's scale and LayerScale, over the square root of the width.
    """
    # Means and products of parameters in bfloat16 would be too coarse.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    output_kernel, residual_scale = output_projection(model, params)
    if residual_scale is not None:
        output_kernel = output_kernel * residual_scale[:, None, None]
    blocks = [params[f"blocks_{layer}"] for layer in range(model.depth)]
    norms = jnp.stack([block["attention_norm"]["scale"] for block in blocks])
    kernels = jnp.stack([block["attention"]["value"]["kernel"] for block in blocks])
    kernels = kernels * norms[..., None, None]
    # A layer norm takes the mean of a token away first.
    kernels = kernels - kernels.mean(1, keepdims=True)
    read = einsum("ldhj,ldhk->lhjk", kernels, kernels)
    written = einsum("lhjd,lhkd->lhjk", output_kernel, output_kernel)
    return jnp.sqrt((read * written).sum((-1, -2)) / model.width)


def record(
    model: ViT,
    params: Params,
    images: AnyImages,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
) -> Iterator[Recording]:
    """Runs a model on images and yields what its layers did, batch by batch.

    One batch takes ``batch_size * bytes_per_image(model, layers)`` on the device, and
    as much again while it is computed. What was yielded is the caller's to reduce and
    to drop.

    Args:
      model: a ViT or a window-free transformer, of any computation dtype.
      params: its parameters.
      images: normalised images, on the host or the device.
      layers: indices from 0, in the order they are wanted; None for all.
      batch_size: images at once.

    Yields:
      Recordings of ``batch_size`` images each; the last may have fewer.

    Raises:
      UsageError: unknown or repeated layers, images that do not fit the model.
    """
    chosen = _check_layers(model, layers)
    for _, batch, count in _batches(images, batch_size):
        recording = _record(params, batch, model=model, layers=chosen)
        yield Recording(
            attention=recording.attention[:, :count],
            values=recording.values[:, :count],
            scale=recording.scale[:, :count],
            tokens=recording.tokens[:count],
            logits=recording.logits[:count],
        )


def propagate(
    model: ViT,
    params: Params,
    images: AnyImages,
    *,
    target: str,
    key: Key,
    num_probes: int = 16,
    layers: Sequence[int] | None = None,
    per_head: bool = False,
    shrink: bool = True,
    prefix_tokens: bool = False,
    batch_size: int = 8,
) -> Iterator[indicators.PropagatedKnockout]:
    """Yields how far cutting each interaction moves the model's output.

    The propagated indicator of ``indicators.propagated_knockout`` for a vector
    output: one forward pass and ``num_probes`` backward passes a batch.

    Args:
      model: see ``record``.
      params: its parameters.
      images: see ``record``.
      target: the output: all "tokens" after the final norm, the "cls" token among
        them, or what the head reads ("pooled").
      key: the probes' randomness. An image's probes depend on its place among the
        images, but not on the batch size.
      num_probes: M.
      layers: see ``record``.
      per_head: cut one head at a time.
      shrink: see ``indicators.propagated_knockout``.
      prefix_tokens: whether to keep the interactions with the prefix tokens.
      batch_size: images at once. One takes about 8 times ``bytes_per_image`` while it
        is computed (0.2 GB for all layers of a ViT-S/14 at 224 pixels), whatever the
        number of probes.

    Yields:
      Impacts ``[L, B, P, P]`` or ``[L, B, H, P, P]``, and their relative errors; with
      ``prefix_tokens``, N in place of P.

    Raises:
      UsageError: an unknown target or layer, or images that do not fit the model.
    """
    if target not in OUTPUTS:
        raise UsageError(
            f"The target is {target!r}, expected one of {', '.join(OUTPUTS)}; for a "
            "class, call propagate_logit."
        )
    if target == "cls" and not model.cls_token:
        raise UsageError("target='cls', but the model has no CLS token: use 'pooled'.")
    chosen = _check_layers(model, layers)
    for start, batch, count in _batches(images, batch_size):
        impact, error = _propagate(
            params,
            batch,
            key,
            start,
            model=model,
            layers=chosen,
            target=target,
            num_probes=num_probes,
            per_head=per_head,
            shrink=shrink,
            prefix_tokens=prefix_tokens,
        )
        yield indicators.PropagatedKnockout(impact[:, :count], error[:, :count])


def propagate_logit(
    model: ViT,
    params: Params,
    images: AnyImages,
    *,
    classes: int | Sequence[int] | np.ndarray | Labels,
    layers: Sequence[int] | None = None,
    per_head: bool = False,
    prefix_tokens: bool = False,
    batch_size: int = 8,
) -> Iterator[Float[Array, "L b ..."]]:
    """Yields how much each interaction adds to a class logit, to first order, signed.

    The propagated indicator of ``indicators.knockout_effect``: cutting the
    interaction lowers the logit by about as much. One backward pass a batch.

    Args:
      model: see ``record``; it has a head.
      params: its parameters.
      images: see ``record``.
      classes: the class to explain, of all images or of each.
      layers: see ``record``.
      per_head: see ``propagate``.
      prefix_tokens: see ``propagate``.
      batch_size: see ``propagate``.

    Yields:
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
    chosen = _check_layers(model, layers)
    for start, batch, count in _batches(images, batch_size):
        wanted = np.resize(classes[start : start + count], len(batch))
        effect = _propagate_logit(
            params,
            batch,
            wanted,
            model=model,
            layers=chosen,
            per_head=per_head,
            prefix_tokens=prefix_tokens,
        )
        yield effect[:, :count]


def _check_layers(model: ViT, layers: Sequence[int] | None) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(model.depth))
    chosen = tuple(operator.index(layer) for layer in layers)
    known = set(range(model.depth))
    if not chosen or not set(chosen) <= known or len(set(chosen)) < len(chosen):
        raise UsageError(
            f"layers is {list(layers)}: name some of the layers 0 to "
            f"{model.depth - 1}, each once, or pass None for all."
        )
    return chosen


def _batches(
    images: AnyImages, batch_size: int
) -> Iterator[tuple[int, AnyImages, int]]:
    """Yields where a batch starts, the batch, and how many of it are no padding."""
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, expected at least 1.")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UsageError(
            f"The images are {images.dtype}, expected normalised images, which are "
            "floats: prepare them as the model expects "
            "(the preprocess of models.pretrained.load)."
        )
    size = min(batch_size, len(images))
    for start in range(0, len(images), batch_size):
        batch = images[start : start + size]
        count = len(batch)
        if count < size:
            batch = np.pad(batch, [(0, size - count), (0, 0), (0, 0), (0, 0)])
        yield start, batch, count


def _forward(
    model: ViT,
    layers: tuple[int, ...],
    variables: dict[str, Any],
    images: Images,
) -> tuple[dict[str, Array], Recording]:
    """Runs the model; returns its outputs by target, and the recording."""
    logits, out = model.apply(variables, images, record=layers)
    tokens = out["tokens"].astype(jnp.float32)
    outputs = {"tokens": tokens, "cls": tokens[:, 0], "logits": logits}
    outputs["pooled"] = out["pooled"].astype(jnp.float32)
    records = [out["records"][layer] for layer in layers]
    return outputs, Recording(
        attention=jnp.stack([r["attention"] for r in records]),
        values=jnp.stack([r["values"] for r in records]),
        scale=jnp.stack([*(r["scale"] for r in records), out["scale"]]),
        tokens=tokens,
        logits=logits,
    )


@functools.partial(jax.jit, static_argnames=("model", "layers"))
def _record(
    params: Params, images: Images, *, model: ViT, layers: tuple[int, ...]
) -> Recording:
    return _forward(model, layers, {"params": params}, images)[1]


def _linearize(
    model: ViT,
    layers: tuple[int, ...],
    params: Params,
    images: Images,
    read: Callable[[dict[str, Array]], Array],
) -> tuple[Array, Callable[[Array], Float[Array, "L B N D"]], Recording]:
    """Runs the model once, to be differentiated with respect to its residual stream.

    Returns:
      What ``read`` makes of the outputs; the function that maps its cotangent to the
      gradients right after the attention of each layer; and the recording.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["perturbations"]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    names = [f"blocks_{layer}" for layer in layers]

    def forward(perturbed):
        variables = {"params": params, "perturbations": zeros | perturbed}
        outputs, recording = _forward(model, layers, variables, images)
        return read(outputs), recording

    output, pull_back, recording = jax.vjp(
        forward, {name: zeros[name] for name in names}, has_aux=True
    )

    def gradients(cotangent):
        (gradient,) = pull_back(cotangent)
        return jnp.stack([gradient[name]["after_attention"] for name in names])

    return output, gradients, recording


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
    key: Key,
    start: Int[Array, ""],
    *,
    model: ViT,
    layers: tuple[int, ...],
    target: str,
    num_probes: int,
    per_head: bool,
    shrink: bool,
    prefix_tokens: bool,
) -> indicators.PropagatedKnockout:
    output, gradients, recording = _linearize(
        model, layers, params, images, operator.itemgetter(target)
    )
    places = start + jnp.arange(images.shape[0])

    def cotangents(probe):
        def signs(place):
            own = jax.random.fold_in(jax.random.fold_in(key, place), probe)
            return jax.random.rademacher(own, output.shape[1:], output.dtype)

        return gradients(jax.vmap(signs)(places))

    projection = output_projection(model, params, layers)
    return indicators.propagated_knockout(
        recording.attention,
        recording.values,
        projection.output_kernel,
        cotangents,
        projection.residual_scale,
        num_probes=num_probes,
        num_prefix_tokens=0 if prefix_tokens else model.num_prefix_tokens,
        per_head=per_head,
        shrink=shrink,
    )


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

    output, gradients, recording = _linearize(model, layers, params, images, read)
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
