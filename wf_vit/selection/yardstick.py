"""How far the output of a model moves when what its heads hand on is changed."""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from wf_vit import measure
from wf_vit.errors import UsageError
from wf_vit.indicators.arithmetic import einsum
from wf_vit.models.parameters import output_projection
from wf_vit.models.recording import Recording, linearize, random_signs
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Keys, Params, Tokens


class Yardstick(NamedTuple):
    """What is to stay, and how far the model's output moves if it does not.

    Attributes:
      wanted: the outputs of the heads of the full model.
      root: of the metric: ``|x @ root|`` is the length of x in it.
      gain: the squared length of each query's own gradient, relative to the mean.
    """

    wanted: Float[Array, "*layer B H N K"]
    root: Float[Array, "*layer B H K K"]
    gain: Float[Array, "*layer B H N"]


def yardstick(
    model: ViT,
    params: Params,
    images: Images,
    target: str,
    key: Keys,
    num_probes: int,
) -> tuple[Yardstick, Recording]:
    """Returns the yardstick of all layers, and the recording of the full model."""
    measure.check_target(model, target)
    measure.check_images(images)
    if num_probes < 1:
        raise UsageError(
            f"num_probes is {num_probes}, expected 1 or more: 8 is enough."
        )
    return _measured(
        params, images, key, model=model, target=target, num_probes=num_probes
    )


@functools.partial(jax.jit, static_argnames=("model", "target", "num_probes"))
def _measured(
    params: Params,
    images: Images,
    key: Keys,
    *,
    model: ViT,
    target: str,
    num_probes: int,
) -> tuple[Yardstick, Recording]:
    layers = model.check_layers(None)
    output, gradients, recording = linearize(
        model, layers, params, images, operator.itemgetter(target)
    )
    signs = random_signs(output, key)
    kernel = output_projection(model, params).scaled

    def add_probe(sums, probe):
        seen = einsum("lhkd,lbnd->lbhnk", kernel, gradients(signs(probe)))
        matrix = einsum("lbhnk,lbhnj->lbhkj", seen, seen)
        return (sums[0] + matrix, sums[1] + jnp.square(seen).sum(-1)), None

    batch = recording.attention.shape[:3]
    width = kernel.shape[2]
    zeros = jnp.zeros((*batch, width, width)), jnp.zeros((*batch, model.num_tokens))
    (matrix, gain), _ = lax.scan(add_probe, zeros, jnp.arange(num_probes))
    squares, axes = jnp.linalg.eigh(matrix / (num_probes * model.num_tokens))
    squares = jnp.maximum(squares, 0.0)
    mean = squares.sum(-1, keepdims=True)
    gain = gain / num_probes / jnp.where(mean > 0, mean, 1.0)
    root = axes * jnp.sqrt(squares)[..., None, :]
    wanted = einsum("lbhij,lbjhk->lbhik", recording.attention, recording.values)
    return Yardstick(wanted, root, gain), recording


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def run_to(params: Params, images: Images, *, model: ViT, layer: int) -> Tokens:
    """Returns the residual stream before a layer of the full model."""
    variables = {"params": params}
    tokens = model.apply(variables, images, method="embed")
    return model.apply(variables, tokens, stop=layer, method="encode")[0]
