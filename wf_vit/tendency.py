r"""Where responsive fields tend to, and what of that is geometry alone.

A patch near the border can only listen inwards. So the displacement of its field, the
centroid of its row ``R_i`` minus its own position, points to the middle of the grid
whatever the image shows. `tendency` tells that part from the rest.

The rows are fitted by a model without any content but popularity: the share that patch
i takes from patch j is

    R_ij = k(j - i) c_j / sum over j' of k(j' - i) c_j'

with a stationary kernel ``k`` of the offset and a popularity ``c`` of the patch that is
heard. The fit reproduces the sum of R over all pairs of each offset and the sum of each
column, which is the maximum of the likelihood. It is iterative proportional fitting
(Deming and Stephan 1940), accelerated: alone it is too slow where one key takes most of
a row. The three parts of a displacement are then

- *geometry*: the centroid of ``k`` alone, laid on the grid at the patch;
- *popularity*: what ``c`` adds to it, the pull of patches that everyone hears;
- the patch's own: what is left.

The *excess* is the displacement minus the geometry: the last two together. Fitting both
factors at once matters. The plain mean over all pairs of equal offset takes popular
patches for a wide kernel, and leaves geometry in the excess (``results/tendency``).

An exponential slope can move between the factors without changing the model:
``k(d) exp(b d)`` and ``c_j exp(-b x_j)`` have the same rows. Here ``log c`` has none,
by a robust linear fit (Huber's), so that a drift that all patches share is geometry,
and a few popular patches are not.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from wf_vit.arrays import shapes_of, takes_arrays
from wf_vit.grid import Grid, coordinates, displacements
from wf_vit.indicators.arithmetic import einsum, split

# The fit is then within 1e-5 of the mean displacement where no key takes over half of
# the rows, and within .003 where one takes 99 % of them all.
_TURNS, _REMEMBERED = 22, 3
# Converged to about float32's precision by then.
_REWEIGHTINGS = 12
# Huber's threshold, in standard deviations: 95 % as precise as least squares where
# residuals are Gaussian.
_HUBER = 1.345


class Tendency(NamedTuple):
    """Displacements of all fields, in patches, ``(x, y)`` with y downwards.

    Attributes:
      displacement: centroid of R_i minus own position.
      geometry: the part of it that the grid and a stationary kernel alone give.
      popularity: the part that patches give which everyone hears.
    """

    displacement: Float[Array, "*batch P 2"]
    geometry: Float[Array, "*batch P 2"]
    popularity: Float[Array, "*batch P 2"]

    __repr__ = shapes_of

    @property
    def excess(self) -> Float[Array, "*batch P 2"]:
        """Displacement minus geometry: the tendency that is the image's."""
        return self.displacement - self.geometry


@takes_arrays("arrows", "by")
def explained_share(
    arrows: Float[Array, "*batch P 2"], by: Float[Array, "*batch P 2"]
) -> Float[Array, "*batch"]:
    """Returns the share of squared arrow length that ``by``, times a number, explains.

    The squared cosine over all patches and both components, in [0, 1]; 0 where either
    is zero everywhere.
    """
    arrows, by = (split(x.astype(jnp.float32), (-2, -1))[0] for x in (arrows, by))
    common = (arrows * by).sum((-2, -1))
    lengths = jnp.square(arrows).sum((-2, -1)) * jnp.square(by).sum((-2, -1))
    return jnp.minimum(jnp.square(common) / jnp.where(lengths > 0, lengths, 1.0), 1.0)


@takes_arrays("share")
@partial(jax.jit, static_argnames="grid")
def tendency(share: Float[Array, "*batch P P"], grid: Grid) -> Tendency:
    """Returns the displacement of every field, and its parts.

    Costs a pass over the rows and, for the fit, a few dozen Fourier transforms of the
    grid: next to nothing beside the rows.

    Args:
      share: rows that sum to 1: the distributions R_i of `wf_vit.fields`.
      grid: ``(GH, GW)`` with ``GH * GW = P``.

    Returns:
      The parts, with the leading axes of the rows.
    """
    on_grid = share.astype(jnp.float32).reshape(*share.shape[:-2], *grid, *grid)
    kernel, c = _fit(_offset_sums(on_grid), on_grid.sum((-4, -3)), grid)
    position = coordinates(grid)
    slope = _slope(jnp.log(jnp.maximum(c, 1e-6)).reshape(*c.shape[:-2], -1), position)
    step = _offsets(grid)
    tilt = einsum("...c,yxc->...yx", slope, step)
    alone = kernel * jnp.exp(jnp.clip(tilt, -20.0, 20.0))

    def centroid(kernel, values):
        total = _above_noise(_correlate(kernel, values, grid))
        moment = einsum("...yx,yxc->c...yx", kernel, step)
        parts = [_correlate(along, values, grid) / total for along in moment]
        found = jnp.stack(parts, -1).reshape(*total.shape[:-2], -1, 2)
        # Where a total is rounding, at least a place within the grid.
        first, last = -position, position.max(0) - position
        first, last = (jnp.broadcast_to(x, found.shape) for x in (first, last))
        return jnp.clip(found, first, last)

    geometry = centroid(alone, jnp.ones_like(c))
    displacement = einsum("...ij,ijc->...ic", share, displacements(grid))
    return Tendency(displacement, geometry, centroid(kernel, c) - geometry)


