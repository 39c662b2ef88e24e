"""Indicators and baselines that need attention alone."""

from functools import partial, reduce
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from wf_vit.arrays import check_keys
from wf_vit.errors import UsageError
from wf_vit.grid import Grid, distances, infer_grid
from wf_vit.indicators import checks
from wf_vit.indicators.arithmetic import (
    drop_prefix,
    einsum,
    mean_of_heads,
    normalize_rows,
    sqrt,
)
from wf_vit.shapes import Attention, Keys

Method = Literal["mean", "max", "std", "odds", "distance", "random"]
HeadFusion = Literal["mean", "max", "min"]


@checks.checked("num_prefix_tokens", "method", "per_head", "normalize", "grid")
def interaction_indicator(
    attention: Attention,
    *,
    num_prefix_tokens: int,
    method: Method = "mean",
    per_head: bool = False,
    normalize: bool = False,
    grid: Grid | None = None,
    key: Keys | None = None,
) -> Float[Array, "*out P P"]:
    """Returns the impact of every interaction from attention alone, or a baseline.

    Over the heads ``mean``, ``max`` and ``std`` take what they are named after and
    ``odds`` the mean of the weight of a key over the sum of all others (at most 1 /
    epsilon). Per head, ``mean`` and ``max`` give the attention itself,
    ``odds`` its odds, and ``std`` the distance to the mean over heads, of which the
    fused ``std`` is the root mean square. The baselines see no weights:
    ``distance`` is ``1 / (1 + patches between i and j)``, ``random`` is uniform.
    All definitions are ours.

    Args:
      attention: weights after the softmax, ``[..., H, N, N]``.
      num_prefix_tokens: tokens before the patches, which are dropped.
      method: "mean", "max", "std" or "odds" over heads, or the baselines "distance"
        and "random".
      per_head: keep the head axis, ``[..., H, P, P]``.
      normalize: divide each row by its sum; a row of zeros stays.
      grid: ``(GH, GW)``, checked when given; ``distance`` needs it unless square.
      key: randomness of ``random``, one for all images, or ``[B]`` for each of the axis
        before the heads.

    Returns:
      Non-negative impact of patch j on patch i, ``[..., P, P]``.

    Raises:
      UsageError: the rows are no distributions, or the arguments do not fit.
    """
    tokens = checks.count_tokens(attention, num_prefix_tokens)
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
            impact = attention if per_head else mean_of_heads(heads)
        case "max":
            impact = attention if per_head else reduce(jnp.maximum, heads)
        case "std" if per_head:
            impact = jnp.abs(attention - mean_of_heads(heads)[..., None, :, :])
        case "std":
            mean = mean_of_heads(heads)
            impact = sqrt(mean_of_heads([jnp.square(head - mean) for head in heads]))
        case "odds":
            impact = (
                _odds(attention)
                if per_head
                else mean_of_heads([_odds(h) for h in heads])
            )
        case "distance" | "random":
            impact = attention if per_head else heads[0]
        case _:
            raise UsageError(
                f"method is {method!r}: choose one of {', '.join(get_args(Method))}."
            )
    # Last, or the patches of the weights would be copied first.
    impact = drop_prefix(impact, num_prefix_tokens)
    if method == "distance":
        impact = jnp.broadcast_to(1 / (1 + distances(grid)), impact.shape)
    if method == "random":
        impact = _noise(key, impact.shape, axis=-4 if per_head else -3)
    return normalize_rows(impact) if normalize else impact


def _noise(key: Keys, shape: tuple[int, ...], axis: int) -> Float[Array, "..."]:
    """Returns uniform noise, by one key or by one for each index of an axis."""
    # Without that axis there is one image, and one key.
    check_keys(key, shape[axis] if len(shape) >= -axis else 1)
    if not key.ndim:
        return jax.random.uniform(key, shape, jnp.float32)
    each = shape[:axis] + shape[axis + 1 :]
    drawn = jax.vmap(lambda one: jax.random.uniform(one, each, jnp.float32))(key)
    return jnp.moveaxis(drawn, 0, axis)


@checks.checked(
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
    rows of sum 1, so that rows of the result sum to 1 over all N tokens. With
    ``head_fusion="min"`` and w = 0 a row can be all zero, and stays so.

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
    tokens = checks.count_tokens(attention, num_prefix_tokens)
    if attention.ndim < 4:
        raise UsageError(
            f"rollout was given attention of shape {attention.shape}, expected the "
            "layers in front, [L, ..., H, N, N]: stack the layers first."
        )
    if not 0 <= residual_weight <= 1:
        raise UsageError(f"residual_weight is {residual_weight}, expected 0 to 1.")
    fusions = {
        "mean": mean_of_heads,
        "max": partial(reduce, jnp.maximum),
        "min": partial(reduce, jnp.minimum),
    }
    if head_fusion not in fusions:
        raise UsageError(f"head_fusion is {head_fusion!r}, expected mean, max or min.")

    def mix(weights):
        bypass = jnp.broadcast_to(jnp.eye(tokens, dtype=weights.dtype), weights.shape)
        return normalize_rows(
            residual_weight * bypass + (1 - residual_weight) * weights
        )

    def add_layer(below, layer):
        layer = layer.astype(jnp.float32)
        fused = mix(fusions[head_fusion](jnp.unstack(layer, axis=-3)))
        rollout = einsum("...ij,...jk->...ik", fused, below)
        if not per_head:
            return rollout, drop_prefix(rollout, num_prefix_tokens)
        heads = einsum("...hij,...jk->...hik", mix(layer), below)
        return rollout, drop_prefix(heads, num_prefix_tokens)

    batch = attention.shape[1:-3]
    identity = jnp.eye(tokens, dtype=jnp.float32)
    identity = jnp.broadcast_to(identity, (*batch, tokens, tokens))
    _, rollouts = lax.scan(add_layer, identity, attention)
    return normalize_rows(rollouts) if normalize else rollouts


@checks.checked("num_prefix_tokens", "grid", "patch_size", "per_head")
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
    tokens = checks.count_tokens(attention, num_prefix_tokens)
    grid = infer_grid(tokens, num_prefix_tokens=num_prefix_tokens, grid=grid)
    attention = drop_prefix(attention.astype(jnp.float32), num_prefix_tokens)
    weighted = einsum("...ij,ij->...i", attention, distances(grid))
    total = attention.sum(-1)
    distance = patch_size * (weighted / jnp.where(total > 0, total, 1.0)).mean(-1)
    return distance if per_head else distance.mean(-1)


def _odds(attention):
    # Of the largest weight, 1 - a is mostly rounding where it is near 1. So the others
    # are summed, without the difference.
    top = attention.max(-1, keepdims=True)
    is_top = attention == top
    below = jnp.where(is_top, 0.0, attention).sum(-1, keepdims=True)
    beside_top = below + (is_top.sum(-1, keepdims=True) - 1) * top
    others = jnp.where(is_top, beside_top, beside_top + top - attention)
    return attention / jnp.maximum(others, jnp.finfo(jnp.float32).eps)
