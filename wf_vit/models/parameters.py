"""A model's parameters in the form that the indicators take them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wf_vit.indicators.arithmetic import einsum
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params


class OutputProjection(NamedTuple):
    """How the heads of the chosen layers write to the residual stream.

    Attributes:
      output_kernel: slice of the output projection that belongs to each head.
      residual_scale: LayerScale after it, or None if the model has none.
    """

    output_kernel: Float[Array, "L H K D"]
    residual_scale: Float[Array, "L D"] | None

    @property
    def scaled(self) -> Float[Array, "L H K D"]:
        """The output kernel, with LayerScale."""
        if self.residual_scale is None:
            return self.output_kernel
        return self.output_kernel * self.residual_scale[:, None, None]


def output_projection(
    model: ViT, params: Params, layers: Sequence[int] | None = None
) -> OutputProjection:
    """Returns the parameters that belong to a recording of the same layers."""
    blocks = [params[f"blocks_{layer}"] for layer in model.check_layers(layers)]
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
    output_kernel = output_projection(model, params).scaled
    blocks = [params[f"blocks_{layer}"] for layer in range(model.depth)]
    norms = jnp.stack([block["attention_norm"]["scale"] for block in blocks])
    kernels = jnp.stack([block["attention"]["value"]["kernel"] for block in blocks])
    kernels = kernels * norms[..., None, None]
    if model.norm_kind == "layer":
        # It takes the mean of a token away first.
        kernels = kernels - kernels.mean(1, keepdims=True)
    read = einsum("ldhj,ldhk->lhjk", kernels, kernels)
    written = einsum("lhjd,lhkd->lhjk", output_kernel, output_kernel)
    return jnp.sqrt((read * written).sum((-1, -2)) / model.width)
