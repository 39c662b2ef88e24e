"""What cutting one interaction does: exactly in its layer, to first order beyond it.

Cutting the interaction i<-j masks key j for query i, so that the softmax
renormalises the rest of the row. With ``o_i = sum_j a_ij v_j`` one head's output
moves by exactly

    o_i - o_i^(without j) = a_ij / (1 - a_ij) * (v_j - o_i)

and the residual stream of token i by ``delta_ij``, the sum over heads of that
vector times the head's slice of the output kernel and LayerScale. As ``a_ij -> 1``
this is a huge number times a vanishing one, and at most one key of a row can be
there. So the top key of each row is taken apart: with m_i the output without it,
its cut moves the head by ``a_ij (v_j - m_i)``, in which nothing cancels. A row's
only key leaves nothing to attend to: m_i is then the mean value, which is what a
softmax gives when all its keys are masked.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wf_vit.indicators import checks
from wf_vit.indicators.arithmetic import (
    einsum,
    join,
    normalize_rows,
    row_products,
    split,
    sqrt,
)
from wf_vit.shapes import Attention, Values


@checks.checked("num_prefix_tokens", "per_head", "normalize", "block_size")
def knockout_impact(
    attention: Attention,
    values: Values,
    output_kernel: Float[Array, "*layer H K D"],
    residual_scale: Float[Array, "*scale_layer D"] | None = None,
    *,
    num_prefix_tokens: int,
    per_head: bool = False,
    normalize: bool = False,
    block_size: int = 256,
) -> Float[Array, "*out P P"]:
    """Returns how far each cut moves the residual stream of its layer, exactly.

    The norm of ``delta_ij`` (see the top of this module; ours) for all interactions
    at once, without a further forward pass. Its square is a sum over pairs of heads
    of products ``(v_j - o_i) W_h W_g^T (v_j - o_i)^T``, and ``W_h W_g^T`` is only
    K by K: no array is larger than H rows of attention for each query of a block.

    Args:
      attention: weights after the softmax, ``[..., H, N, N]``.
      values: value vectors of the same layers, ``[..., N, H, K]``.
      output_kernel: ``[H, K, D]`` for one layer, or ``[L, H, K, D]`` with the
        layers in front of attention and values.
      residual_scale: LayerScale, ``[D]`` or ``[L, D]``.
      num_prefix_tokens: tokens before the patches, which are dropped.
      per_head: cut one head at a time, ``[..., H, P, P]``, not all heads at once.
      normalize: divide each row by its sum; a row of zeros stays.
      block_size: queries computed at once, which bounds the memory.

    Returns:
      Euclidean norm, in units of the residual stream, ``[..., P, P]``.

    Raises:
      UsageError: shapes that do not fit, rows that are no distributions, NaN.
    """
    checks.count_tokens(attention, num_prefix_tokens)
    checks.check_shapes(attention, values, output_kernel, residual_scale)
    axis = (-2, -1) if per_head else (-3, -2, -1)
    kernel, exponents = _scaled_kernel(output_kernel, residual_scale, axis)

    impact_of = partial(
        _image_impact, first_key=num_prefix_tokens, block_size=block_size
    )

    def image(gram, attention, values):
        rows = attention[:, num_prefix_tokens:]
        if not per_head:
            return impact_of(gram, rows, values)
        # A cut in one head is a cut in all heads of a layer that has one head.
        return jax.vmap(impact_of)(gram, rows[:, None], values[:, None])

    if per_head:
        gram = einsum("...hkd,...hld->...hkl", kernel, kernel)[..., None, None, :, :]
    else:
        gram = einsum("...hkd,...gld->...hgkl", kernel, kernel)
    layered = kernel.ndim == 4
    if per_head:
        exponents = exponents[..., None, None]
    options = {"layered": layered, "per_head": per_head}
    impact, exponents = _map_images(
        image, gram, exponents, attention, values, **options
    )
    if not per_head:
        exponents = exponents[..., None, None]
    impact = join(impact, exponents)
    return normalize_rows(impact) if normalize else impact


@checks.checked("num_prefix_tokens", "per_head", "block_size")
def knockout_effect(
    attention: Attention,
    values: Values,
    output_kernel: Float[Array, "*layer H K D"],
    cotangents: Float[Array, "*batch N D"],
    residual_scale: Float[Array, "*scale_layer D"] | None = None,
    *,
    num_prefix_tokens: int,
    per_head: bool = False,
    block_size: int = 256,
) -> Float[Array, "*out P P"]:
    """Returns what every interaction adds to a scalar y, to first order, signed.

    ``g_i . delta_ij`` with g the gradient of y: positive where the interaction
    raises y, so that y falls by about as much when it is cut (ours).

    Args:
      attention: as in `knockout_impact`, and so are the arguments not listed here.
      values: as in `knockout_impact`.
      output_kernel: as in `knockout_impact`.
      cotangents: gradient of y with respect to the residual stream right after the
        attention of each layer was added, ``[..., N, D]``.
      residual_scale: as in `knockout_impact`.
      num_prefix_tokens: as in `knockout_impact`.
      per_head: the effect in each head alone; the fused effect is their sum.
      block_size: as in `knockout_impact`.

    Returns:
      The effect in units of y, ``[..., P, P]`` or ``[..., H, P, P]``.

    Raises:
      UsageError: shapes that do not fit, rows that are no distributions, NaN.
    """
    checks.count_tokens(attention, num_prefix_tokens)
    checks.check_shapes(attention, values, output_kernel, residual_scale, cotangents)
    effect, exponents = map_effects(
        lambda effects: effects[0],
        attention,
        values,
        output_kernel,
        cotangents[..., None, :, :],
        residual_scale,
        num_prefix_tokens=num_prefix_tokens,
        per_head=per_head,
        block_size=block_size,
    )
    axes = range(exponents.ndim, effect.ndim)
    return join(effect, jnp.expand_dims(exponents, tuple(axes)))


def map_effects(
    function: Callable[[Array], Any],
    attention: Attention,
    values: Values,
    output_kernel: Float[Array, "*layer H K D"],
    cotangents: Float[Array, "*batch M N D"],
    residual_scale: Float[Array, "*scale_layer D"] | None,
    *,
    num_prefix_tokens: int,
    per_head: bool,
    block_size: int,
) -> tuple[Any, Int[Array, "*batch"]]:
    """Applies a function to the effects on M scalars, an image of a layer at a time.

    What a cut does to the outputs of the heads is computed once for all of them. The
    arguments are those of `knockout_effect`, which checks them.

    Args:
      function: takes effects, ``[M, P, P]``, or with ``per_head`` ``[M, H, P, P]``.
      attention: of all heads.
      values: of all tokens.
      output_kernel: of one layer, or of those in front.
      cotangents: gradients of M scalars.
      residual_scale: LayerScale, or None.
      num_prefix_tokens: tokens before the patches.
      per_head: whether the function takes the effect in each head.
      block_size: queries computed at once.

    Returns:
      What the function returns, ``[...]`` in front, and the power of two that its
      effects are to be multiplied by.
    """

    def image(kernel, attention, values, cotangents):
        def block_effects(rows, seen):
            cut = _cut(rows, values)
            seen = seen.reshape(*seen.shape[:2], len(cotangents), -1)

            def effect(seen):
                products = einsum("hqk,hnk->hqn", seen, values)
                output = row_products(seen, cut.output)
                others = cut.ratio * (products - output[..., None])
                top = cut.share * row_products(seen, cut.shift)
                effect = jnp.where(cut.is_top, top[..., None], others)
                return effect if per_head else sum(effect)

            return jnp.stack([effect(of_one) for of_one in jnp.unstack(seen, axis=2)])

        rows = attention[:, num_prefix_tokens:]
        cotangents = cotangents[:, num_prefix_tokens:]
        # The cotangents as each head sees them, through its slice of the kernel.
        seen = einsum("hkd,mnd->hnmk", kernel, cotangents)
        seen = seen.reshape(*seen.shape[:2], -1)
        effects = _map_queries(block_effects, block_size, rows, seen)
        return function(effects[..., num_prefix_tokens:])

    kernel, exponents = _scaled_kernel(output_kernel, residual_scale, (-3, -2, -1))
    arrays = (attention, values, cotangents)
    layered = kernel.ndim == 4
    return _map_images(image, kernel, exponents, *arrays, layered=layered)


class _Cut(NamedTuple):
    """What cutting each key of each query does to the output of each head.

    It moves by ``ratio * (v_j - output)``, and at the top key, where ``ratio`` is 0,
    by ``share * shift``.
    """

    top: Int[Array, "H Q"]
    is_top: Bool[Array, "H Q N"]
    share: Float[Array, "H Q"]
    ratio: Float[Array, "H Q N"]
    output: Float[Array, "H Q K"]
    shift: Float[Array, "H Q K"]


def _cut(rows: Float[Array, "H Q N"], values: Float[Array, "H N K"]) -> _Cut:
    keys = lax.broadcasted_iota(int, rows.shape, 2)
    top_weight = rows.max(-1)
    # The first key of that weight; argmax is several times slower on CPUs.
    top = jnp.where(rows == top_weight[..., None], keys, rows.shape[-1] - 1).min(-1)
    is_top = keys == top[..., None]
    rest = jnp.where(is_top, 0.0, rows)
    # The sum of the others stands in for 1 - a, which would cancel at the top key.
    rest_sum = rest.sum(-1)
    total = rest_sum + top_weight
    # The gradient of their mean is in inverse proportion to their sum: none where that
    # would leave float32's range, and no square of the sum on the way.
    rest = jnp.where(rest_sum[..., None] < 1e-30, lax.stop_gradient(rest), rest)
    divisor = jnp.where(rest_sum > 0, rest_sum, 1.0)[..., None]
    near = lax.stop_gradient(jnp.maximum(divisor, 1e-30))
    without_top = einsum("hqn,hnk->hqk", rest, values) / near / (divisor / near)
    shift = jnp.take_along_axis(values, top[..., None], 1) - without_top
    share = top_weight / total
    return _Cut(
        top=top,
        is_top=is_top,
        share=share,
        ratio=rest / (total[..., None] - rest),
        output=without_top + share[..., None] * shift,
        shift=shift,
    )


def _image_impact(
    gram: Float[Array, "H H K K"],
    rows: Float[Array, "H Q N"],
    values: Float[Array, "H N K"],
    *,
    first_key: int,
    block_size: int,
) -> Float[Array, "Q keys"]:
    """Returns the norms of ``delta_ij`` of one image in one layer.

    Its square is a sum over pairs of heads g <= h, [p]: of the products of
    ``(v_j - o_i) W`` in the two heads, expanded into those of values and outputs.
    """
    g, h = np.triu_indices(values.shape[0])
    pairs = np.arange(len(g))
    multiplicity = np.where(g == h, 1.0, 2.0).astype(np.float32)
    gram_of_pairs = gram[g, h]
    keys = values[:, first_key:]
    seen_keys = einsum("pnk,pkl->pnl", keys[g], gram_of_pairs)
    key_products = row_products(seen_keys, keys[h])

    def block_impact(rows):
        cut = _cut(rows, values)
        ratio = cut.ratio[..., first_key:]
        seen_output = einsum("gqk,hgkl->hgql", cut.output, gram.swapaxes(0, 1))
        output_products = row_products(seen_output[h, g], cut.output[h])
        cross = einsum("hgqk,hnk->hgqn", seen_output, keys)
        # The part of the heads of which j is not the top key.
        square = sum(
            (multiplicity[p] * ratio[g[p]] * ratio[h[p]])
            * (
                key_products[p][None]
                + output_products[p][:, None]
                - cross[g[p], h[p]]
                - cross[h[p], g[p]]
            )
            for p in pairs
        )

        # The part of the others: at the top key of head t, in head g or h, [t, p, Q].
        top = cut.top - first_key
        top = jnp.where(top < 0, keys.shape[1], top)  # Out of range: left out.
        seen_shift = einsum("pqk,pkl->pql", cut.shift[g], gram_of_pairs)
        both = row_products(seen_shift, cut.shift[h])
        other = keys.at[h[:, None], top[g]].get(mode="clip") - cut.output[h]
        only_g = row_products(seen_shift, other)
        other = seen_keys.at[pairs[:, None], top[h]].get(mode="clip")
        only_h = row_products(other - seen_output[h, g], cut.shift[h])
        queries = np.arange(rows.shape[1])
        share = jnp.where(top[:, None] == top[None], cut.share[None], 0.0)
        ratio = ratio.at[:, queries, top].get(mode="clip").swapaxes(0, 1)
        at_top = (
            share[:, g] * share[:, h] * both[None]
            + share[:, g] * ratio[:, h] * only_g[None]
            + ratio[:, g] * share[:, h] * only_h[None]
        )
        at_top = einsum("p,tpq->tq", multiplicity, at_top)
        at_top += square.at[queries, top].get(mode="clip")
        return sqrt(square.at[queries, top].set(at_top, mode="drop"))

    return _map_queries(block_impact, block_size, rows)


def _map_queries(function, block_size, *arrays):
    """Applies a function to blocks of queries: axis 1 of arrays, -2 of the result."""
    num_queries = arrays[0].shape[1]
    num_blocks = -(-num_queries // block_size)
    if num_blocks == 1:
        return function(*arrays)
    size = -(-num_queries // num_blocks)

    def split(x):
        # Real rows as padding: zeros would make NaN, which gradients spread.
        x = jnp.pad(x, [(0, 0), (0, num_blocks * size - num_queries), (0, 0)], "edge")
        return x.reshape(x.shape[0], num_blocks, size, -1).swapaxes(0, 1)

    blocks = lax.map(lambda block: function(*block), [split(x) for x in arrays])
    blocks = jnp.moveaxis(blocks, 0, -3)
    joined = blocks.reshape(*blocks.shape[:-3], num_blocks * size, blocks.shape[-1])
    return joined[..., :num_queries, :]


def _map_images(
    function, weights, exponents, attention, values, *arrays, layered, per_head=False
):
    """Applies a function to one image of one layer at a time, in float32.

    The function takes weights, attention ``[H, N, N]``, values ``[H, N, K]`` and the
    other arrays. It is linear in values, in the arrays, and in what the weights are
    made of, so that powers of two can be taken out: of each head ``per_head``, where
    the result has heads, else of all. Those of the weights are given. With ``layered``
    the weights have the layers in front, like the rest.

    Returns:
      What the function returns, and the powers of two that were taken out.
    """
    options = {"layered": False, "per_head": per_head}
    if layered:
        return lax.map(
            lambda layer: _map_images(function, *layer, **options),
            (weights, exponents, attention, values, *arrays),
        )
    batch = attention.shape[:-3]

    def image(arrays):
        attention, values, *others = (x.astype(jnp.float32) for x in arrays)
        values = values.swapaxes(0, 1)
        values, power = split(values, (1, 2) if per_head else (0, 1, 2))
        total = exponents + (power if per_head else power[0, 0, 0])
        # No cut notices what all values share, and without it less cancels.
        values = values - values.mean(1, keepdims=True)
        scaled = []
        for other in others:
            numbers, power = split(other, tuple(range(other.ndim)))
            scaled.append(numbers)
            total = total + power.reshape(())
        return function(weights, attention, values, *scaled), total

    flat = [x.reshape(-1, *x.shape[len(batch) :]) for x in (attention, values, *arrays)]
    result = lax.map(image, flat)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), result)


def _scaled_kernel(output_kernel, residual_scale, axis):
    """Returns the kernel with LayerScale, near 1, and the powers of two taken out."""
    kernel, exponents = split(output_kernel.astype(jnp.float32), axis)
    exponents = exponents.squeeze(axis)
    if residual_scale is None:
        return kernel, exponents
    scale, power = split(residual_scale.astype(jnp.float32), -1)
    power = power[..., 0]
    if exponents.ndim > power.ndim:
        power = power.reshape(power.shape + (1,) * (exponents.ndim - power.ndim))
    return einsum("...hkd,...d->...hkd", kernel, scale), exponents + power
