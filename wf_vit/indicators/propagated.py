"""What cutting each interaction does to the model's output, from backward passes."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from wf_vit.errors import UsageError
from wf_vit.indicators import checks
from wf_vit.indicators.arithmetic import sqrt
from wf_vit.indicators.knockout import knockout_effect
from wf_vit.shapes import Attention, Values


class PropagatedKnockout(NamedTuple):
    """What cuts do to the model's output, and how sure that is.

    Attributes:
      impact: estimated norm of the output's displacement, ``[..., P, P]``.
      relative_error: standard error of ``impact`` relative to it, measured over the
        probes and pooled over each matrix so that strong interactions dominate,
        ``[...]``. It falls with the square root of the number of probes.
    """

    impact: Float[Array, "..."]
    relative_error: Float[Array, "..."]


def propagated_knockout(
    attention: Attention,
    values: Values,
    output_kernel: Float[Array, "*layer H K D"],
    cotangents: Callable[[Int[Array, ""]], Float[Array, "*batch N D"]],
    residual_scale: Float[Array, "*scale_layer D"] | None = None,
    *,
    num_probes: int,
    num_prefix_tokens: int,
    per_head: bool = False,
    block_size: int = 256,
) -> PropagatedKnockout:
    """Returns how far each cut moves the model's output y, to first order.

    With J_i the Jacobian of y with respect to the residual stream of token i, the
    impact is ``|J_i delta_ij|`` (ours). Its square is the mean of
    ``(w . J_i delta_ij)^2`` over probes w of independent random signs (Hutchinson
    1990), and one backward pass gives ``w . J_i`` at every layer and token. Probes
    are streamed: memory does not grow with their number. For a scalar y a single
    backward pass and `knockout_effect` are exact, and keep the sign.

    Call this inside the ``jax.jit`` that also runs the model.

    Args:
      attention: as in `knockout_impact`, and so are the arguments not listed here.
      values: as in `knockout_impact`.
      output_kernel: as in `knockout_impact`.
      cotangents: maps the number of a probe, from 0, to the gradient of
        ``probe . y`` with respect to the residual stream right after the attention
        of each layer was added, ``[..., N, D]``.
      residual_scale: as in `knockout_impact`.
      num_probes: M, the number of backward passes, at least 2. Start with 16; a
        relative error r takes about ``M * (relative_error / r) ** 2``.
      num_prefix_tokens: as in `knockout_impact`.
      per_head: cut one head at a time, ``[..., H, P, P]``, not all heads at once.
      block_size: as in `knockout_impact`.

    Returns:
      The impact in units of y, with its error.

    Raises:
      UsageError: fewer than 2 probes, or as in `knockout_impact`.
    """
    if num_probes < 2:
        raise UsageError(
            f"num_probes is {num_probes}, expected at least 2 (16 is a good start): "
            "a scalar output needs no probes, use knockout_effect."
        )
    patches = checks.count_tokens(attention, num_prefix_tokens) - num_prefix_tokens

    def add_probe(sums, probe):
        effect = knockout_effect(
            attention,
            values,
            output_kernel,
            cotangents(probe),
            residual_scale,
            num_prefix_tokens=num_prefix_tokens,
            per_head=per_head,
            block_size=block_size,
        )
        squares, fourths = sums
        square = jnp.square(effect)
        return (squares + square, fourths + jnp.square(square).sum((-1, -2))), None

    batch = attention.shape[:-2] if per_head else attention.shape[:-3]
    zeros = (jnp.zeros((*batch, patches, patches)), jnp.zeros(batch))
    (squares, fourths), _ = lax.scan(add_probe, zeros, jnp.arange(num_probes))
    mean_square = squares / num_probes
    pooled = jnp.square(mean_square).sum((-1, -2))
    variance = (fourths / num_probes - pooled) / (num_probes - 1)
    # Relative to it, the error of a square root is half that of the square.
    error = 0.5 * sqrt(variance / jnp.where(pooled > 0, pooled, 1.0))
    return PropagatedKnockout(sqrt(mean_square), error)
