"""Learned fields: a Gaussian for every patch and head, and attention within them.

A field has a centre ``(x, y)`` relative to its patch and a width ``(sx, sy)``, all in
patches. A key that lies ``(dx, dy)`` from the query belongs to it with the membership
m,

    log m = -((dx - x) / sx)^2 / 2 - ((dy - y) / sy)^2 / 2 .

It is a sum of a profile over the columns and one over the rows, so it costs
P * (GH + GW) operations per head, not P * P, until it is added to the logits. The
membership is one half on an ellipse, which reaches ``grid.HALF`` widths from the
centre.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from wf_vit import grid as geometry
from wf_vit.models import blocked
from wf_vit.models.attention import BLOCKED_FROM, DROPPED, attend, fused

# In patches: the nearest key of a field this narrow loses 8 of its logit.
LEAST_WIDTH = 0.25
# In patches^2, of what a head attends to: a single patch has none.
_LEAST_VARIANCE = 0.1
# Of the bend above it: widths that are twice the least one are hardly bent.
_SHARPNESS = 4.0
# Numbers that fold a field into queries, keys and values; products are fastest at
# widths that eight divides.
_FOLDED, _ROUND = 5, 8


@struct.dataclass
class LearnedFields:
    """The fields of one layer.

    The leaves are untyped, since JAX also fills the tree with shapes and specs.

    Attributes:
      gaussians: centre ``(x, y)`` relative to the patch and widths ``(sx, sy)``, in
        patches, [B, H, P, 4].
      log_rows: log membership of every grid row from each query, [B, H, P, GH].
      log_columns: log membership of every grid column, likewise [B, H, P, GW].
      patches: which patches of the grid these are, and so are the keys, [B, P]; None
        for all of them in their order.
      scale: how many times as fine the grid is as the one that the fields were learned
        on, along a side.
      threshold: keys with a membership below it are dropped; 0 drops none.
    """

    gaussians: Any
    log_rows: Any
    log_columns: Any
    patches: Any = None
    scale: float = struct.field(pytree_node=False, default=1.0)
    threshold: float = struct.field(pytree_node=False, default=0.0)
    is_learned_field = True

    @property
    def num_patches(self) -> int:
        """How many patches have a field."""
        return self.log_rows.shape[-2]

    def log_membership(self) -> Float[Array, "B H P P"]:
        """Returns log m of every query (row) and key (column)."""
        log_m = self.log_rows[..., :, None] + self.log_columns[..., None, :]
        log_m = log_m.reshape(*self.log_rows.shape[:-1], -1)
        if self.patches is not None:
            log_m = jnp.take_along_axis(log_m, self.patches[:, None, None], axis=-1)
        if self.threshold:
            own = jnp.eye(log_m.shape[-1], dtype=bool)
            kept = (log_m >= math.log(self.threshold)) | own[None, None]
            log_m = jnp.where(kept, log_m, DROPPED)
        return log_m

    def attend(
        self,
        query: Float[Array, "B H N K"],
        key: Float[Array, "B H N K"],
        value: Float[Array, "B H N K"],
        bias: Float[Array, "#B #H N N"] | None = None,
        record: bool = False,
    ) -> tuple[
        Float[Array, "B H N K"],
        Float[Array, "B H N N"] | None,
        Float[Array, "B H N 5"],
    ]:
        """Lets tokens attend to one another within the fields.

        Args:
          query: scaled, prefix tokens first.
          key: likewise.
          value: likewise.
          bias: is added to the logits, for interventions.
          record: whether the weights are wanted.

        Returns:
          The heads' outputs; the weights, or None where nobody needed them; and the
          moments of the places that each head attends to, which `report` takes.
        """
        exact = value.dtype == jnp.float32 and jax.default_backend() == "cpu"
        tiles = bias is None and self.patches is None
        tiles = tiles and query.shape[2] >= BLOCKED_FROM
        if record or not exact or (self.threshold and not tiles):
            own = self.attention_bias(
                num_prefix_tokens=query.shape[2] - self.num_patches
            )
            bias = own if bias is None else bias + own
            output, weights = attend(query, key, value, bias)
            places = self._places(query.shape[2])
            # The variance is a difference: products in all bits, on accelerators too.
            moments = jnp.einsum(
                "bhij,bjc->bhic",
                weights,
                jnp.broadcast_to(places, (len(weights), *places.shape[1:])),
                precision=lax.Precision.HIGHEST,
            )
            return output, weights, moments
        width = value.shape[-1]
        folded = self.fold(query, key, value)
        if self.threshold:
            output = blocked.attend_within(*folded, self._reach(), self._grid)
        else:
            output = fused(*folded, bias)
        return output[..., :width], None, output[..., width : width + _FOLDED]

    def report(self, moments: Float[Array, "B H N 5"]) -> Float[Array, "B H N 4"]:
        """Returns where each head listens: how far away, and how widely.

        The displacement ``(x, y)`` of the mean place that it attends to, in standard
        deviations of the grid's positions, and the log of the variance around it in x
        and in y, in patches^2 of the grid that the fields were learned on. Prefix
        tokens have no place: as keys they are left out, as queries they are in the
        middle.

        Args:
          moments: of `attend`, prefix tokens first.
        """
        moments = moments[..., :4] / jnp.maximum(moments[..., 4:], 1e-6)
        square, mean = moments[..., :2], moments[..., 2:]
        variance = jnp.maximum(square - jnp.square(mean), 0.0) / self.scale**2
        unit = np.std(geometry.coordinates(self._grid), axis=0).clip(min=0.1)
        own = self._places(moments.shape[2])[:, None, :, 2:4]
        apart = (mean - own) / jnp.asarray(unit, jnp.float32)[None, None, None]
        return jnp.concatenate([apart, jnp.log(variance + _LEAST_VARIANCE)], -1)

    @property
    def _grid(self) -> geometry.Grid:
        return self.log_rows.shape[-1], self.log_columns.shape[-1]

    def _position(self) -> Float[Array, "#B P 2"]:
        """Returns ``(x, y)`` of the patches, from the middle of the grid.

        There the squares are least that `fold` takes differences of.
        """
        whole = geometry.coordinates(self._grid)
        position = jnp.asarray(whole - whole.mean(0), jnp.float32)[None]
        return position if self.patches is None else position[0, self.patches]

    def _places(self, num_tokens: int) -> Float[Array, "#B N 5"]:
        """Returns ``x^2, y^2, x, y, 1`` of each token; prefix tokens have zeros."""
        position = self._position()
        one = jnp.ones_like(position[..., :1])
        places = jnp.concatenate([jnp.square(position), position, one], -1)
        return jnp.pad(places, ((0, 0), (num_tokens - places.shape[1], 0), (0, 0)))

    def _reach(self) -> blocked.Ellipses:
        """Returns where the membership is at least the threshold."""
        centre = jnp.asarray(geometry.coordinates(self._grid), jnp.float32)
        widths = math.sqrt(-2 * math.log(self.threshold))
        return blocked.Ellipses(
            centre[None, None] + self.gaussians[..., :2],
            widths * self.gaussians[..., 2:],
        )

    def area(self) -> Float[Array, "B H P"]:
        """Returns the mean membership over keys: the share of the grid attended to.

        Of hard fields it is that of the membership before keys are dropped.
        """
        return jnp.exp(self.log_rows).mean(-1) * jnp.exp(self.log_columns).mean(-1)

    def attention_bias(self, *, num_prefix_tokens: int) -> Float[Array, "B H N N"]:
        """Returns the logits' bias; prefix tokens see and are seen by everything."""
        pad = (num_prefix_tokens, 0)
        return jnp.pad(self.log_membership(), ((0, 0), (0, 0), pad, pad))

    def fold(
        self,
        query: Float[Array, "B H N K"],
        key: Float[Array, "B H N K"],
        value: Float[Array, "B H N K"],
    ) -> tuple[
        Float[Array, "B H N W"], Float[Array, "B H N W"], Float[Array, "B H N W"]
    ]:
        """Returns what plain attention makes attention within soft fields of.

        The log of a Gaussian is a quadratic form of the key's position, so that five
        more numbers for each query and key do what an [N, N] bias does. Positions are
        counted from the middle of the grid, where their squares are least: what the
        terms lose by cancelling is some 1e-7 of ``(side of the grid / width)^2``. The
        keys' five numbers as further values give the moments that `report` takes.

        Args:
          query: scaled, prefix tokens first.
          key: likewise.
          value: likewise.

        Returns:
          Longer queries, keys and values: the five numbers, then zeros, up to a
          multiple of eight.
        """
        tokens, width = query.shape[2:]
        precision = 1 / jnp.square(self.gaussians[..., 2:])
        centre = self._position()[:, None] + self.gaussians[..., :2]
        pulled = precision * centre
        constant = (pulled * centre).sum(-1, keepdims=True)
        ours = jnp.concatenate([-precision / 2, pulled, -constant / 2], -1)
        prefix = ((0, 0), (0, 0), (tokens - ours.shape[2], 0), (0, 0))
        ours, theirs = jnp.pad(ours, prefix), self._places(tokens)[:, None]
        after = ((0, 0), (0, 0), (0, 0), (0, -(width + _FOLDED) % _ROUND))

        def longer(x: Array, numbers: Array) -> Array:
            numbers = jnp.broadcast_to(numbers, (*x.shape[:3], _FOLDED))
            return jnp.pad(jnp.concatenate([x, numbers], -1), after)

        return longer(query, ours), longer(key, theirs), longer(value, theirs)


