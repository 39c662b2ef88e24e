"""WinfT, the window-free transformer: every patch learns the area it attends to.

The name and the aim are the paper's (arXiv 2203.05922), the definition is ours. A
patch's field in one head is a Gaussian, which lies where the patch tends to and is as
wide and as high as it needs: a centre ``(x, y)`` relative to the patch, and a width
``(sx, sy)``, all in patches. A key that lies ``(dx, dy)`` from the query belongs to the
field with the membership m,

    log m = -((dx - x) / sx)^2 / 2 - ((dy - y) / sy)^2 / 2 .

It is a sum of a profile over the columns and one over the rows, so it costs
P * (GH + GW) operations per head, not P * P, until it is added to the logits. The
membership is one half on an ellipse, which reaches ``grid.HALF`` widths from the
centre.

Each head also reports to the residual stream where it listens and how widely
(``LearnedFields.report``): the responsive field that its attention has, from which the
next layers can predict theirs.
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
from jax import lax
from jaxtyping import Array, Float, Int

from wf_vit import grid as geometry
from wf_vit import settings
from wf_vit.models.attention import DROPPED, Dtype
from wf_vit.models.vit import ViT
from wf_vit.settings import ANY, setting

# In patches: the nearest key of a field this narrow loses 8 of its logit.
_LEAST_WIDTH = 0.25
# In patches^2, of what a head attends to: a single patch has none.
_LEAST_VARIANCE = 0.1
# Of the bend above it: widths that are twice the least one are hardly bent.
_SHARPNESS = 4.0


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
      threshold: keys with a membership below it are dropped; 0 drops none.
    """

    gaussians: Any
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

    def report(self, attention: Float[Array, "B H N N"]) -> Float[Array, "B N H 4"]:
        """Returns where each head listens: how far away, and how widely.

        The displacement ``(x, y)`` of the mean place that it attends to, in standard
        deviations of the grid's positions, and the log of the variance around it in x
        and in y, in patches^2. Prefix tokens have no place: as keys they are left out,
        as queries they are in the middle.

        Args:
          attention: weights, prefix tokens first.
        """
        position, _ = self._positions()
        prefix = ((0, 0), (attention.shape[-1] - position.shape[1], 0), (0, 0))
        one = jnp.ones_like(position[..., :1])
        keys = jnp.concatenate([position, jnp.square(position), one], -1)
        keys = jnp.broadcast_to(
            jnp.pad(keys, prefix), (len(attention), *attention.shape[-1:], 5)
        )
        # The variance is a difference: products in all bits, on accelerators too.
        highest = lax.Precision.HIGHEST
        moments = jnp.einsum("bhij,bjc->bihc", attention, keys, precision=highest)
        moments = moments[..., :4] / jnp.maximum(moments[..., 4:], 1e-6)
        mean, square = moments[..., :2], moments[..., 2:]
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        unit = np.std(geometry.coordinates(self._grid), axis=0).clip(min=0.1)
        apart = mean - jnp.pad(position, prefix)[:, :, None]
        apart = apart / jnp.asarray(unit, jnp.float32)[None, None, None]
        return jnp.concatenate([apart, jnp.log(variance + _LEAST_VARIANCE)], -1)

    @property
    def _grid(self) -> geometry.Grid:
        return self.log_rows.shape[-1], self.log_columns.shape[-1]

    def _positions(self) -> tuple[Float[Array, "#B P 2"], Float[Array, "B H P 2"]]:
        """Returns the patches and their centres, from the middle of the grid."""
        whole = geometry.coordinates(self._grid)
        position = jnp.asarray(whole - whole.mean(0))[None]
        if self.patches is not None:
            position = position[0, self.patches]
        return position, position[:, None] + self.gaussians[..., :2]

    def area(self) -> Float[Array, "B H P"]:
        """Returns the mean membership over keys: the share of the grid attended to."""
        if self.threshold:
            return jnp.exp(self.log_membership()).mean(-1)
        return jnp.exp(self.log_rows).mean(-1) * jnp.exp(self.log_columns).mean(-1)

    def attention_bias(self, *, num_prefix_tokens: int) -> Float[Array, "B H N N"]:
        """Returns the logits' bias; prefix tokens see and are seen by everything."""
        pad = (num_prefix_tokens, 0)
        return jnp.pad(self.log_membership(), ((0, 0), (0, 0), pad, pad))

    def folds(self, dtype: Dtype) -> bool:
        """Returns whether `fold` is exact enough, and keeps every key.

        It needs products of float32 in all their bits, which accelerators leave out.
        """
        exact = dtype == jnp.float32 and jax.default_backend() == "cpu"
        return exact and not self.threshold

    def fold(
        self, query: Float[Array, "B N H K"], key: Float[Array, "B N H K"]
    ) -> tuple[Float[Array, "B N H K+5"], Float[Array, "B N H K+5"]]:
        """Returns queries and keys whose products have log m added to them.

        The log of a Gaussian is a quadratic form of the key's position, so that five
        more numbers for each query and key do what an [N, N] bias does. Positions are
        counted from the middle of the grid, where their squares are least: what the
        terms lose by cancelling is some 1e-7 of ``(side of the grid / width)^2``.

        Args:
          query: scaled, prefix tokens first.
          key: likewise.
        """
        position, centre = self._positions()
        precision = 1 / jnp.square(self.gaussians[..., 2:])
        pulled = precision * centre
        constant = (pulled * centre).sum(-1, keepdims=True)
        ours = jnp.concatenate([-precision / 2, pulled, -constant / 2], -1)
        one = jnp.ones_like(position[..., :1])
        theirs = jnp.concatenate([jnp.square(position), position, one], -1)

        def extend(x: Array, numbers: Array) -> Array:
            shape = (*x.shape[:1], numbers.shape[1], *x.shape[2:3], numbers.shape[3])
            numbers = jnp.broadcast_to(numbers, shape)
            prefix = x.shape[1] - shape[1]
            numbers = jnp.pad(numbers, ((0, 0), (prefix, 0), (0, 0), (0, 0)))
            return jnp.concatenate([x, numbers], -1)

        return (
            extend(query, jnp.moveaxis(ours, 1, 2)),
            extend(key, theirs[:, :, None]),
        )


