"""WinfT, the window-free transformer: every patch learns the area it attends to.

The name and the aim are the paper's (arXiv 2203.05922), the definition is ours. A
patch's field in one head is four non-negative extents: how many patches it extends to
the left, right, top and bottom. A key that lies ``(dx, dy)`` from the query belongs to
the field with the membership m,

    log m = ls((dx + left) / t) + ls((right - dx) / t)
          + ls((dy + top) / t) + ls((bottom - dy) / t),

with ls the log of the sigmoid and t the softness in patches. It is a sum of a
profile over the columns and one over the rows, so it costs P * (GH + GW)
transcendental operations per head, not P * P.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from wf_vit import grid as geometry
from wf_vit import settings
from wf_vit.models.attention import DROPPED
from wf_vit.models.vit import ViT
from wf_vit.settings import ANY, setting


@struct.dataclass
class LearnedFields:
    """The fields of one layer.

    The leaves are untyped, since JAX also fills the tree with shapes and specs.

    Attributes:
      extents: to the left, top, right and bottom, in patches, [B, H, P, 4].
      log_rows: log membership of every grid row from each query, [B, H, P, GH].
      log_columns: log membership of every grid column, likewise [B, H, P, GW].
      patches: which patches of the grid these are, and so are the keys, [B, P]; None
        for all of them in their order.
      threshold: keys with a membership below it are dropped; 0 drops none.
    """

    extents: Any
    log_rows: Any
    log_columns: Any
    patches: Any = None
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
    patches: Int[Array, "B P"] | None = None,
) -> LearnedFields:
    """Turns extents into fields.

    Args:
      extents: to the left, top, right and bottom of each patch, in patches.
      grid: ``(GH, GW)``.
      softness: width of the field's border, in patches.
      threshold: keys with a membership below it are dropped, but never the patch
        itself; 0 drops none.
      patches: which patches of the grid the extents are of; None for all of them.

    Returns:
      The fields, in the dtype of ``extents``.
    """
    position = jnp.asarray(geometry.coordinates(grid))[None]
    if patches is not None:
        position = position[0, patches]
    left, top, right, bottom = (
        side[..., None] for side in jnp.moveaxis(extents, -1, 0)
    )

    def profile(keys, queries, before, after):
        offset = keys[None, None, None] - queries[:, None, :, None]
        inside = jax.nn.log_sigmoid
        return inside((offset + before) / softness) + inside(
            (after - offset) / softness
        )

    rows = np.arange(grid[0], dtype=np.float32)
    columns = np.arange(grid[1], dtype=np.float32)
    return LearnedFields(
        extents=extents,
        log_rows=profile(rows, position[..., 1], top, bottom),
        log_columns=profile(columns, position[..., 0], left, right),
        patches=patches,
        threshold=threshold,
    )


def inverse_softplus(x: np.ndarray) -> np.ndarray:
    """Returns y with log(1 + exp(y)) = x, for x > 0; exact also for large x."""
    return x + np.log(-np.expm1(-x))


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """How the fields of a model start and how sharp they are.

    Raises:
      UsageError: a value is out of its range.
    """

    # 0 is near enough to the border of the grid for a gradient.
    extents: tuple[float, ...] = setting(
        (1.0,),
        "patches that the fields of the first layer extend to each side at first, for "
        "each head, or fewer to cycle over the heads; 0 just covers the grid, so that "
        "the model starts as a ViT",
        length=ANY,
        low=0,
        high=10_000,
    )
    growth: float = setting(
        1.0,
        "patches that the fields of each layer extend farther at first than those of "
        "the layer before, until they cover the grid",
        low=0,
        high=10_000,
    )
    softness: float = setting(
        0.5, "width of a field's border, in patches", above=0, high=10_000
    )
    # It has no parameters, so it may be changed after training, or in the course of it.
    threshold: float = setting(
        0.0,
        "membership below which keys are dropped (hard mode); 0 drops none",
        low=0,
        below=1,
    )

    def __post_init__(self):
        settings.check_fields(self, "config.model.fields")

    def extents_of(
        self, num_heads: int, grid: geometry.Grid, layer: int
    ) -> Float[np.ndarray, " H"]:
        """Returns the initial extent of every head of a layer, in patches."""
        extents = np.resize(np.asarray(self.extents, np.float64), num_heads)
        # The farthest key of a corner then loses 2 exp(-12) of its logit, 1e-5.
        wide = max(grid) - 1 + 12 * self.softness
        most = np.maximum(extents, max(grid) - 1)
        grown = np.minimum(extents + layer * self.growth, most)
        return np.where(extents == 0, wide, grown)

    def start(
        self, num_heads: int, grid: geometry.Grid, layer: int
    ) -> Float[np.ndarray, "H 4"]:
        """Returns what the extents of a layer's new fields are the softplus of."""
        extents = inverse_softplus(self.extents_of(num_heads, grid, layer))
        return np.repeat(extents[:, None], 4, axis=1)


class FieldModule(nn.Module):
    """The fields of one layer, or what a control has in their place.

    Attributes:
      num_heads: H.
      grid: ``(GH, GW)``.
      config: how the fields start and how sharp they are.
      layer: which layer of the model this is, from 0.
    """

    num_heads: int
    grid: geometry.Grid
    config: FieldConfig
    layer: int


class PredictedFields(FieldModule):
    """Predicts the fields of one layer from its patch features."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        patches: Int[Array, "B P"] | None = None,
    ) -> LearnedFields:
        """Returns the fields of the patches among the tokens, in float32.

        Args:
          x: normalised tokens, prefix tokens first.
          patches: which patches of the grid there are; None for all of them.
        """
        count = self.grid[0] * self.grid[1] if patches is None else patches.shape[1]
        features = x[:, x.shape[1] - count :].astype(jnp.float32)
        start = self.config.start(self.num_heads, self.grid, self.layer)
        raw = nn.DenseGeneral(
            (self.num_heads, 4),
            kernel_init=nn.initializers.zeros,
            bias_init=lambda key, shape, dtype: jnp.asarray(start, dtype),
            name="extents",
        )(features)
        return make_fields(
            jnp.moveaxis(jax.nn.softplus(raw), 2, 1),
            grid=self.grid,
            softness=self.config.softness,
            threshold=self.config.threshold,
            patches=patches,
        )


class WindowFreeViT(ViT):
    """A ViT in which each layer, patch and head predicts its own field.

    There is no partition and no fixed window. With fields far wider than the grid,
    and the same parameters, it computes exactly what ``ViT`` does.

    Attributes:
      fields: how the fields start and how sharp they are.
    """

    fields: FieldConfig = FieldConfig()

    def field_for_layer(self, layer: int):
        """Returns the maker of the module that predicts a layer's fields."""
        return functools.partial(
            PredictedFields, grid=self.grid, config=self.fields, layer=layer
        )