def make_fields(
    gaussians: Float[Array, "B H P 4"],
    *,
    grid: geometry.Grid,
    scale: float = 1.0,
    threshold: float = 0.0,
    patches: Int[Array, "B P"] | None = None,
) -> LearnedFields:
    """Turns centres and widths into fields.

    Args:
      gaussians: centre ``(x, y)`` relative to each patch and widths ``(sx, sy)``, in
        patches.
      grid: ``(GH, GW)``.
      scale: as in ``LearnedFields``; the Gaussians are already scaled.
      threshold: keys with a membership below it are dropped, but never the patch
        itself; 0 drops none.
      patches: which patches of the grid the fields are of; None for all of them.

    Returns:
      The fields, in the dtype of ``gaussians``.
    """
    position = jnp.asarray(geometry.coordinates(grid))[None]
    if patches is not None:
        position = position[0, patches]

    def profile(size: int, axis: int) -> Float[Array, "B H P size"]:
        keys = np.arange(size, dtype=np.float32)
        centre = position[:, None, :, axis] + gaussians[..., axis]
        apart = keys[None, None, None] - centre[..., None]
        return -0.5 * jnp.square(apart / gaussians[..., 2 + axis, None])

    return LearnedFields(
        gaussians=gaussians,
        log_rows=profile(grid[0], 1),
        log_columns=profile(grid[1], 0),
        patches=patches,
        scale=scale,
        threshold=threshold,
    )


def gaussians_of(raw: Float[Array, "*batch 4"]) -> Float[Array, "*batch 4"]:
    """Returns the centres and widths that a layer's raw numbers stand for.

    The last two are logs of widths, but no width falls below ``LEAST_WIDTH``: a field
    without any patch in it would learn nothing. The first two are the centre in units
    of the widths, so that fields of all sizes move at the same rate.
    """
    sharp = _SHARPNESS * (raw[..., 2:] - math.log(LEAST_WIDTH))
    widths = LEAST_WIDTH * jnp.exp(jax.nn.softplus(sharp) / _SHARPNESS)
    return jnp.concatenate([raw[..., :2] * widths, widths], -1)


def raw_width(width: np.ndarray) -> np.ndarray:
    """Returns what `gaussians_of` makes a width of, which is above the least one."""
    beyond = _SHARPNESS * np.log(width / LEAST_WIDTH)
    return math.log(LEAST_WIDTH) + _inverse_softplus(beyond) / _SHARPNESS


def _inverse_softplus(x: np.ndarray) -> np.ndarray:
    """Returns y with log(1 + exp(y)) = x, for x > 0; exact also for large x."""
    return x + np.log(-np.expm1(-x))