def _fit(
    offsets: Float[Array, "*batch _ _"], popularity: Float[Array, "*batch GH GW"], grid
) -> tuple[Float[Array, "*batch _ _"], Float[Array, "*batch GH GW"]]:
    """Returns the kernel k and the popularity c that reproduce the sums.

    Turns of proportional fitting, accelerated over the logarithms by Anderson's method
    (1965). What patches hear of themselves slows such turns down most. So the kernel
    at offset 0, ``own``, is fitted apart, and it and c by Newton's method.
    """
    own_sum, sums = offsets[..., :1, :1], offsets.at[..., 0, 0].set(0.0)
    used, heard = sums > 0, popularity > 0
    num_offsets = sums.shape[-2] * sums.shape[-1]

    def total(x):
        return x.sum((-2, -1), keepdims=True)

    def flat(*parts):
        return jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in parts], -1)

    def factors(logs):
        pair = logs[..., :num_offsets], logs[..., num_offsets:]
        return (
            jnp.where(those, jnp.exp(part.reshape(those.shape)), 0.0)
            for part, those in zip(pair, (used, heard), strict=True)
        )

    def turn(logs, own):
        kernel, c = factors(logs)
        scale = 1 / (own * c + _above_noise(_correlate(kernel, c, grid)))
        kernel = sums / _above_noise(_correlate(scale, c, grid, crop=False))
        others = _above_noise(_correlate(kernel, c, grid))
        for _ in range(3):
            share = own * c / (own * c + others)
            own = own * _newton(own_sum, total(share), total(share * (1 - share)))
        share = own * c / (own * c + others)
        spectra = (_transform(x, grid) for x in (1 / (own * c + others), kernel))
        by_others = _back(math.prod(spectra), grid)[..., : grid[0], : grid[1]]
        found = share + c * _above_noise(by_others)
        c = c * _newton(popularity, found, found - jnp.square(share))
        # The scale of either factor is free.
        c = c * total(heard) / _positive(total(c))
        unit = total(own * c + others) / math.prod(grid)
        kernel, own = kernel / unit, own / unit
        return flat(jnp.log(_positive(kernel)), jnp.log(_positive(c))), own

    weights = flat(sums, popularity)

    def accelerated(i, state):
        logs, own, last, steps = state
        result, own = turn(logs, own)
        now = jnp.stack([result, result - logs])
        steps = steps.at[i % _REMEMBERED].set(jnp.where(i > 1, now - last, 0.0))
        # The mix of earlier steps that comes nearest to this turn's change.
        moves, changes = steps[:, 0], steps[:, 1]
        gram = einsum("a...p,b...p,...p->...ab", changes, changes, weights)
        trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
        ridge = jnp.broadcast_to(jnp.eye(_REMEMBERED, dtype=gram.dtype), gram.shape)
        gram += (1e-7 * trace + 1e-20) * ridge
        along = einsum("a...p,...p,...p->...a", changes, now[1], weights)
        mix = jnp.linalg.solve(gram, along[..., None])[..., 0]
        ahead = einsum("...a,a...p->...p", mix, moves)
        return result - jnp.clip(ahead, -3.0, 3.0), own, now, steps

    logs, own = jnp.zeros_like(weights), jnp.ones_like(own_sum)
    last = jnp.zeros((2, *logs.shape), logs.dtype)
    steps = jnp.zeros((_REMEMBERED, *last.shape), logs.dtype)
    state = lax.fori_loop(0, _TURNS, accelerated, (logs, own, last, steps))
    _, own, (logs, _), _ = state
    kernel, c = factors(logs)
    return kernel.at[..., 0, 0].set(own[..., 0, 0]), c


