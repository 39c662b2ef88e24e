"""Interventions: which interactions of patches, or which patches, a model may keep.

Scores of interactions (`wf_vit.indicators`, `wf_vit.fields`) become boolean masks,
and masks become the biases that a model adds to its attention logits. Every layer
is cut at once, with as many interactions left as a budget allows. Scores of patches
say which tokens are gathered out, so that later layers have fewer.

The documented choices: a patch always keeps its interaction with itself, i<-i,
which counts in the budget; interactions with prefix tokens are never cut and do not
count. The budget of an image is met exactly, ties go to the first.

Scores of single cuts do not add up when most is cut: `wf_vit.selection` chooses what to
keep. Where that takes too long, take the geometric mean of attention and of the impact
propagated to all tokens, per head, by one threshold.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wf_vit.arrays import takes_arrays
from wf_vit.errors import UsageError
from wf_vit.grid import Grid, coordinates, distances

# Layers in front, then images; without a head axis, one score counts for all heads.
Scores = Float[Array, "L B H P P"] | Float[Array, "L B P P"]
# An image axis of 1 stands for all images.
Keep = Bool[Array, "L #B H P P"] | Bool[Array, "L #B P P"]


@takes_arrays("scores")
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
    if isinstance(scores, jax.core.Tracer) or jax.default_backend() != "cpu":
        return _keep_strongest(scores, per_query, count)
    # NumPy selects on the host in a tenth of the time.
    kept = _strongest(np.asarray(scores), per_query, count, np, _largest_on_host)
    return jnp.asarray(kept)


def _strongest(scores, per_query, count, numpy, largest):
    own = numpy.broadcast_to(numpy.eye(scores.shape[-1], dtype=bool), scores.shape)
    scores = numpy.where(own, numpy.inf, scores)
    # The patch itself is the first of its keys.
    sure = own if per_query == 1 else largest(scores, per_query)
    images = numpy.moveaxis(numpy.where(sure, numpy.inf, scores), 1, 0)
    kept = largest(images.reshape(images.shape[0], -1), count)
    return numpy.moveaxis(kept.reshape(images.shape), 0, 1)


@partial(jax.jit, static_argnames="per_query")
def _keep_strongest(scores, per_query, count):
    return _strongest(scores, per_query, count, jnp, _largest)


def _largest_on_host(scores, count):
    """Returns what ``_largest`` does, of NumPy arrays."""
    place = scores.shape[-1] - count
    least = np.partition(scores, place, axis=-1)[..., place, None]
    enough = scores >= least
    if (enough.sum(-1) == count).all():
        return enough
    above, ties = scores > least, scores == least
    vacant = count - above.sum(-1, keepdims=True)
    return above | (ties & (ties.cumsum(-1) <= vacant))


def _largest(scores, count):
    """Returns the ``count`` largest along the last axis; ties go to the first."""
    # Unsigned integers in the order of the scores, of which the count-th largest is
    # found bit by bit: on CPUs a sort takes many times as long.
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    top = jnp.uint32(1 << 31)
    bits = jnp.where(bits == top, 0, bits)  # -0 is 0.
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


@takes_arrays("keep")
def attention_bias(
    keep: Keep, *, num_prefix_tokens: int
) -> list[Float[Array, "B H N N"]]:
    """Returns what cuts all other interactions, for ``ViT.encode(..., bias=...)``.

    Args:
      keep: interactions between patches that are kept; without prefix tokens every
        query keeps some.
      num_prefix_tokens: tokens before the patches, whose interactions all stay.

    Returns:
      For each of the L layers 0 where an interaction is kept and minus infinity
      elsewhere, with an H of 1 for masks without a head axis.

    Raises:
      UsageError: shapes that do not fit, numbers in place of a mask, a query that keeps
        nothing at all, or a negative number of prefix tokens. Queries are checked
        outside ``jax.jit`` only.
    """
    _check_interactions("keep", keep)
    if keep.dtype != bool:
        raise UsageError(
            f"keep holds {keep.dtype}, expected a mask: make one of scores with "
            "keep_strongest, or compare them with a threshold."
        )
    if num_prefix_tokens < 0:
        raise UsageError(
            f"num_prefix_tokens is {num_prefix_tokens}, expected 0 or more: count the "
            "CLS, register and distillation tokens."
        )
    if not num_prefix_tokens and not isinstance(keep, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            if not keep.any(-1).all():
                raise UsageError(
                    f"keep of shape {keep.shape} leaves a query without any key, "
                    "expected at least itself: keep the diagonal."
                )
    if keep.ndim == 4:
        keep = keep[:, :, None]
    bias = jnp.where(keep, jnp.float32(0), -jnp.inf)
    prefix = (num_prefix_tokens, 0)
    bias = jnp.pad(bias, [(0, 0), (0, 0), (0, 0), prefix, prefix])
    return list(bias)


def square_window(grid: Grid, max_area: int) -> Float[np.ndarray, "P P"]:
    """Returns scores by which each query keeps a square window around itself.

    At the border of the grid the window is moved inwards, so that it is never cut off.
    Other patches follow, the nearest first: a control of equal area is then no smaller
    than what it is compared with.

    Args:
      grid: ``(GH, GW)``.
      max_area: patches in the window, at most: it is the largest whose sides differ by
        one patch or none, or more where the grid is too short for that.

    Raises:
      UsageError: ``max_area`` is below 1.
    """
    sizes = [
        (rows, columns)
        for rows, columns in _sizes(grid, max_area)
        if abs(rows - columns) <= 1
        or (rows == grid[0] < columns)
        or (columns == grid[1] < rows)
    ]
    size = max(sizes, key=_area_and_squareness)
    corner = [
        np.clip(own - (side - 1) // 2, 0, cells - side)
        for own, side, cells in zip(_rows_and_columns(grid), size, grid, strict=True)
    ]
    inside = [
        (first[:, None] <= key[None]) & (key[None] < first[:, None] + side)
        for first, key, side in zip(corner, _rows_and_columns(grid), size, strict=True)
    ]
    return _then_nearest(inside[0] & inside[1], grid)


def partition(grid: Grid, depth: int, max_area: int) -> Float[np.ndarray, "L P P"]:
    """Returns scores by which each query keeps its window of a partition of the grid.

    As in Swin (arXiv 2103.14030) the windows are shifted by half their size in every
    other layer, and are cut off at the border, without its cyclic wrap. Other patches
    follow, the nearest first, as in `square_window`.

    Args:
      grid: ``(GH, GW)``.
      depth: L.
      max_area: patches in a window, at most: of the windows that tile the grid it is
        the largest, and of those the squarest.

    Raises:
      UsageError: ``depth`` or ``max_area`` is below 1.
    """
    if depth < 1:
        raise UsageError(f"depth is {depth}, expected 1 or more layers.")
    sizes = [
        (rows, columns)
        for rows, columns in _sizes(grid, max_area)
        if grid[0] % rows == grid[1] % columns == 0
    ]
    size = max(sizes, key=_area_and_squareness)
    scores = []
    for layer in range(depth):
        row, column = (
            (own + layer % 2 * (side // 2)) // side
            for own, side in zip(_rows_and_columns(grid), size, strict=True)
        )
        same = (row[:, None] == row[None]) & (column[:, None] == column[None])
        scores.append(_then_nearest(same, grid))
    return np.stack(scores)


def _sizes(grid, max_area):
    """Returns all sizes ``(rows, columns)`` of windows of at most that area."""
    if max_area < 1:
        raise UsageError(
            f"max_area is {max_area}, expected 1 or more: a window holds at least the "
            "patch itself."
        )
    rows, columns = np.mgrid[1 : grid[0] + 1, 1 : grid[1] + 1].reshape(2, -1)
    fits = rows * columns <= max_area
    return list(zip(rows[fits].tolist(), columns[fits].tolist(), strict=True))


def _area_and_squareness(size):
    return size[0] * size[1], -abs(size[0] - size[1])


def _rows_and_columns(grid):
    """Returns the row and the column of every patch."""
    return coordinates(grid).T[::-1]


def _then_nearest(inside, grid):
    """Returns scores that rank the keys of a window first, and others by distance."""
    near = distances(grid)
    return (inside - near / (1 + near.max())).astype(np.float32)


@takes_arrays("scores")
def keep_patches(scores: Float[Array, "B P"], count: int) -> Int[Array, "B kept"]:
    """Returns the patches with the highest scores, in the order of the grid.

    Args:
      scores: of each patch; ties go to the first.
      count: how many patches each image keeps, 1 to P.

    Raises:
      UsageError: a count out of range.
    """
    if not 1 <= count <= scores.shape[1]:
        raise UsageError(
            f"{count} patches are to be kept, expected 1 to {scores.shape[1]}, the "
            "number that there are: change the share."
        )
    return jnp.sort(lax.top_k(scores, count)[1], axis=1)


def num_kept(share: float, num_patches: int) -> int:
    """Returns how many patches are left when a share of them is removed, at least 1."""
    return max(1, num_patches - round(share * num_patches))


def gather_patches(
    tokens: Float[Array, "B N D"],
    patches: Int[Array, "B kept"],
    *,
    num_prefix_tokens: int,
) -> Float[Array, "B kept_tokens D"]:
    """Returns the prefix tokens and the tokens of some patches, and no others.

    The layers that follow take ``patches``, too: ``ViT.encode(..., patches=...)``.

    Args:
      tokens: of all patches, prefix tokens first.
      patches: counted without the prefix tokens.
      num_prefix_tokens: tokens before the patches, which all stay.
    """
    prefix, rest = jnp.split(tokens, [num_prefix_tokens], axis=1)
    kept = jnp.take_along_axis(rest, patches[..., None], axis=1)
    return jnp.concatenate([prefix, kept], axis=1)


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
