"""How much each token matters to each other token, from recorded attention.

Every function maps arrays to arrays, is traceable, computes in float32 whatever
comes in, and takes any leading batch and layer axes; several layers lie in front:
``attention[L, B, H, i, j]``. The result keeps the interactions between patches,
``[..., P, P]``, or ``[..., H, P, P]`` with ``per_head``; ``num_prefix_tokens=0``
keeps all N tokens, CLS and registers included. Importing this module loads
neither Flax nor TensorFlow.

Shapes and options are always checked. Values are checked outside ``jax.jit`` only:
inside, NaN spreads along its row, and rows that do not sum to 1 are taken as if
divided by their sum where an interaction is cut, and as they are elsewhere.

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

import inspect
from collections.abc import Callable
from functools import partial, reduce, wraps
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wf_vit.errors import UsageError
from wf_vit.grid import Grid, distances, infer_grid
from wf_vit.shapes import Attention, Key, Values

Method = Literal["mean", "max", "std", "odds", "distance", "random"]
HeadFusion = Literal["mean", "max", "min"]

# Accelerators multiply float32 in fewer bits unless told otherwise.
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)

# A softmax in bfloat16 leaves rows up to 4e-3 away from 1.
_ROW_SUM_TOLERANCE = 1e-2


def _checked(*static: str):
    """Compiles a function of attention; checks the values it gets outside of jit."""

    def decorate(function):
        compiled = jax.jit(function, static_argnames=static)
        names = tuple(inspect.signature(function).parameters)

        @wraps(function)
        def checked(*args, **kwargs):
            # First, because tracing reports shapes and options that do not fit.
            result = compiled(*args, **kwargs)
            for name, value in (dict(zip(names, args, strict=False)) | kwargs).items():
                if name == "attention":
                    _check_distributions(value)
                elif name in _FINITE:
                    _check_finite(name, value)
            return result

        return checked

    return decorate


@_checked("num_prefix_tokens", "method", "per_head", "normalize", "grid")
def interaction_indicator(
    attention: Attention,
    *,
    num_prefix_tokens: int,
    method: Method = "mean",
    per_head: bool = False,
    normalize: bool = False,
    grid: Grid | None = None,
    key: Key | None = None,
) -> Float[Array, "*out P P"]:
    """Returns the impact of every interaction from attention alone, or a baseline.

    Over the heads ``mean``, ``max`` and ``std`` take what they are named after and
    ``odds`` the mean of ``a / (1 - a)``, the weight of a key against all others
    (at most 1 / epsilon). Per head, ``mean`` and ``max`` give the attention itself,
    ``odds`` its odds, and ``std`` the distance to the mean over heads, of which the
    fused ``std`` is the root mean square. The baselines see no weights:
    ``distance`` is ``1 / (1 + patches between i and j)``, ``random`` is uniform.
    All definitions are ours.

    Args:
      attention: weights after the softmax, ``[..., H, N, N]``.
      num_prefix_tokens: tokens before the patches, which are dropped.
      method: see above.
      per_head: keep the head axis, ``[..., H, P, P]``.
      normalize: divide each row by its sum; a row of zeros stays.
      grid: ``(GH, GW)``, checked when given; ``distance`` needs it unless square.
      key: randomness of ``random``.

    Returns:
      Non-negative impact of patch j on patch i, ``[..., P, P]``.

    Raises:
      UsageError: the rows are no distributions, or the arguments do not fit.
    """
    tokens = _count_tokens(attention, num_prefix_tokens)
    if method == "random" and key is None:
        raise UsageError(
            "method 'random' was given no key: pass key=jax.random.key(seed)."
        )
    if grid is not None or method == "distance":
        grid = infer_grid(tokens, num_prefix_tokens=num_prefix_tokens, grid=grid)
    attention = attention.astype(jnp.float32)
    heads = jnp.unstack(attention, axis=-3)
    match method:
        case "mean":
            impact = attention if per_head else _mean(heads)
        case "max":
            impact = attention if per_head else reduce(jnp.maximum, heads)
        case "std" if per_head:
            impact = jnp.abs(attention - _mean(heads)[..., None, :, :])
        case "std":
            mean = _mean(heads)
            impact = _sqrt(_mean([jnp.square(head - mean) for head in heads]))
        case "odds":
            impact = _odds(attention) if per_head else _mean([_odds(h) for h in heads])
        case "distance" | "random":
            impact = attention if per_head else heads[0]
        case _:
            raise UsageError(
                f"method is {method!r}, expected mean, max, std, odds, distance or "
                "random."
            )
    # Last, or the patches of the weights would be copied first.
    impact = _patches(impact, num_prefix_tokens)
    if method == "distance":
        impact = jnp.broadcast_to(1 / (1 + distances(grid)), impact.shape)
    if method == "random":
        impact = jax.random.uniform(key, impact.shape)
    return _normalize(impact) if normalize else impact


@_checked(
    "num_prefix_tokens", "head_fusion", "residual_weight", "per_head", "normalize"
)
def attention_rollout(
    attention: Float[Array, "L *batch H N N"],
    *,
    num_prefix_tokens: int,
    head_fusion: HeadFusion = "mean",
    residual_weight: float = 0.5,
    per_head: bool = False,
    normalize: bool = False,
) -> Float[Array, "L *out P P"]:
    """Returns the attention rollout up to every layer (Abnar & Zuidema 2020, sec. 3).

    The rollout multiplies ``w I + (1 - w) A`` over the layers, each renormalised to
    rows of sum 1, so that rows of the result sum to 1 over all N tokens.

    Args:
      attention: weights of all layers from the first on, layers in front.
      num_prefix_tokens: tokens before the patches; they take part in the product
        and are dropped from the result.
      head_fusion: how the heads of one layer become one matrix.
      residual_weight: w, the share that bypasses attention, from 0 to 1.
      per_head: in layer l use head h alone, on top of the fused rollout below it
        (ours; with ``mean`` its mean over heads is the fused rollout).
      normalize: divide each row of patches by its sum.

    Returns:
      ``[L, ..., P, P]``; the last layer is the rollout of the whole model.

    Raises:
      UsageError: no layer axis, or the rows are no distributions.
    """
    tokens = _count_tokens(attention, num_prefix_tokens)
    if attention.ndim < 4:
        raise UsageError(
            f"rollout was given attention of shape {attention.shape}, expected the "
            "layers in front, [L, ..., H, N, N]: stack the layers first."
        )
    if not 0 <= residual_weight <= 1:
        raise UsageError(f"residual_weight is {residual_weight}, expected 0 to 1.")
    fusions = {
        "mean": _mean,
        "max": partial(reduce, jnp.maximum),
        "min": partial(reduce, jnp.minimum),
    }
    if head_fusion not in fusions:
        raise UsageError(f"head_fusion is {head_fusion!r}, expected mean, max or min.")

    def mix(weights):
        bypass = jnp.broadcast_to(jnp.eye(tokens), weights.shape)
        return _normalize(residual_weight * bypass + (1 - residual_weight) * weights)

    def add_layer(below, layer):
        layer = layer.astype(jnp.float32)
        fused = mix(fusions[head_fusion](jnp.unstack(layer, axis=-3)))
        rollout = _einsum("...ij,...jk->...ik", fused, below)
        if not per_head:
            return rollout, _patches(rollout, num_prefix_tokens)
        heads = _einsum("...hij,...jk->...hik", mix(layer), below)
        return rollout, _patches(heads, num_prefix_tokens)

    batch = attention.shape[1:-3]
    identity = jnp.broadcast_to(jnp.eye(tokens), (*batch, tokens, tokens))
    _, rollouts = lax.scan(add_layer, identity, attention)
    return _normalize(rollouts) if normalize else rollouts


@_checked("num_prefix_tokens", "grid", "patch_size", "per_head")
def mean_attention_distance(
    attention: Attention,
    *,
    num_prefix_tokens: int,
    grid: Grid | None = None,
    patch_size: float = 1.0,
    per_head: bool = True,
) -> Float[Array, "*out"]:
    """Returns how far patches look (Dosovitskiy et al. 2021, figure 7 right).

    The distance between query and key patch, weighted by attention that is
    renormalised after the prefix tokens are dropped, mean over queries. A query that
    attends to prefix tokens only counts as distance 0.

    Args:
      attention: weights after the softmax, ``[..., H, N, N]``.
      num_prefix_tokens: tokens before the patches.
      grid: ``(GH, GW)``; needed unless the grid is square.
      patch_size: edge of a patch in the unit of the result, say pixels.
      per_head: one distance a head, or their mean.

    Returns:
      ``[..., H]``, or ``[...]`` over all heads, in patches unless ``patch_size``
      is given.

    Raises:
      UsageError: the rows are no distributions, or no such grid exists.
    """
    tokens = _count_tokens(attention, num_prefix_tokens)
    grid = infer_grid(tokens, num_prefix_tokens=num_prefix_tokens, grid=grid)
    attention = _patches(attention.astype(jnp.float32), num_prefix_tokens)
    weighted = _einsum("...ij,ij->...i", attention, distances(grid))
    total = attention.sum(-1)
    distance = patch_size * (weighted / jnp.where(total > 0, total, 1.0)).mean(-1)
    return distance if per_head else distance.mean(-1)


@_checked("num_prefix_tokens", "per_head", "normalize", "block_size")
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
    _count_tokens(attention, num_prefix_tokens)
    _check_shapes(attention, values, output_kernel, residual_scale)
    kernel = _scaled_kernel(output_kernel, residual_scale)

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
        gram = _einsum("...hkd,...hld->...hkl", kernel, kernel)[..., None, None, :, :]
    else:
        gram = _einsum("...hkd,...gld->...hgkl", kernel, kernel)
    impact = _map_images(image, kernel.ndim == 4, gram, attention, values)
    return _normalize(impact) if normalize else impact


@_checked("num_prefix_tokens", "per_head", "block_size")
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
    _count_tokens(attention, num_prefix_tokens)
    _check_shapes(attention, values, output_kernel, residual_scale, cotangents)

    def image(kernel, attention, values, cotangents):
        def block_effect(rows, seen):
            cut = _cut(rows, values)
            products = _einsum("hqk,hnk->hqn", seen, values)
            output = _row_products(seen, cut.output)
            others = cut.ratio * (products - output[..., None])
            top = cut.share * _row_products(seen, cut.shift)
            effect = jnp.where(cut.is_top, top[..., None], others)
            return effect if per_head else sum(effect)

        rows, cotangents = (
            attention[:, num_prefix_tokens:],
            cotangents[num_prefix_tokens:],
        )
        # The cotangents as each head sees them, through its slice of the kernel.
        seen = _einsum("hkd,nd->hnk", kernel, cotangents)
        return _map_queries(block_effect, block_size, rows, seen)

    kernel = _scaled_kernel(output_kernel, residual_scale)
    layered = kernel.ndim == 4
    effect = _map_images(image, layered, kernel, attention, values, cotangents)
    return effect[..., num_prefix_tokens:]


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
    patches = _count_tokens(attention, num_prefix_tokens) - num_prefix_tokens

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
    error = 0.5 * _sqrt(variance / jnp.where(pooled > 0, pooled, 1.0))
    return PropagatedKnockout(_sqrt(mean_square), error)


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
    divisor = jnp.where(rest_sum > 0, rest_sum, 1.0)
    without_top = _einsum("hqn,hnk->hqk", rest, values) / divisor[..., None]
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
    multiplicity = np.where(g == h, 1.0, 2.0)
    gram_of_pairs = gram[g, h]
    keys = values[:, first_key:]
    seen_keys = _einsum("pnk,pkl->pnl", keys[g], gram_of_pairs)
    key_products = _row_products(seen_keys, keys[h])

    def block_impact(rows):
        cut = _cut(rows, values)
        ratio = cut.ratio[..., first_key:]
        seen_output = _einsum("gqk,hgkl->hgql", cut.output, gram.swapaxes(0, 1))
        output_products = _row_products(seen_output[h, g], cut.output[h])
        cross = _einsum("hgqk,hnk->hgqn", seen_output, keys)
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
        seen_shift = _einsum("pqk,pkl->pql", cut.shift[g], gram_of_pairs)
        both = _row_products(seen_shift, cut.shift[h])
        other = keys.at[h[:, None], top[g]].get(mode="clip") - cut.output[h]
        only_g = _row_products(seen_shift, other)
        other = seen_keys.at[pairs[:, None], top[h]].get(mode="clip")
        only_h = _row_products(other - seen_output[h, g], cut.shift[h])
        queries = np.arange(rows.shape[1])
        share = jnp.where(top[:, None] == top[None], cut.share[None], 0.0)
        ratio = ratio.at[:, queries, top].get(mode="clip").swapaxes(0, 1)
        at_top = (
            share[:, g] * share[:, h] * both[None]
            + share[:, g] * ratio[:, h] * only_g[None]
            + ratio[:, g] * share[:, h] * only_h[None]
        )
        at_top = _einsum("p,tpq->tq", multiplicity, at_top)
        at_top += square.at[queries, top].get(mode="clip")
        return _sqrt(square.at[queries, top].set(at_top, mode="drop"))

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


def _map_images(function, layered, weights, attention, values, *arrays):
    """Applies a function to one image of one layer at a time, in float32.

    The function takes weights, attention ``[H, N, N]``, values ``[H, N, K]`` and the
    other arrays. With ``layered`` the weights have the layers in front, like the rest.
    """
    if layered:
        return lax.map(
            lambda layer: _map_images(function, False, *layer),
            (weights, attention, values, *arrays),
        )
    batch = attention.shape[:-3]

    def image(arrays):
        attention, values, *others = (x.astype(jnp.float32) for x in arrays)
        # No cut notices what all values share, and without it less cancels.
        values = values.swapaxes(0, 1) - values.mean(0)[:, None]
        return function(weights, attention, values, *others)

    flat = [x.reshape(-1, *x.shape[len(batch) :]) for x in (attention, values, *arrays)]
    result = lax.map(image, flat)
    return result.reshape(*batch, *result.shape[1:])


def _scaled_kernel(output_kernel, residual_scale):
    kernel = output_kernel.astype(jnp.float32)
    if residual_scale is None:
        return kernel
    scale = residual_scale.astype(jnp.float32)
    return _einsum("...hkd,...d->...hkd", kernel, scale)


def _patches(matrix, num_prefix_tokens):
    return matrix[..., num_prefix_tokens:, num_prefix_tokens:]


def _mean(heads):
    # On CPUs several times faster than a reduction over the axis of heads.
    return sum(heads) / len(heads)


def _row_products(left, right):
    # On CPUs a product with ones takes half the time of a sum over the last axis.
    return _einsum("...k,k->...", left * right, jnp.ones(left.shape[-1]))


def _odds(attention):
    return attention / jnp.maximum(1 - attention, jnp.finfo(jnp.float32).eps)


def _normalize(impact):
    total = impact.sum(-1, keepdims=True)
    return impact / jnp.where(total > 0, total, 1.0)


def _sqrt(square):
    """Square root that is 0, and so is its gradient, where rounding leaves nothing."""
    positive = ~(square <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _count_tokens(attention, num_prefix_tokens) -> int:
    shape = attention.shape
    if len(shape) < 3 or shape[-1] != shape[-2]:
        raise UsageError(
            f"attention has shape {shape}, expected [..., H, N, N]: reorder its axes, "
            "and keep the head axis even for one head."
        )
    if not 0 <= num_prefix_tokens < shape[-1]:
        raise UsageError(
            f"num_prefix_tokens is {num_prefix_tokens} with {shape[-1]} tokens, which "
            "leaves no patches: count the CLS, register and distillation tokens."
        )
    return shape[-1]


def _check_shapes(attention, values, output_kernel, residual_scale, cotangents=None):
    *batch, heads, tokens, _ = attention.shape
    *_, head_width, width = (0, 0, *output_kernel.shape)
    layer = batch[:1] if output_kernel.ndim == 4 else []
    for name, array, letters, *shapes in (
        ("output_kernel", output_kernel, "H, K, D", (*layer, heads, head_width, width)),
        ("values", values, "N, H, K", (*batch, tokens, heads, head_width)),
        ("residual_scale", residual_scale, "D", (width,), (*layer, width)),
        ("cotangents", cotangents, "N, D", (*batch, tokens, width)),
    ):
        if array is not None and array.shape not in shapes:
            raise UsageError(
                f"{name} has shape {array.shape}, expected [..., {letters}] = "
                f"{shapes[-1]} beside attention of shape {attention.shape} and "
                f"output_kernel of shape {output_kernel.shape}: pass the arrays of the "
                "same layers, layers in front."
            )


_FINITE = ("values", "output_kernel", "residual_scale", "cotangents")


@jax.jit
def _row_error(attention):
    attention = attention.astype(jnp.float32)
    return jnp.abs(attention.sum(-1) - 1).max(), attention.min()


@jax.jit
def _all_finite(array):
    return jnp.isfinite(array).all()


def _is_traced(array) -> bool:
    return isinstance(array, jax.core.Tracer)


def _check_distributions(attention):
    if _is_traced(attention):
        return
    # Recorded arrays may be constants of a function that is being traced.
    with jax.ensure_compile_time_eval():
        error, minimum = (float(x) for x in _row_error(attention))
        if error <= _ROW_SUM_TOLERANCE and minimum >= 0:
            return
        if not _all_finite(attention):
            found = "contains NaN or infinity: find out where the model produced it"
        elif minimum < 0:
            found = "contains negative numbers: pass the weights after the softmax"
        elif _row_error(jnp.swapaxes(attention, -1, -2))[0] <= _ROW_SUM_TOLERANCE:
            found = "has columns that sum to 1, not rows: swap its last two axes"
        else:
            found = (
                f"has rows up to {error:.3g} away from summing to 1: pass the weights "
                "after the softmax and before dropout, of all tokens"
            )
    raise UsageError(
        f"attention of shape {attention.shape} {found}; expected rows that are "
        "distributions over the keys."
    )


def _check_finite(name, array):
    if array is None or _is_traced(array):
        return
    with jax.ensure_compile_time_eval():
        finite = bool(_all_finite(array))
    if not finite:
        raise UsageError(
            f"{name} of shape {array.shape} contains NaN or infinity, expected finite "
            "numbers: find out where the model produced it."
        )
