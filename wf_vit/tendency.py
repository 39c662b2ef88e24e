r"""Where responsive fields tend to, and what of that is geometry alone.

A patch near the border can only listen inwards. So the displacement of its field, the
centroid of its row ``R_i`` minus its own position, points to the middle of the grid
whatever the image shows. `tendency` tells that part from the rest.

The rows are fitted by a model without any content but popularity: the share that patch
i takes from patch j is

    R_ij = k(j - i) c_j / sum over j' of k(j' - i) c_j'

with a stationary kernel ``k`` of the offset and a popularity ``c`` of the patch that is
heard. The fit reproduces the sum of R over all pairs of each offset and the sum of each
column (iterative proportional fitting, Deming and Stephan 1940; it is the maximum of
the likelihood). The three parts of a displacement are then

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

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from wf_vit.arrays import shapes_of, takes_arrays
from wf_vit.grid import Grid, coordinates, displacements
from wf_vit.indicators.arithmetic import split

# Both loops have converged to about float32's precision by then.
_FITS, _REWEIGHTINGS = 12, 12
# Huber's threshold, in standard deviations: 95 % as precise as least squares where
# residuals are Gaussian.
_HUBER = 1.345
_SMALLEST = 1e-12


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
    return jnp.square(common) / jnp.where(lengths > 0, lengths, 1.0)


@takes_arrays("share")
@partial(jax.jit, static_argnames="grid")
def tendency(share: Float[Array, "*batch P P"], grid: Grid) -> Tendency:
    """Returns the displacement of every field, and its parts.

    Costs a pass over the rows and, for the fit, a few dozen Fourier transforms of the
    grid: next to nothing beside the rows.

    Args:
      share: rows R_i that sum to 1, as `fields.row_distributions` returns them.
      grid: ``(GH, GW)`` with ``GH * GW = P``.

    Returns:
      The parts, with the leading axes of the rows.
    """
    rows, columns = grid
    on_grid = share.astype(jnp.float32).reshape(*share.shape[:-2], *grid, *grid)
    popularity = on_grid.sum((-4, -3))
    offsets = _offset_sums(on_grid)
    heard = popularity > 0

    def correlate(kernel, values):
        """Sums kernel(d) * values(i + d) over d, for every patch i."""
        spectrum = jnp.conj(_transform(kernel, grid)) * _transform(values, grid)
        return _back(spectrum, grid)[..., :rows, :columns]

    def fit(_, factors):
        kernel, c = factors
        scale = 1 / jnp.maximum(correlate(kernel, c), _SMALLEST)
        pairs = jnp.conj(_transform(scale, grid)) * _transform(c, grid)
        kernel = offsets / jnp.maximum(_back(pairs, grid), _SMALLEST)
        scale = 1 / jnp.maximum(correlate(kernel, c), _SMALLEST)
        sums = _back(_transform(scale, grid) * _transform(kernel, grid), grid)
        sums = jnp.maximum(sums[..., :rows, :columns], _SMALLEST)
        c = jnp.where(heard, popularity / sums, 0.0)
        return kernel, c / c.mean((-2, -1), keepdims=True)

    start = jnp.ones_like(offsets), jnp.ones_like(popularity)
    kernel, c = lax.fori_loop(0, _FITS, fit, start)
    position = coordinates(grid)
    slope = _slope(jnp.log(jnp.maximum(c, 1e-6)).reshape(*c.shape[:-2], -1), position)
    step = _offsets(grid)
    tilt = jnp.einsum("...c,yxc->...yx", slope, step)
    alone = kernel * jnp.exp(jnp.clip(tilt, -20.0, 20.0))

    def centroid(kernel, values):
        total = jnp.maximum(correlate(kernel, values), _SMALLEST)
        moment = jnp.einsum("...yx,yxc->c...yx", kernel, step)
        parts = [correlate(along, values) / total for along in moment]
        return jnp.stack(parts, -1).reshape(*total.shape[:-2], -1, 2)

    geometry = centroid(alone, jnp.ones_like(c))
    displacement = jnp.einsum(
        "...ij,ijc->...ic", share, displacements(grid), precision=lax.Precision.HIGHEST
    )
    return Tendency(displacement, geometry, centroid(kernel, c) - geometry)


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
    by_row = _diagonal_sums(jnp.einsum("...yxvu->...xuyv", on_grid))
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
        normal = jnp.einsum("...p,pa,pb->...ab", weight, basis, basis)
        normal += jnp.broadcast_to(1e-6 * jnp.eye(3), normal.shape)
        moment = jnp.einsum("...p,pa,...p->...a", weight, basis, values)
        found = jnp.linalg.solve(normal, moment[..., None])[..., 0]
        residual = values - jnp.einsum("...a,pa->...p", found, basis)
        spread = 1.4826 * jnp.median(jnp.abs(residual), -1, keepdims=True) + 1e-6
        limit = _HUBER * spread / jnp.maximum(jnp.abs(residual), 1e-9)
        return jnp.minimum(limit, 1.0), found[..., 1:]

    start = jnp.ones_like(values), jnp.zeros((*values.shape[:-1], 2), values.dtype)
    return lax.fori_loop(0, _REWEIGHTINGS, reweight, start)[1]
