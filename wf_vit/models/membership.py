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
from jaxtyping import Array, Float, Int

from wf_vit import grid as geometry
from wf_vit.errors import UsageError

# Added to the logits of a key that a hard field drops: exp() of it is exactly 0.
DROPPED = -1e9

SOURCES = ("normed", "stream", "queries")


@struct.dataclass
class LearnedFields:
    """The fields of one layer.

    The leaves are untyped, since JAX also fills the tree with shapes and specs.

    Attributes:
      extents: reach to the left, top, right and bottom, in patches, [B, H, P, 4].
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
      extents: reach to the left, top, right and bottom of each patch, in patches.
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

    Attributes:
      radii: initial extent of the heads of the first layer, in patches; cycled over
        the heads. 0 is just wide enough to cover the grid from everywhere: the layers
        start as those of a ViT, and the border is still near enough for a gradient.
      growth: by how much farther the fields of each layer reach at first than those
        of the layer before, in patches, until they reach across the grid.
      softness: width of a field's border, in patches.
      threshold: hard mode: keys with a membership below it are dropped; 0 is soft.
        It has no parameters, so a model trained softly can be evaluated, or its run
        finished, with any threshold.
      per_head: whether each head has a field of its own, or all of a layer share one.
      source: what a patch's field is predicted from: the "normed" features that the
        queries are made of, the residual "stream" before the norm, or the "queries",
        each head's own for its own field.

    Raises:
      UsageError: a value is out of range, or shared fields would read the queries.
    """

    radii: tuple[float, ...] = (1.0,)
    growth: float = 1.0
    softness: float = 0.5
    threshold: float = 0.0
    per_head: bool = True
    source: str = "normed"

    def __post_init__(self):
        if not self.radii or min(self.radii) < 0:
            raise UsageError(
                f"fields.radii is {self.radii}: expected one number for each head, or "
                "fewer to cycle over them, in patches; 0 covers the grid."
            )
        if self.growth < 0:
            raise UsageError(
                f"fields.growth is {self.growth}: expected 0 (all layers alike) or "
                "more patches per layer."
            )
        if self.softness <= 0 or not 0 <= self.threshold < 1:
            raise UsageError(
                f"fields.softness is {self.softness} and fields.threshold "
                f"{self.threshold}: expected a softness above 0, and a threshold from "
                "0 (none) to below 1."
            )
        if self.source not in SOURCES:
            raise UsageError(
                f"fields.source is {self.source!r}: choose one of {', '.join(SOURCES)}."
            )
        if self.source == "queries" and not self.per_head:
            raise UsageError(
                "fields.source='queries' differs by head: set fields.per_head=True, or "
                "another source."
            )

    def radii_of(
        self, num_heads: int, grid: geometry.Grid, layer: int
    ) -> Float[np.ndarray, " H"]:
        """Returns the initial radius of every head of a layer, in patches."""
        radii = np.resize(np.asarray(self.radii, np.float64), num_heads)
        # The farthest key of a corner then loses 2 exp(-12) of its logit, 1e-5.
        wide = max(grid) - 1 + 12 * self.softness
        most = np.maximum(radii, max(grid) - 1)
        grown = np.minimum(radii + layer * self.growth, most)
        return np.where(radii == 0, wide, grown)

    def start(
        self, num_heads: int, grid: geometry.Grid, layer: int
    ) -> Float[np.ndarray, "H 4"]:
        """Returns what the extents of a layer's new fields are the softplus of."""
        radii = inverse_softplus(self.radii_of(num_heads, grid, layer))
        return np.repeat(radii[:, None], 4, axis=1)


class HeadwiseDense(nn.Module):
    """A linear layer for each head, of that head's features only.

    Attributes:
      features: ``(H, F)``, the number of heads and of outputs of each.
      kernel_init: initializer of the kernel ``[H, K, F]``.
      bias_init: initializer of the bias ``[H, F]``.
    """

    features: tuple[int, int]
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "B P H K"]) -> Float[Array, "B P H F"]:
        """Maps the features of every head."""
        heads, outputs = self.features
        shape = (heads, x.shape[-1], outputs)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, self.features, jnp.float32)
        return jnp.einsum("bphk,hkf->bphf", x, kernel) + bias[None, None]


class PredictedFields(nn.Module):
    """Predicts the fields of one layer from its patch features.

    Attributes:
      num_heads: H.
      grid: ``(GH, GW)``.
      config: how the fields start, how sharp they are and what they read.
      layer: which layer of the model this is, from 0.
    """

    num_heads: int
    grid: geometry.Grid
    config: FieldConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        patches: Int[Array, "B P"] | None = None,
        *,
        query: Float[Array, "B N H K"] | None = None,
        stream: Float[Array, "B N D"] | None = None,
    ) -> LearnedFields:
        """Returns the fields of the patches among the tokens, in float32.

        Args:
          x: normalised tokens, prefix tokens first.
          patches: which patches of the grid there are; None for all of them.
          query: the tokens' queries, for ``source="queries"``.
          stream: the residual stream, for ``source="stream"``.
        """
        count = self.grid[0] * self.grid[1] if patches is None else patches.shape[1]
        source = {"normed": x, "stream": stream, "queries": query}[self.config.source]
        features = source[:, x.shape[1] - count :].astype(jnp.float32)
        num_fields = self.num_heads if self.config.per_head else 1
        start = self.config.start(num_fields, self.grid, self.layer)
        predict = HeadwiseDense if self.config.source == "queries" else nn.DenseGeneral
        raw = predict(
            (num_fields, 4),
            kernel_init=nn.initializers.zeros,
            bias_init=lambda key, shape, dtype: jnp.asarray(start, dtype),
            name="extents",
        )(features)
        extents = jnp.moveaxis(jax.nn.softplus(raw), 2, 1)
        shape = (len(x), self.num_heads, count, 4)
        return make_fields(
            jnp.broadcast_to(extents, shape),
            grid=self.grid,
            softness=self.config.softness,
            threshold=self.config.threshold,
            patches=patches,
        )
