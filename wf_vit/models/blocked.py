"""Attention block by block, for a CPU: memory grows with the tokens, not their square.

A block of queries meets one block of keys after another, so that logits stay in the
cache; the softmax is put together from the blocks, and the backward pass computes the
logits again. (The idea is FlashAttention's, arXiv 2205.14135.) Everything is written in
JAX's own loops, which run one after the other: right for a CPU, wrong for accelerators,
which have kernels of their own.

With hard fields only the keys within reach are visited. Patches lie in tiles of
``_SIDE`` x ``_SIDE``, and the queries of a tile visit those quarters of tiles that the
field of at least one of them reaches.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wf_vit import grid as geometry
from wf_vit.grid import Grid

# Patches along each side of a tile, and of a quarter of it.
_HALF = 4
_SIDE = 2 * _HALF

# Added to the logits of keys that are left out: exp() of it is exactly 0.
_LEFT_OUT = -1e9
# Where padding lies: no field reaches it.
_NOWHERE = 1e6
# More than there are columns: (x, y) as one number, exact in float32.
_ROW = 4096


class Ellipses(NamedTuple):
    """Which keys each query may attend to: those in an ellipse, and itself.

    Attributes:
      centre: ``(x, y)`` on the grid, in patches.
      radius: ``(rx, ry)``, likewise.
    """

    centre: Float[Array, "B H P 2"]
    radius: Float[Array, "B H P 2"]


def attend(
    query: Float[Array, "B H N Q"],
    key: Float[Array, "B H N Q"],
    value: Float[Array, "B H N V"],
) -> Float[Array, "B H N V"]:
    """Scaled dot-product attention over all keys, block by block.

    Args:
      query: queries, scaled.
      key: keys.
      value: values.

    Returns:
      The heads' outputs, in float32.
    """
    blocks = _Sequence(query.shape[2])
    output, _ = _attend(*_flat(blocks, query, key, value), blocks, None)
    return blocks.join(output).reshape(*query.shape[:3], -1)


def attend_within(
    query: Float[Array, "B H N Q"],
    key: Float[Array, "B H N Q"],
    value: Float[Array, "B H N V"],
    reach: Ellipses,
    grid: Grid,
) -> Float[Array, "B H N V"]:
    """Scaled dot-product attention of patches to those within reach.

    Prefix tokens, which come first, see and are seen by everything.

    Args:
      query: queries, scaled.
      key: keys.
      value: values.
      reach: of every patch. It has no gradient.
      grid: ``(GH, GW)``; all its patches are there, in their order.

    Returns:
      The heads' outputs, in float32.
    """
    prefix = query.shape[2] - grid[0] * grid[1]
    tiles = _Tiles(grid)
    apart = [x[:, :, prefix:] for x in (query, key, value)]
    reach = jax.tree.map(lambda x: _merge(lax.stop_gradient(x)), reach)
    output, log_sum = _attend(*_flat(tiles, *apart), tiles, tiles.plan(reach))
    shape = apart[0].shape[:3]
    output = tiles.join(output).reshape(*shape, -1)
    if not prefix:
        return output
    log_sum = tiles.join(log_sum[..., None]).reshape(*shape, 1)
    first_keys, first_values = key[:, :, :prefix], value[:, :, :prefix]
    logits = _einsum("bhnq,bhmq->bhnm", apart[0], first_keys)
    total = jax.nn.logsumexp(
        jnp.concatenate([log_sum, logits], -1), axis=-1, keepdims=True
    )
    seen = jnp.exp(logits - total).astype(value.dtype)
    output = jnp.exp(log_sum - total) * output
    output += _einsum("bhnm,bhmv->bhnv", seen, first_values)
    logits = _einsum("bhnq,bhmq->bhnm", query[:, :, :prefix], key)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.concatenate([_einsum("bhnm,bhmv->bhnv", weights, value), output], 2)


class _Plan(NamedTuple):
    """Which quarters of tiles of keys a tile of queries visits, and the ellipses.

    Attributes:
      visits: their numbers in ascending order, filled up to whole groups.
      count: how many there are.
      places: ``(x, y)`` of each patch of the tiles.
      centre: of the ellipse of each query.
      scale: one over its radius.
    """

    visits: Int[Array, "Z T groups_x_together"]
    count: Int[Array, "Z T"]
    places: Float[Array, "T queries 2"]
    centre: Float[Array, "Z T queries 2"]
    scale: Float[Array, "Z T queries 2"]


class _Sequence:
    """Tokens in the order they are in, in blocks; all meet all.

    Attributes:
      queries: of a block.
      unit: neighbouring keys, which are visited or not.
      together: units that make a block of keys.
    """

    # Measured: 128 x 128 logits, 64 KiB, are fastest.
    queries, unit, together = 128, 128, 1

    def __init__(self, count: int):
        self.count = count
        self.blocks = -(-count // self.queries)

    def split(self, x: Array) -> Float[Array, "Z T queries C"]:
        """Cuts tokens [Z, N, C] into blocks; the last are filled up with zeros."""
        more = self.blocks * self.queries - self.count
        x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
        return x.reshape(len(x), self.blocks, self.queries, -1)

    def join(self, x: Float[Array, "Z T queries C"]) -> Array:
        """Undoes ``split``."""
        return x.reshape(len(x), -1, x.shape[-1])[:, : self.count]


class _Tiles:
    """Patches in tiles, quarter by quarter, which are units of keys."""

    queries, unit, together = _SIDE**2, _HALF**2, 8

    def __init__(self, grid: Grid):
        self.grid = grid
        self.across = -(-grid[1] // _SIDE)
        self.down = -(-grid[0] // _SIDE)

    def split(self, x: Array, filling: float = 0.0) -> Float[Array, "Z T queries C"]:
        """Cuts patches [Z, P, C] into tiles, which may reach beyond the grid."""
        rows, columns = self.grid
        x = x.reshape(len(x), rows, columns, x.shape[-1])
        beyond = [(0, self.down * _SIDE - rows), (0, self.across * _SIDE - columns)]
        x = jnp.pad(x, [(0, 0), *beyond, (0, 0)], constant_values=filling)
        x = x.reshape(len(x), self.down, 2, _HALF, self.across, 2, _HALF, -1)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(len(x), -1, self.queries, x.shape[-1])

    def join(self, x: Float[Array, "Z T queries C"]) -> Array:
        """Undoes ``split``."""
        rows, columns = self.grid
        x = x.reshape(len(x), self.down, self.across, 2, 2, _HALF, _HALF, -1)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
        x = x.reshape(len(x), self.down * _SIDE, self.across * _SIDE, -1)
        return x[:, :rows, :columns].reshape(len(x), rows * columns, -1)

    def plan(self, reach: Ellipses) -> _Plan:
        """Returns the quarters that every tile has to visit, and no others."""
        places = jnp.asarray(geometry.coordinates(self.grid), jnp.float32)[None]
        centre = self.split(reach.centre, _NOWHERE)
        scale = 1 / self.split(reach.radius, 1.0)
        near = self._near(centre, scale)
        quarters = near.shape[-1]
        number = jnp.arange(quarters, dtype=jnp.int32)[None, None]
        visits = jnp.sort(jnp.where(near, number, quarters), axis=-1)
        # Those beyond the count are not used, but must be there.
        visits = jnp.minimum(visits, quarters - 1)
        more = -quarters % self.together
        return _Plan(
            visits=jnp.pad(visits, ((0, 0), (0, 0), (0, more))),
            count=near.sum(-1, dtype=jnp.int32),
            places=self.split(places, _NOWHERE)[0],
            centre=centre,
            scale=scale,
        )

    def _near(self, centre: Array, scale: Array) -> Bool[Array, "Z T 4*T"]:
        """Whether a query of a tile reaches a quarter, or lies in it."""

        def away(axis: int, count: int) -> Float[Array, "Z T q n"]:
            """Squared distance of each stretch from the centre, in radii."""
            first = _HALF * np.arange(count, dtype=np.float32)
            last = np.minimum(first + _HALF, self.grid[1 - axis]) - 1
            middle = centre[..., axis, None]
            first, last = first[None, None, None], last[None, None, None]
            distance = jnp.maximum(jnp.maximum(first - middle, middle - last), 0)
            return jnp.square(distance * scale[..., axis, None])

        columns = away(0, 2 * self.across)
        columns = columns.reshape(*columns.shape[:3], 1, self.across, 1, 2)
        rows = away(1, 2 * self.down)
        rows = rows.reshape(*rows.shape[:3], self.down, 1, 2, 1)
        near = (rows + columns <= 1).any(2)
        near = near.reshape(*near.shape[:2], -1)
        own = np.repeat(np.eye(near.shape[1], dtype=bool), 4, axis=-1)
        return near | own[None]


def _merge(x: Array) -> Array:
    """Makes images and heads one axis."""
    return x.reshape(-1, *x.shape[2:])


def _flat(blocks: _Sequence | _Tiles, *arrays: Array) -> list[Array]:
    return [blocks.split(_merge(x)) for x in arrays]


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _block(
    image: Array, tile: Array, group: Array, query: Array, key: Array, blocks, plan
) -> tuple[list[Array], Float[Array, "keys Q"], Float[Array, "keys queries"]]:
    """Returns the numbers of some units, their keys, and the logits, keys in front."""
    first = group * blocks.together
    if plan is None:
        numbers = [first]
    else:
        chosen = lax.dynamic_slice(
            plan.visits, (image, tile, first), (1, 1, blocks.together)
        ).reshape(-1)
        numbers = list(chosen)
    keys = _take(key, image, numbers)
    logits = _einsum("kc,qc->kq", keys, query[image, tile])
    slot = np.arange(blocks.unit * blocks.together)
    if plan is None:
        kept = (first * blocks.unit + slot < blocks.count)[:, None]
    else:
        places = _take(_units(plan.places[None], blocks), 0, numbers)
        centre, scale = plan.centre[image, tile], plan.scale[image, tile]
        # Not (...).sum(-1): loops over an axis of two are slow.
        x, y = (
            jnp.square((places[:, None, n] - centre[None, :, n]) * scale[None, :, n])
            for n in (0, 1)
        )
        own, theirs = (a[:, 0] + _ROW * a[:, 1] for a in (plan.places[tile], places))
        there = first + slot // blocks.unit < plan.count[image, tile]
        kept = ((x + y <= 1) | (theirs[:, None] == own[None])) & there[:, None]
    return numbers, keys, jnp.where(kept, logits, _LEFT_OUT)


def _units(x: Float[Array, "Z T queries C"], blocks) -> Float[Array, "Z n unit C"]:
    return x.reshape(len(x), -1, blocks.unit, x.shape[-1])


def _take(units: Array, image: Array | int, numbers: list[Array]) -> Array:
    """Returns the keys of some units."""
    shape = (1, 1, *units.shape[2:])
    # Not units[image, numbers]: a gather takes as long as the products.
    parts = [lax.dynamic_slice(units, (image, n, 0, 0), shape) for n in numbers]
    return jnp.concatenate([part[0, 0] for part in parts])


def _add(units: Array, image: Array, numbers: list[Array], more: Array) -> Array:
    """Adds to what ``_take`` returns."""
    more = more.reshape(len(numbers), *units.shape[2:])
    if len(numbers) == 1:
        return units.at[image, numbers[0]].add(more[0])
    return units.at[image, jnp.stack(numbers)].add(more)


def _groups(blocks: _Sequence | _Tiles, plan, image: Array, tile: Array) -> Array | int:
    if plan is None:
        return blocks.blocks
    return -(-plan.count[image, tile] // blocks.together)


def _put(x: Array, image: Array, tile: Array, block: Array) -> Array:
    return lax.dynamic_update_slice(x, block[None, None], (image, tile, 0, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(
    query: Float[Array, "Z T queries Q"],
    key: Float[Array, "Z T queries Q"],
    value: Float[Array, "Z T queries V"],
    blocks: _Sequence | _Tiles,
    plan: _Plan | None,
) -> tuple[Float[Array, "Z T queries V"], Float[Array, "Z T queries"]]:
    """Returns the outputs, and the log of each query's sum of exponentials."""
    return _forward(query, key, value, blocks, plan)[0]