def make_fields(
    gaussians: Float[Array, "B H P 4"],
    *,
    grid: geometry.Grid,
    threshold: float = 0.0,
    patches: Int[Array, "B P"] | None = None,
) -> LearnedFields:
    """Turns centres and widths into fields.

    Args:
      gaussians: centre ``(x, y)`` relative to each patch and widths ``(sx, sy)``, in
        patches.
      grid: ``(GH, GW)``.
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
        threshold=threshold,
    )


def gaussians_of(raw: Float[Array, "*batch 4"]) -> Float[Array, "*batch 4"]:
    """Returns the centres and widths that a layer's raw numbers stand for.

    The last two are logs of widths, but no width falls below ``_LEAST_WIDTH``: a field
    without any patch in it would learn nothing. The first two are the centre in units
    of the widths, so that fields of all sizes move at the same rate.
    """
    sharp = _SHARPNESS * (raw[..., 2:] - math.log(_LEAST_WIDTH))
    widths = _LEAST_WIDTH * jnp.exp(jax.nn.softplus(sharp) / _SHARPNESS)
    return jnp.concatenate([raw[..., :2] * widths, widths], -1)


def raw_width(width: np.ndarray) -> np.ndarray:
    """Returns what `gaussians_of` makes a width of, which is above the least one."""
    beyond = _SHARPNESS * np.log(width / _LEAST_WIDTH)
    return math.log(_LEAST_WIDTH) + _inverse_softplus(beyond) / _SHARPNESS


def _inverse_softplus(x: np.ndarray) -> np.ndarray:
    """Returns y with log(1 + exp(y)) = x, for x > 0; exact also for large x."""
    return x + np.log(-np.expm1(-x))


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """How the fields of a model start.

    Raises:
      UsageError: a value is out of its range.
    """

    extents: tuple[float, ...] = setting(
        (1.0,),
        "patches from the centre to where the membership is one half, of the first "
        "layer's fields at first, for each head, or fewer to cycle over the heads; 0 "
        "covers the grid, so that the model starts as a ViT",
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
    hidden: int = setting(
        32,
        "width of the hidden layer that predicts the fields of a layer from a patch",
        low=1,
        high=100_000,
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
        across = max(grid) - 1
        grown = np.minimum(extents + layer * self.growth, np.maximum(extents, across))
        # The farthest key of a corner then loses 1e-5 of its logit.
        wide = geometry.HALF * max(across, 1) * 10**2.5
        return np.where(extents == 0, wide, grown)

    def widths_of(
        self, num_heads: int, grid: geometry.Grid, layer: int
    ) -> Float[np.ndarray, " H"]:
        """Returns the initial width of every head of a layer, in patches."""
        widths = self.extents_of(num_heads, grid, layer) / geometry.HALF
        return np.maximum(widths, 1.01 * _LEAST_WIDTH)

    def start(
        self, num_heads: int, grid: geometry.Grid, layer: int
    ) -> Float[np.ndarray, "H 4"]:
        """Returns the raw numbers of a layer's new fields: around the patch itself."""
        widths = raw_width(self.widths_of(num_heads, grid, layer))
        return np.stack([0 * widths, 0 * widths, widths, widths], axis=1)


class FieldModule(nn.Module):
    """The fields of one layer, or what a control has in their place.

    Attributes:
      num_heads: H.
      grid: ``(GH, GW)``.
      config: how the fields start.
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
        hidden = nn.gelu(nn.Dense(self.config.hidden, name="hidden")(features))
        raw = nn.DenseGeneral(
            (self.num_heads, 4),
            kernel_init=nn.initializers.zeros,
            bias_init=lambda key, shape, dtype: jnp.asarray(start, dtype),
            name="gaussians",
        )(hidden)
        return make_fields(
            gaussians_of(jnp.moveaxis(raw, 2, 1)),
            grid=self.grid,
            threshold=self.config.threshold,
            patches=patches,
        )


class WindowFreeViT(ViT):
    """A ViT in which each layer, patch and head predicts its own field.

    There is no partition and no fixed window. With fields far wider than the grid, the
    same parameters, and zeros where heads report, it computes what ``ViT`` does.

    Attributes:
      fields: how the fields start.
    """

    fields: FieldConfig = FieldConfig()

    def field_for_layer(self, layer: int):
        """Returns the maker of the module that predicts a layer's fields."""
        return functools.partial(
            PredictedFields, grid=self.grid, config=self.fields, layer=layer
        )
