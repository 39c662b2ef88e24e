"""Learned fields: the area that each patch of a window-free transformer attends to.

The definition is ours. A patch's field in one head is four non-negative extents,
how far it reaches to the left, right, top and bottom, in patches. A key that lies
``(dx, dy)`` from the query belongs to the field with the membership m,

    log m = ls((dx + left) / t) + ls((right - dx) / t)
          + ls((dy + top) / t) + ls((bottom - dy) / t),

with ls the log of the sigmoid and t the softness in patches. It is a sum of a
profile over the columns and one over the rows, so it costs P * (GH + GW)
transcendental operations per head, not P * P.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from wf_vit import grid as geometry

# Added to the logits of a key that a hard field drops: exp() of it is exactly 0.
DROPPED = -1e9


@struct.dataclass
class LearnedFields:
    """The fields of one layer.

    The leaves are untyped, since JAX also fills the tree with shapes and specs.

    Attributes:
      extents: reach to the left, top, right and bottom, in patches, [B, H, P, 4].
      log_rows: log membership of every grid row from each query, [B, H, P, GH].
      log_columns: log membership of every grid column, likewise [B, H, P, GW].
      threshold: keys with a membership below it are dropped; 0 drops none.
    """

    extents: Any
    log_rows: Any
    log_columns: Any
    threshold: float = struct.field(pytree_node=False, default=0.0)

    def log_membership(self) -> Float[Array, "B H P P"]:
        """Returns log m of every query (row) and key (column)."""
        log_m = self.log_rows[..., :, None] + self.log_columns[..., None, :]
        log_m = log_m.reshape(*self.log_rows.shape[:-1], -1)
        if self.threshold:
            own = jnp.eye(log_m.shape[-1], dtype=bool)
            kept = (log_m >= math.log(self.threshold)) | own[None, None]
            log_m = jnp.where(kept, log_m, DROPPED)
        return log_m

    def area(self) -> Float[Array, "B H P"]:
        """Returns the mean membership over keys: the share of the grid attended to."""
        if self.threshold:
            return jnp.exp(self.log_membership()).mean(-1)
        return jnp.exp(self.log_rows).mean(-1) * jnp.exp(self.log_columns).mean(-1)

    def attention_bias(self, *, num_prefix_tokens: int) -> Float[Array, "B H N N"]:
        """Returns the logits' bias; prefix tokens see and are seen by everything."""
        pad = (num_prefix_tokens, 0)
        return jnp.pad(self.log_membership(), ((0, 0), (0, 0), pad, pad))


def make_fields(
    extents: Float[Array, "B H P 4"],
    *,
    grid: geometry.Grid,
    softness: float,
    threshold: float = 0.0,
) -> LearnedFields:
    """Turns extents into fields.

    Args:
      extents: reach to the left, top, right and bottom of each patch, in patches.
      grid: ``(GH, GW)``.
      softness: width of the field's border, in patches.
      threshold: keys with a membership below it are dropped, but never the patch
        itself; 0 drops none.

    Returns:
      The fields, in the dtype of ``extents``.
    """
    position = geometry.coordinates(grid)
    left, top, right, bottom = (
        side[..., None] for side in jnp.moveaxis(extents, -1, 0)
    )

    def profile(keys, queries, before, after):
        offset = (keys[None, :] - queries[:, None])[None, None]
        inside = jax.nn.log_sigmoid
        return inside((offset + before) / softness) + inside(
            (after - offset) / softness
        )

    rows = np.arange(grid[0], dtype=np.float32)
    columns = np.arange(grid[1], dtype=np.float32)
    return LearnedFields(
        extents=extents,
        log_rows=profile(rows, position[:, 1], top, bottom),
        log_columns=profile(columns, position[:, 0], left, right),
        threshold=threshold,
    )


def inverse_softplus(x: np.ndarray) -> np.ndarray:
    """Returns y with log(1 + exp(y)) = x, for x > 0; exact also for large x."""
    return x + np.log(-np.expm1(-x))


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """How the fields of a model start and how sharp they are.

    Attributes:
      radii: initial extent of the heads, in patches; cycled over the heads.
      softness: width of a field's border, in patches.
      threshold: hard mode: keys with a membership below it are dropped; 0 is soft.
    """

    radii: tuple[float, ...] = (1.5,)
    softness: float = 0.5
    threshold: float = 0.0


class PredictedFields(nn.Module):
    """Predicts the fields of one layer from its (normalised) patch features.

    Attributes:
      num_heads: H.
      grid: ``(GH, GW)``.
      config: initial radii and softness.
    """

    num_heads: int
    grid: geometry.Grid
    config: FieldConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> LearnedFields:
        """Returns the fields of the patches among the tokens, in float32."""
        patches = x[:, -self.grid[0] * self.grid[1] :].astype(jnp.float32)
        radii = np.resize(np.asarray(self.config.radii), self.num_heads)
        start = np.repeat(inverse_softplus(radii)[:, None], 4, axis=1)
        raw = nn.DenseGeneral(
            (self.num_heads, 4),
            kernel_init=nn.initializers.zeros,
            bias_init=lambda key, shape, dtype: jnp.asarray(start, dtype),
            name="extents",
        )(patches)
        return make_fields(
            jnp.moveaxis(jax.nn.softplus(raw), 2, 1),
            grid=self.grid,
            softness=self.config.softness,
            threshold=self.config.threshold,
        )
