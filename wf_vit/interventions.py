"""Interventions on attention: which interactions of patches a model may keep.

Scores of interactions (`wf_vit.indicators`, `wf_vit.fields`) become boolean masks,
and masks become the biases that a model adds to its attention logits. Every layer
is cut at once, with as many interactions left as a budget allows.

The documented choices: a patch always keeps its interaction with itself, i<-i,
which counts in the budget; interactions with prefix tokens are never cut and do not
count. The budget of an image is met exactly, ties go to the first.

Recommended for small budgets, per head: the geometric mean of attention and of the
impact propagated to all tokens, by one threshold. A DINOv2 ViT-S/14 that keeps 10 %
and 5 % so has cosines of .950 and .883 (CLS) and .938 and .839 (patches) with the full
network, in the mean of three photographs; propagated impact alone .937 and .864, .931
and .825; attention, top k per query, .915 and .854, .883 and .798
(results/sparsity.md).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from wf_vit.errors import UsageError

# Layers in front, then images; without a head axis, one score counts for all heads.
Scores = Float[Array, "L B H P P"] | Float[Array, "L B P P"]
Keep = Bool[Array, "L B H P P"] | Bool[Array, "L B P P"]


def keep_strongest(scores: Scores, share: float, *, floor: float = 0.0) -> Keep:
    """Returns the strongest interactions of each image, a share of all of them.

    Part of the budget is dealt out evenly, to the strongest keys of each query; the
    rest goes to the strongest interactions that are left, by one threshold over all
    layers, heads and queries of the image.

    Args:
      scores: of interaction i<-j, in any unit that is the same in all layers unless
        ``floor`` is 1.
      share: of the image's interactions between patches that is kept, up to 1. It
        leaves each patch at least itself, so it is no less than ``1 / P``.
      floor: how much of the budget is dealt out evenly: 0 for one threshold alone, 1
        for the top ``share * P`` keys per query (only what is left of it after
        rounding down goes by the threshold).

    Returns:
      True where an interaction is kept, in the shape of the scores.

    Raises:
      UsageError: shapes that do not fit, a share or floor out of range, or scores
        that are not finite (checked outside ``jax.jit`` only).
    """
    _check_interactions("scores", scores)
    patches = scores.shape[-1]
    if not 1 / patches <= share <= 1:
        raise UsageError(
            f"share is {share}, expected 1 / P = {1 / patches:.3g} to 1: each of the "
            f"{patches} patches keeps at least the interaction with itself."
        )
    if not 0 <= floor <= 1:
        raise UsageError(f"floor is {floor}, expected a part of the budget, 0 to 1.")
    _check_finite(scores)
    # Rounding must not take a key where the product is meant to be whole.
    per_query = max(1, int(floor * share * patches + 1e-6))
    count = round(share * (scores.size // scores.shape[1]))
    return _keep_strongest(scores, per_query, count)


@jax.jit
def _keep_strongest(scores, per_query, count):
    own = jnp.broadcast_to(jnp.eye(scores.shape[-1], dtype=bool), scores.shape)
    scores = jnp.where(own, jnp.inf, scores)
    sure = _largest(scores, per_query)
    images = jnp.moveaxis(jnp.where(sure, jnp.inf, scores), 1, 0)
    kept = _largest(images.reshape(images.shape[0], -1), count)
    return jnp.moveaxis(kept.reshape(images.shape), 0, 1)


def _largest(scores, count):
    """Returns the ``count`` largest along the last axis; ties go to the first."""
    # Unsigned integers in the order of the scores, of which the count-th largest is
    # found bit by bit: on CPUs a sort takes many times as long. Adding 0 turns -0 to 0.
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32) + 0.0, jnp.uint32)
    top = jnp.uint32(1 << 31)
    order = jnp.where(bits & top, ~bits, bits | top)

    def add_bit(step, least):
        raised = least | (top >> step.astype(jnp.uint32))
        enough = (order >= raised).sum(-1, keepdims=True) >= count
        return jnp.where(enough, raised, least)

    least = jnp.zeros((*scores.shape[:-1], 1), jnp.uint32)
    least = lax.fori_loop(0, 32, add_bit, least)
    above, ties = order > least, order == least
    vacant = count - above.sum(-1, keepdims=True)
    return above | (ties & (ties.cumsum(-1) <= vacant))


def attention_bias(
    keep: Keep, *, num_prefix_tokens: int
) -> list[Float[Array, "B H N N"]]:
    """Returns what cuts all other interactions, for ``ViT.encode(..., bias=...)``.

    Args:
      keep: interactions between patches that are kept; every query keeps some.
      num_prefix_tokens: tokens before the patches, whose interactions all stay.

    Returns:
      For each of the L layers 0 where an interaction is kept and minus infinity
      elsewhere, with an H of 1 for masks without a head axis.

    Raises:
      UsageError: shapes that do not fit, or a negative number of prefix tokens.
    """
    _check_interactions("keep", keep)
    if num_prefix_tokens < 0:
        raise UsageError(
            f"num_prefix_tokens is {num_prefix_tokens}, expected 0 or more: count the "
            "CLS, register and distillation tokens."
        )
    if keep.ndim == 4:
        keep = keep[:, :, None]
    bias = jnp.where(keep, 0.0, -jnp.inf)
    prefix = (num_prefix_tokens, 0)
    bias = jnp.pad(bias, [(0, 0), (0, 0), (0, 0), prefix, prefix])
    return list(bias)


def _check_interactions(name, array):
    if array.ndim not in (4, 5) or array.shape[-1] != array.shape[-2]:
        raise UsageError(
            f"{name} has shape {array.shape}, expected [L, B, H, P, P], or "
            "[L, B, P, P] for all heads: put the layers in front, then the images."
        )


def _check_finite(scores):
    if isinstance(scores, jax.core.Tracer):
        return
    # The scores may be a constant of a function that is being traced.
    with jax.ensure_compile_time_eval():
        finite = bool(jnp.isfinite(scores).all())
    if not finite:
        raise UsageError(
            f"the scores of shape {scores.shape} contain NaN or infinity, expected "
            "finite numbers: find out where the indicator produced it."
        )
