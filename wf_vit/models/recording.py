"""A forward pass that is recorded, and differentiated between its layers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wf_vit.arrays import check_keys, shapes_of
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Keys, Params


class Recording(NamedTuple):
    """One batch of images, as the chosen layers saw it.

    Attributes:
      attention: weights after the softmax; rows sum to 1.
      values: value vectors.
      scale: what the layer norm before each chosen layer divides each token by, and,
        last, the final norm.
      gaussians: the learned fields of a model that has them, as in
        ``learned_fields.LearnedFields``; else None.
      tokens: the residual stream after the final norm.
      pooled: what the head reads.
      logits: of the head, or the pooled representation of a model without one.
    """

    attention: Float[Array, "L B H N N"]
    values: Float[Array, "L B N H K"]
    scale: Float[Array, "layers_and_1 B N"]
    gaussians: Float[Array, "L B H P 4"] | None
    tokens: Float[Array, "B N D"]
    pooled: Float[Array, "B R"]
    logits: Float[Array, "B C"]

    __repr__ = shapes_of


def bytes_per_image(model: ViT, layers: Sequence[int] | None = None) -> int:
    """Returns the size in bytes of one image in a ``Recording``, all in float32.

    ``4 (L H N^2 + (L + 1) N (D + 1) + R + C)``, with R the width of what the head
    reads: 24.2 MB for all layers of a ViT-S/14 at 224 pixels, nearly all of it
    attention, which grows with the fourth power of the image's side. Learned fields
    add ``16 L H P``. While it is computed a batch takes as much again, and one that is
    propagated about 8 times as much, whatever the number of probes.
    """
    count = len(model.check_layers(layers))
    tokens = model.num_tokens
    attention = count * model.num_heads * tokens**2
    streams = (count + 1) * tokens * (model.width + 1)
    pooled = model.representation_size or model.width * (1 + (model.pool == "cls_mean"))
    pooled += model.width * model.distillation_token
    return 4 * (attention + streams + pooled + (model.num_classes or pooled))


def forward(
    model: ViT,
    layers: tuple[int, ...],
    variables: dict[str, Any],
    images: Images,
) -> tuple[dict[str, Array], Recording]:
    """Runs a model on a batch, and records some of its layers.

    Args:
      model: the model.
      layers: to record, in the order that is wanted.
      variables: of the module: its "params", and perhaps "perturbations".
      images: normalised.

    Returns:
      The outputs by name, "tokens", "cls", "pooled" and "logits"; and the recording.
    """
    logits, out = model.apply(variables, images, record=layers)
    tokens = out["tokens"].astype(jnp.float32)
    outputs = {"tokens": tokens, "cls": tokens[:, 0], "logits": logits}
    outputs["pooled"] = out["pooled"].astype(jnp.float32)
    records = [out["records"][layer] for layer in layers]
    gaussians = [out["fields"][n].gaussians for n in layers if n in out["fields"]]
    return outputs, Recording(
        attention=jnp.stack([r["attention"] for r in records]),
        values=jnp.stack([r["values"] for r in records]),
        scale=jnp.stack([*(r["scale"] for r in records), out["scale"]]),
        gaussians=jnp.stack(gaussians) if gaussians else None,
        tokens=tokens,
        pooled=outputs["pooled"],
        logits=logits,
    )


def no_perturbations(
    model: ViT, count: int
) -> dict[str, dict[str, Float[Array, "B N D"]]]:
    """Returns zeros to be added to the residual stream after each layer's attention.

    The gradient with respect to them is that with respect to the stream. They are the
    module's variables "perturbations", known without tracing it.

    Args:
      model: the model.
      count: of images.
    """
    zeros = jnp.zeros((count, model.num_tokens, model.width), model.dtype)
    return {f"blocks_{n}": {"after_attention": zeros} for n in range(model.depth)}


def linearize(
    model: ViT,
    layers: tuple[int, ...],
    params: Params,
    images: Images,
    read: Callable[[dict[str, Array]], Array],
) -> tuple[Array, Callable[[Array], Float[Array, "L B N D"]], Recording]:
    """Runs a model once, to be differentiated with respect to its residual stream.

    Args:
      model: the model.
      layers: to record and to take gradients at, in the order that is wanted.
      params: the model's.
      images: normalised.
      read: from the outputs of ``forward`` to the array that is differentiated.

    Returns:
      What ``read`` makes of the outputs; the function that maps its cotangent to the
      gradients right after the attention of each layer; and the recording.
    """
    zeros = no_perturbations(model, len(images))
    names = [f"blocks_{layer}" for layer in layers]

    def run(perturbed):
        variables = {"params": params, "perturbations": zeros | perturbed}
        outputs, recording = forward(model, layers, variables, images)
        return read(outputs), recording

    output, pull_back, recording = jax.vjp(
        run, {name: zeros[name] for name in names}, has_aux=True
    )

    def gradients(cotangent):
        (gradient,) = pull_back(cotangent)
        return jnp.stack([gradient[name]["after_attention"] for name in names])

    return output, gradients, recording


def random_signs(
    output: Float[Array, "B ..."], key: Keys
) -> Callable[[Array], Float[Array, "B ..."]]:
    """Returns a function from the number of a probe to its random signs.

    Args:
      output: what they are multiplied by; only its shape matters.
      key: one ``[]`` for all images or ``[B]`` for each. An image's signs depend on its
        own key, or on the one key and the place in the batch, but not on the others.

    Raises:
      UsageError: keys of another number of images.
    """
    check_keys(key, output.shape[0])
    if not key.ndim:
        key = jax.vmap(lambda place: jax.random.fold_in(key, place))(
            jnp.arange(output.shape[0])
        )

    def signs(probe):
        def of_image(key):
            own = jax.random.fold_in(key, probe)
            return jax.random.rademacher(own, output.shape[1:], output.dtype)

        return jax.vmap(of_image)(key)

    return signs
