"""Maps of what in an image a prediction rests on, patch by patch.

Ours follow from the impact and the effect of interactions; the others are what people
use. Definitions that leave something open in the literature are written down here.
"""

from collections.abc import Collection, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wf_vit import fields, indicators, measure
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Labels, Params
from wf_vit.verify.subject import Case

# Steps of integrated gradients, by the midpoint rule.
IG_STEPS = 16


def map_names(kinds: Collection[str]) -> tuple[str, ...]:
    """Returns the names of ``importance_maps``, for classes of such names."""
    return (
        "impact",
        *(f"effect on {kind} class" for kind in kinds),
        *(f"integrated gradients, {kind} class" for kind in kinds),
        *(f"Grad-CAM, {kind} class" for kind in kinds),
        "attention",
        "rollout",
        "random",
    )


def importance_maps(
    case: Case, classes: Mapping[str, Labels]
) -> dict[str, Float[Array, "B P"]]:
    """Returns maps of the patches' importance for what the head reads.

    An indicator's map of patch j is the sum over the layers and over all other
    queries, prefix tokens included, of j's impact or effect (`fields.heard`).
    Attention's is what j receives from the CLS token, or from all patches if there is
    none, mean over heads.

    Args:
      case: the images, and a model with a head.
      classes: to explain, by name: one for each image.

    Returns:
      By the names of ``map_names``: the impact propagated to the pooled
      representation; of each of the classes the signed effect on its logit, its
      integrated gradients and its Grad-CAM; and the controls attention (summed over
      layers), rollout and random.
    """
    subject, key = case.subject, jax.random.fold_in(case.key, 2)
    model, params, images = subject.model, subject.params, case.images
    prefix, attention = model.num_prefix_tokens, case.attention
    knockout, _ = measure.propagate(
        model,
        params,
        images,
        target="pooled",
        key=key,
        num_probes=subject.num_probes,
        prefix_tokens=True,
    )
    found = {"impact": fields.heard(knockout.impact, prefix).sum(0)}
    for kind, wanted in classes.items():
        effect = measure.propagate_logit(
            model, params, images, classes=wanted, prefix_tokens=True
        )
        found[f"effect on {kind} class"] = fields.heard(effect, prefix).sum(0)
        found[f"integrated gradients, {kind} class"] = integrated_gradients(
            params, images, wanted, model=model
        )
        found[f"Grad-CAM, {kind} class"] = grad_cam(params, images, wanted, model=model)

    def received(matrix: Float[Array, "*batch N N"]) -> Float[Array, "*batch P"]:
        row = matrix[..., 0, :] if prefix else matrix.mean(-2)
        return row[..., prefix:]

    found["attention"] = received(attention.mean(2)).sum(0)
    rollout = indicators.attention_rollout(attention, num_prefix_tokens=0)
    found["rollout"] = received(rollout[-1])
    shape = (len(images), attention.shape[-1] - prefix)
    found["random"] = jax.random.uniform(key, shape)
    return {name: found[name] for name in map_names(classes)}


@partial(jax.jit, static_argnames=("model", "steps"))
def integrated_gradients(
    params: Params,
    images: Images,
    classes: Labels,
    *,
    model: ViT,
    steps: int = IG_STEPS,
) -> Float[Array, "B P"]:
    """Returns integrated gradients of a logit (Sundararajan et al. 2017), by patch.

    From the image's mean colour on a straight line to the image, by the midpoint rule,
    summed over the pixels and channels of each patch. The sum over patches is, up to
    the steps, by how much the logit differs between the two ends.
    """
    baseline = jnp.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)
    gradient = jax.grad(lambda x: _logits(params, x, classes, model).sum())

    def add(total, share):
        return total + gradient(baseline + share * (images - baseline)), None

    shares = (jnp.arange(steps) + 0.5) / steps
    total, _ = jax.lax.scan(add, jnp.zeros_like(images), shares)
    return by_patch((images - baseline) * total / steps, model)


@partial(jax.jit, static_argnames="model")
def grad_cam(
    params: Params, images: Images, classes: Labels, *, model: ViT
) -> Float[Array, "B P"]:
    """Returns Grad-CAM (Selvaraju et al. 2017) as it is carried over to transformers.

    The activations are the patch tokens before the last block; a channel's weight is
    the mean over patches of the logit's gradient; what is negative becomes 0.
    """
    variables = {"params": params}
    last = model.depth - 1
    tokens = model.apply(variables, images, method="embed")
    tokens, _ = model.apply(variables, tokens, stop=last, method="encode")

    def rest(tokens):
        tokens, _ = model.apply(variables, tokens, start=last, method="encode")
        logits, _ = model.apply(variables, tokens, method="readout")
        return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()

    prefix = model.num_prefix_tokens
    weights = jax.grad(rest)(tokens)[:, prefix:].mean(1)
    return jax.nn.relu(jnp.einsum("bpd,bd->bp", tokens[:, prefix:], weights))


def by_patch(pixels: Images, model: ViT) -> Float[Array, "B P"]:
    """Returns the sum over the pixels and channels of each patch."""
    rows, columns = model.grid
    height, width = model.patch_size
    blocks = pixels.reshape(-1, rows, height, columns, width, pixels.shape[-1])
    return blocks.sum((2, 4, 5)).reshape(-1, rows * columns)


def _logits(
    params: Params, images: Images, classes: Labels, model: ViT
) -> Float[Array, " B"]:
    logits = model.apply({"params": params}, images)[0]
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]
