"""What cutting a whole set of interactions does: exactly in each layer, then onwards.

A set is what lies outside of ``keep``. Cut at once, its keys C of query i leave the
softmax to the keys S that stay, prefix tokens among them. One head's output moves from
``o_i`` to ``o_i(S) = sum_S a_ij v_j / sum_S a_ij``, which is by exactly

    o_i - o_i(S) = sum_C a_ij (v_j - o_i(S)) / sum_{S and C} a_ij

Written so, nothing cancels where the set holds little of the row, or nearly all. With
one key in C it is the displacement of `knockout`. A row that keeps no key is taken as
there: ``o_i(S)`` is then the mean value, which is what a softmax gives when all its
keys are masked.

To first order the set adds ``sum_i u_i . delta_i`` to a scalar whose gradient at the
residual stream is u, with ``delta_i`` the displacement of all heads through the output
kernel and LayerScale. Cuts of the same layer add with their signs: what two keys do may
cancel. That is why the impacts of single cuts, which have none, do not add up to the
impact of a set.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from wf_vit.arrays import shapes_of
from wf_vit.errors import UsageError
from wf_vit.indicators import checks
from wf_vit.indicators.arithmetic import einsum, join, power, split, sqrt
from wf_vit.shapes import Attention, Values


class SetEffect(NamedTuple):
    """What a set of interactions adds to the model's output y, to first order.

    Attributes:
      effect: for each probe and layer, signed, in units of ``probe . y``: positive
        where the set raises it, so that it falls by about as much when the set is cut.
      norm: of the displacement of y, in units of y, without the axis of layers; with
        an axis in front if there were several exponents of repair.
    """

    effect: Float[Array, " probes *batch"]
    norm: Float[Array, "*repair_images"]

    __repr__ = shapes_of


@checks.checked("num_prefix_tokens", "repair")
def set_effect(
    attention: Attention,
    values: Values,
    output_kernel: Float[Array, "*layer H K D"],
    gradients: Float[Array, "probes *batch N D"],
    residual_scale: Float[Array, "*scale_layer D"] | None = None,
    *,
    keep: Bool[Array, "*batch H P P"] | Bool[Array, "*batch P P"],
    num_prefix_tokens: int,
    repair: float | tuple[float, ...] = 0.0,
) -> SetEffect:
    """Returns what all interactions outside of ``keep`` do together, to first order.

    In one layer the norm is that of the first order: the root of the mean over probes
    of the squared effect e. In several the first order is ``(sum_l e_l)^2``. But what
    an early layer loses changes what the later ones do, so that their effects agree
    less than the gradients of the whole network say. So the products of different
    layers count by half (ours):

        norm^2 = mean over probes of (sum_l e_l^2 + (sum_l e_l)^2) / 2

    ``effect.sum(1)`` is the plain first order.

    A patch can make up for what it lost by listening again in later layers. The
    gradients count on that, also where the set does not let it listen. How much it
    matters differs between models, so it is an exponent to be chosen by real cuts
    (``repair``): with h_li the share of query i's attention that the set leaves in the
    layers after l, mean over these and over heads, the norm is that of

        e_l = sum_i h_li^-repair u_li . delta_li

    The gradients are those of the network left alone, so that all sets of an image
    share them. One set takes two products of attention and values, and one product of
    its displacement and the gradients of each probe: less than a forward pass, but not
    by much on a CPU. Averages of gradients along a path to the cut network would take
    backward passes for each set, which is more than the real cut does.

    Args:
      attention: as in `knockout_impact`, and so are the arguments not listed here.
      values: as in `knockout_impact`.
      output_kernel: as in `knockout_impact`.
      gradients: of ``probe . y`` with respect to the residual stream right after the
        attention of each layer was added, ``[M, ..., N, D]``, for M probes of
        independent random signs. For a scalar y one gradient is enough.
      residual_scale: as in `knockout_impact`.
      keep: the interactions between patches that are not cut, ``[..., P, P]`` for all
        heads or ``[..., H, P, P]``. Those with prefix tokens are never cut.
      num_prefix_tokens: as in `knockout_impact`.
      repair: the exponent above, 0 or more. Several give as many norms, ``[R, ...]``.

    Returns:
      The effect of each probe and layer, ``[M, ...]``, and the norm that they predict,
      ``[...]`` without the layers that ``output_kernel`` has in front.

    Raises:
      UsageError: shapes that do not fit, rows that are no distributions, NaN, or no
        exponent of 0 or more.
    """
    tokens = checks.count_tokens(attention, num_prefix_tokens)
    checks.check_shapes(attention, values, output_kernel, residual_scale)
    patches = tokens - num_prefix_tokens
    _check_sets(attention, output_kernel, gradients, keep, patches)
    if not (np.size(repair) and np.all(np.greater_equal(repair, 0))):
        raise UsageError(
            f"repair is {repair}, expected an exponent of 0 or more, or several "
            "in a tuple."
        )
    batch, layered = attention.shape[:-3], output_kernel.ndim == 4
    if keep.ndim < attention.ndim:
        keep = keep[..., None, :, :]
    kernel, exponents = split(output_kernel.astype(jnp.float32), (-3, -2, -1))
    exponents = exponents[..., 0, 0, 0]
    if residual_scale is not None:
        scale, more = split(residual_scale.astype(jnp.float32), -1)
        kernel = einsum("...hkd,...d->...hkd", kernel, scale)
        exponents = exponents + more[..., 0]
    if layered:
        exponents = exponents.reshape(-1, *(1,) * (len(batch) - 1))
    values, more = split(values.astype(jnp.float32), (-3, -2, -1))
    exponents = exponents + more[..., 0, 0, 0]
    gradients, more = split(gradients.astype(jnp.float32), (-2, -1))
    exponents = exponents[None] + more[..., 0, 0]

    def image(arrays, kernel):
        attention, values, keep = arrays
        moved, stays = _displacement(attention, values, keep, num_prefix_tokens)
        return einsum("hnk,hkd->nd", moved, kernel), stays.mean(0)

    def layer(arrays):
        *arrays, kernel = arrays
        return lax.map(lambda arrays: image(arrays, kernel), tuple(arrays))

    layers = batch[0] if layered else 1
    arrays = [
        x.reshape(layers, -1, *x.shape[len(batch) :])
        for x in (attention, values, keep)
    ]  # fmt: skip
    kernel = kernel if layered else kernel[None]
    moved, stays = lax.map(layer, (*arrays, kernel))
    moved = moved.reshape(gradients.shape[1:])
    by_query = einsum("m...nd,...nd->m...n", gradients, moved)
    effect = by_query.sum(-1)

    def norm(exponent):
        counted = effect
        if layered and exponent:
            left = _left_later(stays.reshape(moved.shape[:-1]))
            counted = einsum("m...n,...n->m...", by_query, left**-exponent)
        return _norm(counted, exponents, layered)

    several = isinstance(repair, tuple)
    norms = jnp.stack([norm(r) for r in repair]) if several else norm(repair)
    return SetEffect(join(effect, exponents), norms)


def _displacement(
    attention: Float[Array, "H N N"],
    values: Float[Array, "N H K"],
    keep: Bool[Array, "#H P P"],
    num_prefix_tokens: int,
) -> tuple[Float[Array, "H N K"], Float[Array, "H N"]]:
    """Returns how far the cut moves each head's output, and what of its rows stays.

    These are ``o_i - o_i(S)``, and the share of the row's attention.
    """
    values = values.swapaxes(0, 1)
    # No cut notices what all values share, and without it less cancels.
    values = values - values.mean(1, keepdims=True)
    prefix = (num_prefix_tokens, 0)
    keep = jnp.pad(keep, [(0, 0), prefix, prefix], constant_values=True)
    attention = attention.astype(jnp.float32)
    kept = jnp.where(keep, attention, 0.0)
    cut = jnp.where(keep, 0.0, attention)
    kept_sum, cut_sum = (x.sum(-1, keepdims=True) for x in (kept, cut))
    # The mean of all values, where nothing is kept, is 0.
    left = einsum("hij,hjk->hik", kept, values)
    left = left / jnp.where(kept_sum > 0, kept_sum, 1.0)
    lost = einsum("hij,hjk->hik", cut, values)
    whole = kept_sum + cut_sum
    return (lost - cut_sum * left) / whole, (kept_sum / whole)[..., 0]


def _left_later(stays: Float[Array, "L *images N"]) -> Float[Array, "L *images N"]:
    """Returns the share of each row's attention that stays, in the layers after each.

    After the last layer all does. A row that keeps nothing counts as one that keeps one
    of N equal keys.
    """
    later = jnp.cumsum(stays[::-1], 0)[::-1] - stays
    count = jnp.arange(len(stays))[::-1].reshape(-1, *(1,) * (stays.ndim - 1))
    mean = jnp.where(count > 0, later / jnp.maximum(count, 1), 1.0)
    return jnp.maximum(mean, 1 / stays.shape[-1])


def _norm(effect, exponents, layered):
    """Returns the root of the mean over probes of squared effects."""
    axes = (0, 1) if layered else (0,)
    # Numbers by one power of two, so that they can be added.
    largest = exponents.max(axes, keepdims=True)
    effect = effect * power(exponents - largest)
    numbers, more = split(effect, axes)
    square = jnp.square(numbers)
    if layered:
        # Half of what the products of different layers add.
        square = (square.sum(1) + jnp.square(numbers.sum(1))) / 2
    total = square.mean(0)
    return join(sqrt(total), (largest + more).reshape(total.shape))


def _check_sets(attention, output_kernel, gradients, keep, patches):
    """Raises UsageError unless gradients and what is kept are those of the layers."""
    *batch, heads, tokens, _ = attention.shape
    expected = (*batch, tokens, output_kernel.shape[-1])
    if gradients.shape[1:] != expected or not gradients.shape[0]:
        raise UsageError(
            f"gradients has shape {gradients.shape}, expected [M, ..., N, D] = M in "
            f"front of {expected}, with an M of at least 1: stack the gradients of the "
            "probes, in the layers of attention."
        )
    if keep.dtype != bool:
        raise UsageError(
            f"keep is {keep.dtype}, expected bool, True where an interaction is kept: "
            "compare scores with a threshold, or use interventions.keep_strongest."
        )
    shapes = (*batch, patches, patches), (*batch, heads, patches, patches)
    if keep.shape not in shapes:
        raise UsageError(
            f"keep has shape {keep.shape}, expected [..., P, P] = {shapes[0]}, or "
            f"[..., H, P, P] = {shapes[1]}, beside attention of shape "
            f"{attention.shape} with {tokens - patches} prefix tokens: leave those "
            "out, they are never cut."
        )
