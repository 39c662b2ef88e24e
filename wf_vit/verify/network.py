"""A model, whole and interfered with, in the forms that the protocols ask for.

Every function is jitted for its model; parameters come first and the model last.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wf_vit import indicators, interventions, measure
from wf_vit.interventions import Keep
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Key, Labels, Logits, Params, Tokens
from wf_vit.verify.answers import Answer
from wf_vit.verify.faithfulness import Predict


@partial(jax.jit, static_argnames="model")
def whole(
    params: Params, images: Images, *, model: ViT
) -> tuple[Answer, Float[Array, "L B H N N"]]:
    """Returns the answer of the model left alone, and its attention."""
    logits, out = model.apply({"params": params}, images, record=True)
    records = [out["records"][layer] for layer in range(model.depth)]
    attention = jnp.stack([record["attention"] for record in records])
    return _answer(model, logits, out), attention


@partial(jax.jit, static_argnames="model")
def masked(params: Params, images: Images, keep: Keep, *, model: ViT) -> Answer:
    """Returns the answer when only some interactions between patches are kept."""
    bias = interventions.attention_bias(keep, num_prefix_tokens=model.num_prefix_tokens)
    return _answer(model, *model.apply({"params": params}, images, bias=bias))


@partial(jax.jit, static_argnames=("layers", "model"))
def inputs(
    params: Params, images: Images, *, layers: tuple[int, ...], model: ViT
) -> dict[int, Tokens]:
    """Returns the residual stream before each of some layers."""
    variables = {"params": params}
    tokens = model.apply(variables, images, method="embed")
    streams, start = {}, 0
    for layer in sorted(layers):
        tokens, _ = model.apply(
            variables, tokens, start=start, stop=layer, method="encode"
        )
        streams[layer], start = tokens, layer
    return streams


@partial(jax.jit, static_argnames=("layer", "model"))
def gathered(
    params: Params,
    tokens: Tokens,
    patches: Int[Array, "B kept"],
    *,
    layer: int,
    model: ViT,
) -> Answer:
    """Returns the answer when from a layer on only some patches are there.

    Args:
      params: the model's.
      tokens: the residual stream of all patches before the layer.
      patches: those that stay.
      layer: the first one without the others.
      model: the model.
    """
    variables = {"params": params}
    tokens = interventions.gather_patches(
        tokens, patches, num_prefix_tokens=model.num_prefix_tokens
    )
    tokens, _ = model.apply(
        variables, tokens, start=layer, patches=patches, method="encode"
    )
    return _answer(model, *model.apply(variables, tokens, method="readout"))


@partial(jax.jit, static_argnames=("layer", "model"))
def shortened(
    params: Params,
    images: Images,
    patches: Int[Array, "B kept"],
    *,
    layer: int,
    model: ViT,
) -> Logits:
    """Returns the logits when from a layer on only some patches are there."""
    streams = inputs(params, images, layers=(layer,), model=model)
    return gathered(params, streams[layer], patches, layer=layer, model=model).logits


@partial(jax.jit, static_argnames="model")
def classify(params: Params, images: Images, *, model: ViT) -> Logits:
    """Returns the logits of images."""
    return model.apply({"params": params}, images)[0]


def cut(
    params: Params, image: Images, *, layers: tuple[int, ...], model: ViT
) -> Predict:
    """Returns what a cut does to the final tokens of one image, in float64.

    The weakest cuts move the output by little more than the rounding of float32.
    """
    model = model.clone(dtype=jnp.float64)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        streams = inputs(params, image, layers=layers, model=model)

    def predict(layer, bias):
        with jax.enable_x64(True):
            return _cut(params, streams[layer], bias, layer=layer, model=model)

    return predict


@partial(jax.jit, static_argnames=("layer", "model"))
def _cut(params, tokens, bias, *, layer, model):
    variables = {"params": params}
    tokens = jnp.broadcast_to(tokens, (len(bias), *tokens.shape[1:]))
    biases = [None] * model.depth
    biases[layer] = bias.astype(tokens.dtype)
    tokens, _ = model.apply(
        variables, tokens, start=layer, bias=biases, method="encode"
    )
    return model.apply(variables, tokens, method="readout")[1]["tokens"]


def map_names(kinds: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of ``importance_maps``, for classes of such names."""
    own = ("impact", *(f"effect on {kind} class" for kind in kinds))
    return (*own, "attention", "rollout", "random")


def importance_maps(
    params: Params,
    images: Images,
    attention: Float[Array, "L B H N N"],
    *,
    classes: dict[str, Labels],
    num_probes: int,
    key: Key,
    model: ViT,
) -> dict[str, Float[Array, "B P"]]:
    """Returns maps of the patches' importance for what the head reads.

    An indicator's map of patch j is the sum over the layers and over all queries,
    prefix tokens included, of j's impact. Attention's is what j receives from the CLS
    token, or from all patches if there is none, mean over heads.

    Args:
      params: the model's.
      images: normalised.
      attention: of all layers and tokens.
      classes: to explain, by name: one for each image.
      num_probes: M of the propagated impact.
      key: randomness of the probes and of the random map.
      model: it has a head.

    Returns:
      By the names of ``map_names``: the impact propagated to the pooled
      representation; the signed effect on the logit of each of the classes; and the
      controls attention (summed over layers), rollout and random.
    """
    prefix = model.num_prefix_tokens
    options = {"prefix_tokens": True, "batch_size": len(images)}
    (knockout,) = measure.propagate(
        model,
        params,
        images,
        target="pooled",
        key=key,
        num_probes=num_probes,
        **options,
    )
    own = [knockout.impact]
    for wanted in classes.values():
        own += measure.propagate_logit(model, params, images, classes=wanted, **options)

    def received(matrix: Float[Array, "*batch N N"]) -> Float[Array, "*batch P"]:
        row = matrix[..., 0, :] if prefix else matrix.mean(-2)
        return row[..., prefix:]

    controls = (
        received(attention.mean(2)).sum(0),
        received(indicators.attention_rollout(attention, num_prefix_tokens=0)[-1]),
        jax.random.uniform(key, (len(images), attention.shape[-1] - prefix)),
    )
    maps = (*(impact.sum((0, 2))[:, prefix:] for impact in own), *controls)
    return dict(zip(map_names(classes), maps, strict=True))


def _answer(model, logits, out) -> Answer:
    patches = out["tokens"][:, model.num_prefix_tokens :]
    pooled, patches = (x.astype(jnp.float32) for x in (out["pooled"], patches))
    return Answer(logits, pooled, patches)
