"""WinfT, the window-free transformer: every patch learns the area it attends to.

The name and the aim are the paper's (arXiv 2203.05922), the definition is ours. There
is no partition and no fixed window. From its features every patch predicts, for each
head, a field (`wf_vit.models.learned_fields`): a Gaussian, which lies where the patch
tends to and is as wide and as high as it needs. Its log is added to the attention
logits.

Each head also reports to the residual stream where it listens and how widely
(``LearnedFields.report``): the responsive field that its attention has, from which the
next layers can predict theirs.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from wf_vit import grid as geometry
from wf_vit import settings
from wf_vit.models.learned_fields import (
    LEAST_WIDTH,
    LearnedFields,
    gaussians_of,
    make_fields,
    raw_width,
)
from wf_vit.models.vit import ViT
from wf_vit.settings import ANY, setting


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """How the fields of a model start.

    Raises:
      UsageError: a value is out of its range.
    """

    extents: tuple[float, ...] = setting(
        (1.0,),
        "how far the fields of the first layer reach at first: patches from the centre "
        "to where the membership is one half; a number for each head, or fewer, which "
        "are repeated; 0 covers the grid, so that the model starts as a ViT",
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
        return np.maximum(widths, 1.01 * LEAST_WIDTH)

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
      scale: how many times as fine the grid is as in training.
    """

    num_heads: int
    grid: geometry.Grid
    config: FieldConfig
    layer: int
    scale: float = 1.0


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
            self.scale * gaussians_of(jnp.moveaxis(raw, 2, 1)),
            grid=self.grid,
            scale=self.scale,
            threshold=self.config.threshold,
            patches=patches,
        )


class FieldViT(ViT):
    """A ViT with learned fields.

    On images of another size (`at_size`) centres and widths scale with the number of
    patches along a side, and so do the lengths that heads report: a field covers as
    much of an object as in training.

    Attributes:
      fields: how the fields start.
      trained_patches: P of the grid on which the fields were learned; None: of this.
    """

    fields: FieldConfig = FieldConfig()
    trained_patches: int | None = None
    # The module of each layer.
    kind = FieldModule

    def at_size(self, image_size: tuple[int, int]) -> "FieldViT":
        """Returns the model for images of another size; its fields scale."""
        trained = self.trained_patches or math.prod(self.grid)
        return self.clone(
            image_size=tuple(image_size), trained_patches=trained
        ).validate()

    def field_for_layer(self, layer: int):
        """Returns the maker of the module of a layer's fields."""
        patches = math.prod(self.grid)
        return functools.partial(
            self.kind,
            grid=self.grid,
            config=self.fields,
            layer=layer,
            scale=math.sqrt(patches / (self.trained_patches or patches)),
        )


class WindowFreeViT(FieldViT):
    """A ViT in which each layer, patch and head predicts its own field.

    There is no partition and no fixed window. With fields far wider than the grid, the
    same parameters, and zeros where heads report, it computes what ``ViT`` does.
    """

    kind = PredictedFields
