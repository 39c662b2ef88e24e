"""Controls: what learned fields are compared with, to tell what they add.

Each changes the attention logits by where the patches lie, not by what they show; all
else is ``ViT``. They answer, in turn, whether the gain of a window-free transformer
is that of knowing positions (``RelativeBiasViT``, the bias of Swin, arXiv 2103.14030),
of locality (``GaussianViT``, ``GrowingWindowViT``), or of fields that every head
learns but no patch predicts (``StaticFieldViT``). Windows reach as far as fields
extend at first, ``FieldConfig.extents_of`` the layer, so that all start from the same
locality.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from wf_vit import grid as geometry
from wf_vit.models.attention import DROPPED
from wf_vit.models.learned_fields import LearnedFields, gaussians_of, make_fields
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import FieldConfig, FieldModule, FieldViT


@struct.dataclass
class PositionBias:
    """What a layer adds to the attention logits of its patches, whatever they show.

    Attributes:
      bias: for every query (row) and key (column), [B, H, P, P], or [1, H, P, P] for
        all images alike.
    """

    bias: Any
    is_learned_field = False

    @property
    def num_patches(self) -> int:
        """How many patches there are."""
        return self.bias.shape[-1]

    def attention_bias(self, *, num_prefix_tokens: int) -> Float[Array, "#B H N N"]:
        """Returns the logits' bias, which is 0 to and from prefix tokens."""
        pad = (num_prefix_tokens, 0)
        return jnp.pad(self.bias, ((0, 0), (0, 0), pad, pad))


def among(
    bias: Float[Array, "H P P"], patches: Int[Array, "B kept"] | None
) -> PositionBias:
    """Returns the bias of the whole grid, or of the patches of it that there are."""
    if patches is None:
        return PositionBias(bias[None])
    pick = jax.vmap(lambda kept: bias[:, kept[:, None], kept[None]])
    return PositionBias(pick(patches))


class RelativeBias(nn.Module):
    """A learned number for every head and displacement, 0 at first.

    Attributes:
      num_heads: H.
      grid: ``(GH, GW)``.
    """

    num_heads: int
    grid: geometry.Grid

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        patches: Int[Array, "B kept"] | None = None,
    ) -> PositionBias:
        """Returns the bias."""
        rows, columns = self.grid
        table = self.param(
            "table",
            nn.initializers.zeros,
            (self.num_heads, 2 * rows - 1, 2 * columns - 1),
        )
        dx, dy = np.moveaxis(geometry.displacements(self.grid), -1, 0).astype(int)
        return among(table[:, dy + rows - 1, dx + columns - 1], patches)


class GaussianBias(FieldModule):
    """``-d^2 / (2 s^2)`` for patches at a distance d: a Gaussian of width s.

    It is the fields that a window-free transformer starts from. There are no
    parameters.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        patches: Int[Array, "B kept"] | None = None,
    ) -> PositionBias:
        """Returns the bias."""
        widths = self.config.widths_of(self.num_heads, self.grid, self.layer)
        squares = np.square(geometry.distances(self.grid))[None]
        bias = -squares / (2 * np.square(widths)[:, None, None])
        return among(jnp.asarray(bias, jnp.float32), patches)


class WindowBias(FieldModule):
    """Only the square window around each patch is attended to.

    ``config.extents`` and ``config.growth`` are how far the windows of the heads reach.
    """

    def __call__(
        self,
        x: Float[Array, "B N D"],
        patches: Int[Array, "B kept"] | None = None,
    ) -> PositionBias:
        """Returns the bias: 0 within the window, and outside all but minus infinity."""
        extents = self.config.extents_of(self.num_heads, self.grid, self.layer)
        offset = np.abs(geometry.displacements(self.grid)).max(-1)
        inside = offset[None] <= extents[:, None, None]
        bias = np.where(inside, 0.0, DROPPED).astype(np.float32)
        return among(jnp.asarray(bias), patches)


class StaticFields(FieldModule):
    """Fields that each head learns, the same for every patch and image.

    All else is as in a window-free transformer: heads report where they listen.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        patches: Int[Array, "B kept"] | None = None,
    ) -> LearnedFields:
        """Returns the fields; unless patches are given, those of one image for all."""
        start = self.config.start(self.num_heads, self.grid, self.layer)
        raw = self.param("gaussians", lambda key: jnp.asarray(start, jnp.float32))
        if patches is None:
            batch, count = 1, self.grid[0] * self.grid[1]
        else:
            batch, count = patches.shape
        gaussians = self.scale * gaussians_of(raw)[None, :, None]
        fields = make_fields(
            jnp.broadcast_to(gaussians, (batch, self.num_heads, count, 4)),
            grid=self.grid,
            scale=self.scale,
            threshold=self.config.threshold,
            patches=patches,
        )
        shape = (len(x), self.num_heads, count, 4)
        return fields.replace(gaussians=jnp.broadcast_to(gaussians, shape))


class RelativeBiasViT(ViT):
    """A ViT with a learned relative position bias in each layer and head."""

    def field_for_layer(self, layer: int):
        """Returns the maker of a layer's bias."""
        del layer
        return functools.partial(RelativeBias, grid=self.grid)


class _LocalViT(ViT):
    """A ViT with a notion of locality that it does not learn.

    Attributes:
      fields: ``extents`` say how local the heads are.
    """

    fields: FieldConfig = FieldConfig()
    # The module of each layer.
    kind = FieldModule

    def field_for_layer(self, layer: int):
        """Returns the maker of a layer's bias."""
        return functools.partial(
            self.kind, grid=self.grid, config=self.fields, layer=layer
        )


class GaussianViT(_LocalViT):
    """A ViT with a Gaussian bias, whose widths stay what they are."""

    kind = GaussianBias


class GrowingWindowViT(_LocalViT):
    """A ViT with square windows, which reach farther in every layer."""

    kind = WindowBias


class StaticFieldViT(FieldViT):
    """A ViT with fields that each layer and head learns, and no patch predicts."""

    kind = StaticFields