def _newton(wanted: Array, found: Array, slope: Array) -> Array:
    """Returns by what to multiply a factor, so that ``found`` becomes ``wanted``.

    Args:
      wanted: what is asked for.
      found: what there is.
      slope: the derivative of ``found`` with respect to the logarithm of the factor.
    """
    ratio = _positive(wanted) / _positive(found)
    power = jnp.log(ratio) * found / _positive(slope)
    return jnp.exp(jnp.clip(power, -3.0, 3.0))


def _positive(values: Array) -> Array:
    return jnp.maximum(values, 1e-12)


def _above_noise(sums: Array) -> Array:
    """Returns sums of positive numbers that are above what transforms round off."""
    least = 1e-6 * sums.max((-2, -1), keepdims=True)
    return jnp.maximum(sums, jnp.maximum(least, 1e-12))


def _correlate(kernel: Array, values: Array, grid: Grid, crop: bool = True) -> Array:
    """Sums kernel(d) * values(i + d) over d, for every patch i, or every offset i."""
    sums = _back(jnp.conj(_transform(kernel, grid)) * _transform(values, grid), grid)
    return sums[..., : grid[0], : grid[1]] if crop else sums


def _transform(values: Array, grid: Grid) -> Array:
    """Fourier transform over the last two axes, padded so that nothing wraps around."""
    return jnp.fft.rfft2(values, (2 * grid[0], 2 * grid[1]))


def _back(spectrum: Array, grid: Grid) -> Array:
    return jnp.fft.irfft2(spectrum, (2 * grid[0], 2 * grid[1]))


def _offsets(grid: Grid) -> Float[np.ndarray, "_ _ 2"]:
    """Returns the offset ``(dx, dy)`` at each place: 0, 1, ... and from the end -1."""
    dy, dx = (np.fft.fftfreq(2 * n, 1 / (2 * n)) for n in grid)
    return np.stack(np.meshgrid(dx, dy), -1).astype(np.float32)


def _offset_sums(
    on_grid: Float[Array, "*batch GH GW GH GW"],
) -> Float[Array, "*batch _ _"]:
    """Returns the sum over all pairs (i, j) of each offset, in _offsets' order."""
    by_row = _diagonal_sums(einsum("...yxvu->...xuyv", on_grid))
    return _diagonal_sums(jnp.moveaxis(by_row, -1, -3))


def _diagonal_sums(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch _"]:
    """Returns the sum of every diagonal, that of offset d at place d modulo 2n."""
    n, batch = matrix.shape[-1], matrix.shape[:-2]
    no_pad = [(0, 0)] * len(batch)
    # Rows of 2n numbers, read again as rows of 2n + 1: each starts one place earlier
    # than the row before it, so that diagonals stand in columns.
    flat = jnp.pad(matrix, [*no_pad, (0, 0), (0, n)]).reshape(*batch, -1)
    skewed = jnp.pad(flat, [*no_pad, (0, n)]).reshape(*batch, n, 2 * n + 1)
    return jnp.delete(skewed.sum(-2), n, axis=-1)  # No pair has the offset n.


def _slope(
    values: Float[Array, "*batch P"], position: Float[np.ndarray, "P 2"]
) -> Float[Array, "*batch 2"]:
    """Returns the slope of a robust linear fit of values over the grid."""
    basis = np.concatenate([np.ones((len(position), 1)), position], -1)
    basis[:, 1:] -= basis[:, 1:].mean(0)
    basis = basis.astype(np.float32)

    def reweight(_, state):
        weight, _ = state
        normal = einsum("...p,pa,pb->...ab", weight, basis, basis)
        normal += jnp.broadcast_to(1e-6 * jnp.eye(3, dtype=normal.dtype), normal.shape)
        moment = einsum("...p,pa,...p->...a", weight, basis, values)
        found = jnp.linalg.solve(normal, moment[..., None])[..., 0]
        residual = values - einsum("...a,pa->...p", found, basis)
        spread = 1.4826 * jnp.median(jnp.abs(residual), -1, keepdims=True) + 1e-6
        limit = _HUBER * spread / jnp.maximum(jnp.abs(residual), 1e-9)
        return jnp.minimum(limit, 1.0), found[..., 1:]

    start = jnp.ones_like(values), jnp.zeros((*values.shape[:-1], 2), values.dtype)
    return lax.fori_loop(0, _REWEIGHTINGS, reweight, start)[1]
