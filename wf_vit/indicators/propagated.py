"""What cutting each interaction does to the model's output, from backward passes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import digamma, polygamma
from jaxtyping import Array, Float, Int

from wf_vit.arrays import shapes_of, takes_arrays
from wf_vit.errors import UsageError
from wf_vit.indicators import checks
from wf_vit.indicators.arithmetic import join, power, split, sqrt
from wf_vit.indicators.knockout import knockout_impact, map_effects
from wf_vit.shapes import Attention, Values


class PropagatedKnockout(NamedTuple):
    """What cuts do to the model's output, and how sure that is.

    Attributes:
      impact: estimated norm of the output's displacement, ``[..., P, P]``.
      relative_error: standard error of the mean over probes, before any shrinking,
        relative to ``impact``. Measured over the probes and pooled over each matrix so
        that strong interactions dominate, ``[...]``. It falls with the square root of
        the number of probes.
      heads: the same of cuts in one head at a time, ``[..., H, P, P]`` and
        ``[..., H]``; None unless it was asked for.
    """

    impact: Float[Array, "*batch P P"]
    relative_error: Float[Array, "*batch"]
    heads: "PropagatedKnockout | None" = None

    __repr__ = shapes_of


@takes_arrays(*checks.ARRAYS)
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
    shrink: bool = True,
    block_size: int = 256,
) -> PropagatedKnockout:
    """Returns how far each cut moves the model's output y, to first order.

    With J_i the Jacobian of y with respect to the residual stream of token i, the
    impact is ``|J_i delta_ij|`` (ours). Its square is the mean of
    ``(w . J_i delta_ij)^2`` over probes w of independent random signs (Hutchinson
    1990), and one backward pass gives ``w . J_i`` at every layer and token. Probes
    are streamed: memory does not grow with their number. For a scalar y a single
    backward pass and `knockout_effect` are exact, and keep the sign.

    A few probes make a noisy mean. With ``shrink`` (ours) it is drawn towards what
    the impact would be if J_i stretched all directions alike, the exact norm of
    ``delta_ij`` times the size of J_i, of which the probes say far more. Both are
    taken as logarithms. How far is for each matrix to tell: by the variance of the
    noise, which M alone decides, as a share of the variance of the difference between
    the two (James and Stein 1961). Where J_i stretches unlike, or probes are many,
    little changes. On a DINOv2 ViT-S/14 it raises the rank correlation of 16 probes
    with real cuts from .979 to .986, for the CLS token from .986 to .988
    (results/faithfulness.md).

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
      per_head: also cut one head at a time; the backward passes are the same.
      shrink: whether to draw the mean over probes towards the local norm, as above;
        False for the mean alone, whose square is unbiased.
      block_size: as in `knockout_impact`.

    Returns:
      The impact in units of y, with its error, and with ``per_head`` that of each
      head.

    Raises:
      UsageError: fewer than 2 probes, or as in `knockout_impact`.
    """
    if num_probes < 2:
        raise UsageError(
            f"num_probes is {num_probes}, expected at least 2 (16 is a good start): "
            "a scalar output needs no probes, use knockout_effect."
        )
    patches = checks.count_tokens(attention, num_prefix_tokens) - num_prefix_tokens
    layer = (attention, values, output_kernel)
    options = {"num_prefix_tokens": num_prefix_tokens, "block_size": block_size}

    def moments(effects):
        """Returns the sums over the probes of squares and of fourth powers."""
        numbers, more = split(effects, (0, -2, -1))
        square = jnp.square(numbers)
        fourth = jnp.square(square).sum((0, -2, -1))[..., None, None]
        return _Sums(square.sum(0), fourth, more[0])

    def of_probes(probes):
        gradients = jax.vmap(cotangents, out_axes=-3)(probes)

        def of_image(effects):
            if not per_head:
                return moments(effects), None
            # In all heads at once: their sum, before it is squared.
            return moments(sum(jnp.unstack(effects, axis=1))), moments(effects)

        (fused, heads), exponents = map_effects(
            of_image,
            attention,
            values,
            output_kernel,
            gradients,
            residual_scale,
            **options,
            per_head=per_head,
        )
        exponents = exponents[..., None, None]
        fused = fused._replace(exponents=fused.exponents + exponents)
        if per_head:
            exponents = heads.exponents + exponents[..., None]
            heads = heads._replace(exponents=exponents)
        numbers, exponents = split(gradients.astype(jnp.float32), (-3, -2, -1))
        stretch = jnp.square(numbers).mean(-1, keepdims=True).sum(-3)
        stretch, exponents = stretch[..., num_prefix_tokens:, :], exponents[..., 0]
        zeros = jnp.zeros_like(exponents, stretch.dtype)
        return fused, heads, _Sums(stretch, zeros, exponents)

    def add_probes(sums, probes):
        together = jax.tree.map(
            _Sums.plus,
            sums,
            of_probes(probes),
            is_leaf=lambda x: isinstance(x, _Sums),
        )
        return together, None

    def estimate(sums, stretch, per_head):
        square, fourth = sums.square / num_probes, sums.fourth[..., 0, 0] / num_probes
        pooled = jnp.square(square).sum((-1, -2))
        variance = (fourth - pooled) / (num_probes - 1)
        # Relative to it, the error of a square root is half that of the square.
        error = 0.5 * sqrt(variance / jnp.where(pooled > 0, pooled, 1.0))
        if shrink:
            local = knockout_impact(
                *layer, residual_scale, per_head=per_head, **options
            )
            # A guess up to a factor.
            local, _ = split(local, (-2, -1))
            stretch = stretch.square / num_probes
            stretch = stretch[..., None, :, :] if per_head else stretch
            square = _shrink(square, stretch * jnp.square(local), num_probes)
        return PropagatedKnockout(join(sqrt(square), sums.exponents), error)

    batch = attention.shape[:-3]

    def zeros(*batch, width=patches):
        least = jnp.full((*batch, 1, 1), _NOTHING)
        square = jnp.zeros((*batch, patches, width), jnp.float32)
        return _Sums(square, jnp.zeros((*batch, 1, 1), jnp.float32), least)

    heads = zeros(*attention.shape[:-2]) if per_head else None
    start = (zeros(*batch), heads, zeros(*batch, width=1))
    probes = jnp.arange(num_probes).reshape(-1, math.gcd(num_probes, _TOGETHER))
    sums, _ = lax.scan(add_probes, start, probes)
    fused, heads, stretch = sums
    result = estimate(fused, stretch, per_head=False)
    if per_head:
        result = result._replace(heads=estimate(heads, stretch, per_head=True))
    return result


# Probes whose backward passes run together, if their number can be divided so: products
# of larger matrices, and what a cut does to the heads is computed once for all of them.
_TOGETHER = 4
# An exponent below those of all numbers.
_NOTHING = -1000


class _Sums(NamedTuple):
    """Sums of squares and of fourth powers, of numbers times ``2 ** exponents``.

    The fourth power of 1e10 is out of float32's range.
    """

    square: Float[Array, "*batch P columns"]
    fourth: Float[Array, "*batch 1 1"]
    exponents: Int[Array, "*batch 1 1"]

    def plus(self, other: "_Sums") -> "_Sums":
        """Returns the sums of both, by the larger of the exponents."""
        largest = jnp.maximum(self.exponents, other.exponents)
        mine, theirs = self.exponents - largest, other.exponents - largest
        return _Sums(
            self.square * power(2 * mine) + other.square * power(2 * theirs),
            self.fourth * power(4 * mine) + other.fourth * power(4 * theirs),
            largest,
        )


def _shrink(
    mean: Float[Array, "*batch P P"],
    guess: Float[Array, "*batch P P"],
    num_probes: int,
) -> Float[Array, "*batch P P"]:
    """Draws means of M squares towards a guess known up to a factor, in logarithms.

    The noise of the mean of M squared normal variables is a factor, a chi-square
    variable over M, whose logarithm has the moments below.
    """
    known = (mean > 0) & (guess > 0)
    count = jnp.maximum(known.sum((-1, -2), keepdims=True), 1)
    ratio = jnp.where(known, mean, 1.0) / jnp.where(known, guess, 1.0)
    limits = jnp.finfo(jnp.float32)
    ratio = jnp.log(jnp.clip(ratio, limits.tiny, limits.max))
    centre = ratio.sum((-1, -2), keepdims=True) / count
    apart = jnp.where(known, ratio - centre, 0.0)
    variance = jnp.square(apart).sum((-1, -2), keepdims=True) / count
    half = num_probes / 2
    noise = polygamma(1, half)
    weight = jnp.minimum(1.0, noise / jnp.where(variance > 0, variance, noise))
    # The guess was fitted to logarithms, which noise lowers in the mean.
    lowered = jnp.log(half) - digamma(half)
    # In two steps, neither of which leaves the range if the product does not.
    factor = jnp.exp(0.5 * weight * (lowered - apart))
    shrunk = jnp.minimum(mean * factor * factor, limits.max)
    return jnp.where(known, shrunk, mean)
