"""Responsive fields: the region of patches that each patch really interacts with.

They are read from interactions (`wf_vit.indicators`), not from gradients with
respect to pixels, so they are not effective receptive fields. All definitions are
ours. Every function is traceable, computes in float32 and takes any leading layer,
batch and head axes. Row i of an indicator, divided by its sum, is the distribution
``R_i`` over the grid; a row without any impact counts as the patch itself alone.

What is not a share has the range of float32: finite impact gives finite results, at
most its largest number. Below its smallest normal number they may be 0.

Options and shapes are always checked. Values are checked outside ``jax.jit`` only:
inside, NaN spreads along its row and negative impact gives meaningless fields.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from wf_vit.arrays import shapes_of, takes_arrays
from wf_vit.errors import UsageError
from wf_vit.grid import Grid, coordinates, displacements
from wf_vit.indicators.arithmetic import einsum, join, split
from wf_vit.shapes import Interactions
from wf_vit.tendency import explained_share, tendency


class Field(NamedTuple):
    """The responsive field of every patch.

    Attributes:
      extents: ``(left, top, right, bottom)``, distances from the patch's centre to the
        edges of its field, in patches, non-negative: the extents WinfT learns.
      area: smallest number of patches that hold ``mass`` of R_i, as a share of P.
      displacement: centroid of R_i minus own position, ``(x, y)`` in patches.
      excess: the displacement without the part that geometry alone gives
        (`wf_vit.tendency`): where the field tends to for the image's sake.
      covariance: of the position under R_i, ``[[xx, xy], [xy, yy]]`` in patches^2.
      mask: ``mask[i, j]``, the smallest set that holds ``mass``, and patch i itself.
    """

    extents: Float[Array, "*batch P 4"]
    area: Float[Array, "*batch P"]
    displacement: Float[Array, "*batch P 2"]
    excess: Float[Array, "*batch P 2"]
    covariance: Float[Array, "*batch P 2 2"]
    mask: Bool[Array, "*batch P P"]

    __repr__ = shapes_of

    @property
    def geometry_share(self) -> Float[Array, "*batch"]:
        """Share of the displacements of all patches that geometry alone explains."""
        geometry = self.displacement - self.excess
        return explained_share(self.displacement, geometry)


@takes_arrays("indicator")
def responsive_field(
    indicator: Interactions, grid: Grid, *, mass: float = 0.9
) -> Field:
    """Returns the responsive field of every patch.

    The extents span the quantiles ``(1 - mass) / 2`` and ``(1 + mass) / 2`` of each
    marginal of R_i, where a patch spreads its share evenly over its width of 1, so
    that a lone outlier moves them little. They are widened to the patch's centre
    where they miss it.

    Args:
      indicator: non-negative impact of patch j on patch i, ``[..., P, P]``, from
        anywhere (`wf_vit.arrays`).
      grid: ``(GH, GW)`` with ``GH * GW = P``.
      mass: share of R_i that the field holds, between 0 and 1.

    Returns:
      The fields, with the leading axes of the indicator.

    Raises:
      UsageError: shapes that do not fit, ``mass`` out of range, or impact that is
        negative or not finite.
    """
    _check_square("indicator", indicator)
    _check_finite("indicator", indicator, signed=False)
    if grid[0] * grid[1] != indicator.shape[-1]:
        raise UsageError(
            f"grid {tuple(grid)} has {grid[0] * grid[1]} patches, but the indicator of "
            f"shape {indicator.shape} has {indicator.shape[-1]}: pass (rows, columns), "
            "and drop the prefix tokens with num_prefix_tokens."
        )
    if not 0 < mass < 1:
        raise UsageError(f"mass is {mass}, expected a share between 0 and 1.")
    # Of 1 - mass float32 may leave nothing.
    tail = (1 - mass) / 2
    return _responsive_field(indicator, (int(grid[0]), int(grid[1])), mass, tail)


@partial(jax.jit, static_argnames="grid")
def _responsive_field(indicator, grid, mass, tail):
    share = _row_distributions(indicator)
    num_patches = share.shape[-1]
    step = displacements(grid)
    squares = step[..., :, None] * step[..., None, :]
    arrows = tendency(share, grid)
    displacement = arrows.displacement
    around_patch = einsum("...ij,ijcd->...icd", share, squares)
    shift = displacement[..., :, None] * displacement[..., None, :]
    mask, count = _smallest_set(share, mass)
    return Field(
        extents=_quantile_extents(share, grid, tail),
        area=count.astype(jnp.float32) / num_patches,
        displacement=displacement,
        excess=arrows.excess,
        covariance=around_patch - shift,
        mask=mask | _identity(mask.shape),
    )


def _row_distributions(indicator):
    indicator = split(indicator.astype(jnp.float32), -1)[0]
    total = indicator.sum(-1, keepdims=True)
    share = indicator / jnp.where(total == 0, 1.0, total)
    return jnp.where(total == 0, _identity(share.shape), share)


def _identity(shape):
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=bool), shape)


def _quantile_extents(share, grid, tail):
    marginals = share.reshape(*share.shape[:-1], *grid)
    own = coordinates(grid) + 0.5  # Centres, where 0 is the edge of the grid.
    columns, rows = marginals.sum(-2), marginals.sum(-1)
    before = jnp.stack([_quantile(columns, tail), _quantile(rows, tail)], -1)
    # From the other end: a tail is more exact than what is left of 1 without it.
    columns, rows = jnp.flip(columns, -1), jnp.flip(rows, -1)
    after = jnp.stack([_quantile(columns, tail), _quantile(rows, tail)], -1)
    size = np.asarray(grid[::-1], np.float32)
    own, behind = (jnp.broadcast_to(x, before.shape) for x in (own, size - own))
    return jnp.maximum(jnp.concatenate([own - before, behind - after], -1), 0.0)


def _quantile(marginal, level):
    """Returns where a piecewise uniform distribution reaches a level, in cells.

    Each cell counts by the share of its width that lies below that point.
    """
    below = jnp.pad(marginal.cumsum(-1), [(0, 0)] * (marginal.ndim - 1) + [(1, 0)])
    missing = level - below[..., :-1]
    return jnp.clip(missing / jnp.maximum(marginal, 1e-12), 0.0, 1.0).sum(-1)


def _smallest_set(share, mass):
    """Returns the smallest set that holds ``mass``, and its size; ties by number."""
    descending = -jnp.sort(-share, axis=-1)
    # Rounding must not add a patch where the sum is meant to reach the mass.
    missing = descending.cumsum(-1) < mass - 1e-6
    count = jnp.minimum(missing.sum(-1) + 1, share.shape[-1])
    least = jnp.take_along_axis(descending, count[..., None] - 1, -1)
    above, ties = share > least, share == least
    vacant = count - above.sum(-1)
    return above | (ties & (ties.cumsum(-1) <= vacant[..., None])), count


@takes_arrays("indicator")
def discriminability(indicator: Interactions) -> Float[Array, "*batch P"]:
    """Returns how much the impact of each patch depends on who is asking.

    The standard deviation, over the queries i, of the impact ``indicator[i, j]``
    that patch j has on them: low for a patch that matters equally to all.

    Args:
      indicator: impact of patch j on patch i, ``[..., P, P]``.

    Returns:
      ``[..., P]``, in units of the indicator.

    Raises:
      UsageError: a shape that does not fit, or impact that is not finite.
    """
    _check_square("indicator", indicator)
    _check_finite("indicator", indicator)
    return _discriminability(indicator)


@jax.jit
def _discriminability(indicator):
    numbers, exponents = split(indicator.astype(jnp.float32), -2)
    return join(numbers.std(-2), exponents[..., 0, :])


@takes_arrays("matrices")
def heard(
    matrices: Float[Array, "*batch N N"], num_prefix_tokens: int
) -> Float[Array, "*batch P"]:
    """Returns what all other tokens, prefix tokens included, hear of each patch.

    Of effects on the logit of a class, summed over layers, it is the class map.

    Args:
      matrices: impact or effect of token j on token i, ``[..., N, N]``, prefix tokens
        first.
      num_prefix_tokens: how many of them are prefix tokens.

    Returns:
      Sums of columns without the diagonal, ``[..., P]``.

    Raises:
      UsageError: a shape or a number of prefix tokens that does not fit, or numbers
        that are not finite.
    """
    _check_square("matrices", matrices, "N")
    if not 0 <= num_prefix_tokens < matrices.shape[-1]:
        raise UsageError(
            f"num_prefix_tokens is {num_prefix_tokens} with {matrices.shape[-1]} "
            "tokens, which leaves no patches: count the CLS, register and distillation "
            "tokens."
        )
    _check_finite("matrices", matrices)
    return _heard(matrices)[..., num_prefix_tokens:]


@jax.jit
def _heard(matrices):
    # What a token does to itself may be so large that the rest would be lost beside it.
    others = jnp.where(_identity(matrices.shape), 0.0, matrices.astype(jnp.float32))
    numbers, exponents = split(others, -2)
    return join(numbers.sum(-2), exponents[..., 0, :])


class Statistics(NamedTuple):
    """Mean and spread over images, as a pytree that merges with others.

    Attributes:
      count: number of images.
      mean: over the images and the other reduced axes, in the structure of the
        samples.
      variance: population variance, likewise.
    """

    count: Int[Array, ""]
    mean: PyTree[Float[Array, "..."]]
    variance: PyTree[Float[Array, "..."]]

    __repr__ = shapes_of


@partial(jax.jit, static_argnames="axes")
def statistics(
    samples: PyTree[Array],
    *,
    axes: tuple[int, ...],
    valid: Bool[Array, " B"] | None = None,
) -> Statistics:
    """Returns the statistics of one batch; `merge` them to stream over a data set.

    Merging takes constant memory, whatever the size of the data set, and combines
    the results of several processes alike. For fields ``[L, B, H, P, ...]``,
    ``axes=(1, 3)`` gives one mean per layer and head, ``axes=(1,)`` one for each
    patch of the grid too.

    Args:
      samples: arrays with common leading axes, for example a `Field`.
      axes: those to reduce, counted from the front; the first is the batch axis.
      valid: images that count; the others, which fill up a batch, may even be NaN.
        With none, the result is neutral in `merge`.

    Returns:
      Count of images, mean and variance.

    Raises:
      UsageError: an axis that the samples do not have, or counted from the back.
    """
    leaves = jax.tree.leaves(samples)
    rank = min(leaf.ndim for leaf in leaves)
    if not axes or not all(0 <= axis < rank for axis in axes):
        raise UsageError(
            f"axes are {axes}, expected at least the batch axis, counted from the "
            f"front, each below {rank}: the least number of axes of a sample."
        )
    batch_size = leaves[0].shape[axes[0]]
    if valid is None:
        valid = jnp.ones(batch_size, bool)
    if valid.shape != (batch_size,):
        raise UsageError(
            f"valid has shape {valid.shape}, expected ({batch_size},) for samples of "
            f"shape {leaves[0].shape} with the batch on axis {axes[0]}."
        )
    count = valid.sum()

    def mean(counted):
        per_image = counted.mean(axes[1:], keepdims=True)
        return per_image.sum(axes[0], keepdims=True) / jnp.maximum(count, 1)

    def moments(leaf):
        others = [axis for axis in range(leaf.ndim) if axis != axes[0]]
        counts = jnp.expand_dims(valid, others)
        counted = jnp.where(counts, leaf.astype(jnp.float32), 0.0)
        numbers, exponents = split(counted, axes)
        centre = mean(numbers)
        variance = mean(jnp.where(counts, jnp.square(numbers - centre), 0.0))
        return join(centre, exponents), join(variance, 2 * exponents)

    found = [tuple(x.squeeze(axes) for x in moments(leaf)) for leaf in leaves]
    means, variances = zip(*found, strict=True)
    structure = jax.tree.structure(samples)
    return Statistics(
        count,
        jax.tree.unflatten(structure, means),
        jax.tree.unflatten(structure, variances),
    )


@jax.jit
def merge(first: Statistics, second: Statistics) -> Statistics:
    """Returns the statistics of both sets of images together (Chan et al. 1983).

    Args:
      first: statistics of some images.
      second: statistics of others, with the same axes reduced.

    Returns:
      What `statistics` would return for all these images, up to rounding.
    """
    count = first.count + second.count
    share = second.count / jnp.maximum(count, 1)
    # Half of each, so that the difference of two of the largest numbers is in range.
    halves = jax.tree.map(lambda a, b: 0.5 * b - 0.5 * a, first.mean, second.mean)
    means = jax.tree.map(lambda a, half: a + 2 * share * half, first.mean, halves)
    largest = jnp.finfo(jnp.float32).max
    variances = jax.tree.map(
        lambda half, u, v: jnp.minimum(
            u + share * (v - u) + 4 * share * (1 - share) * jnp.square(half), largest
        ),
        halves,
        first.variance,
        second.variance,
    )
    return Statistics(count, means, variances)


@jax.jit
def _worst(array):
    return jnp.isfinite(array).all(), array.min()


def _check_square(name, array, letter="P"):
    if array.ndim < 2 or array.shape[-1] != array.shape[-2]:
        raise UsageError(
            f"{name} has shape {array.shape}, expected [..., {letter}, {letter}]: pass "
            "what wf_vit.indicators returns."
        )


def _check_finite(name, array, *, signed=True):
    if isinstance(array, jax.core.Tracer):
        return
    # The array may be a constant of a function that is being traced.
    with jax.ensure_compile_time_eval():
        finite, minimum = _worst(array)
        if finite and (signed or minimum >= 0):
            return
        found = f"as low as {minimum:.3g}" if finite else "NaN or infinite"
    raise UsageError(
        f"{name} of shape {array.shape} is {found} somewhere, expected finite numbers"
        + ("." if signed else " from 0 on: take the absolute value of a signed effect.")
    )