def _forward(query, key, value, blocks, plan):
    images, tiles, _, width = value.shape
    keys, values = _units(key, blocks), _units(value, blocks)

    def visit(number, done):
        image, tile = number // tiles, number % tiles

        def add(group, state):
            highest, total, output = state
            numbers, _, logits = _block(image, tile, group, query, keys, blocks, plan)
            higher = jnp.maximum(highest, logits.max(0))
            weights = jnp.exp(logits - higher[None])
            shrunk = jnp.exp(highest - higher)
            seen = _take(values, image, numbers)
            more = _einsum("kq,kv->qv", weights.astype(value.dtype), seen)
            return (
                higher,
                total * shrunk + weights.sum(0),
                output * shrunk[:, None] + more,
            )

        nothing = (
            jnp.full(blocks.queries, 2 * _LEFT_OUT),
            jnp.zeros(blocks.queries),
            jnp.zeros((blocks.queries, width)),
        )
        groups = _groups(blocks, plan, image, tile)
        highest, total, output = lax.fori_loop(0, groups, add, nothing)
        outputs, log_sums = done
        log_sum = (highest + jnp.log(total))[:, None]
        outputs = _put(outputs, image, tile, output / total[:, None])
        return outputs, _put(log_sums, image, tile, log_sum)

    empty = [jnp.zeros((images, tiles, blocks.queries, n)) for n in (width, 1)]
    output, log_sum = lax.fori_loop(0, images * tiles, visit, tuple(empty))
    log_sum = log_sum[..., 0]
    return (output, log_sum), (query, key, value, plan, output, log_sum)


def _backward(blocks, saved, cotangents):
    query, key, value, plan, output, log_sum = saved
    of_output, of_log_sum = cotangents
    # How far an even rise of a query's logits would change the result.
    level = (of_output * output).sum(-1) - of_log_sum
    of_output = of_output.astype(value.dtype)
    images, tiles, _, _ = value.shape
    keys, values = _units(key, blocks), _units(value, blocks)

    def visit(number, done):
        image, tile = number // tiles, number % tiles
        own_query, own = query[image, tile], of_output[image, tile]

        def add(group, state):
            of_query, of_keys, of_values = state
            at, own_keys, logits = _block(image, tile, group, query, keys, blocks, plan)
            weights = jnp.exp(logits - log_sum[image, tile][None])
            seen = _take(values, image, at)
            of_weights = _einsum("kv,qv->kq", seen, own)
            of_logits = weights * (of_weights - level[image, tile][None])
            of_logits = of_logits.astype(query.dtype)
            weights = weights.astype(value.dtype)
            return (
                of_query + _einsum("kq,kc->qc", of_logits, own_keys),
                _add(of_keys, image, at, _einsum("kq,qc->kc", of_logits, own_query)),
                _add(of_values, image, at, _einsum("kq,qv->kv", weights, own)),
            )

        of_queries, of_keys, of_values = done
        nothing = jnp.zeros(own_query.shape)
        groups = _groups(blocks, plan, image, tile)
        of_query, of_keys, of_values = lax.fori_loop(
            0, groups, add, (nothing, of_keys, of_values)
        )
        return _put(of_queries, image, tile, of_query), of_keys, of_values

    empty = [jnp.zeros(x.shape) for x in (query, keys, values)]
    gradients = lax.fori_loop(0, images * tiles, visit, tuple(empty))
    pairs = zip(gradients, (query, key, value), strict=True)
    return (*(g.reshape(x.shape).astype(x.dtype) for g, x in pairs), None)


_attend.defvjp(_forward, _backward)
