"""What a vision transformer is made of: norm, MLP, block, and attention pooling."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from wf_vit.models.attention import Dtype, Record, SelfAttention

MLPS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
NORMS = ("layer", "rms")


@dataclasses.dataclass(frozen=True)
class Norm:
    """How tokens are normalised: by a layer norm, or an RMS norm (arXiv 1910.07467).

    Attributes:
      kind: of ``NORMS``.
      epsilon: is added to the variance, or to the mean square.
    """

    kind: str = "layer"
    epsilon: float = 1e-6

    def module(self, dtype: Dtype, name: str | None = None) -> nn.Module:
        """Returns the module, which has a scale and, as a layer norm, a bias."""
        norm = nn.LayerNorm if self.kind == "layer" else nn.RMSNorm
        return norm(epsilon=self.epsilon, dtype=dtype, name=name)

    def divisor(self, x: Float[Array, "B N D"]) -> Float[Array, "B N"]:
        """Returns what each token is divided by."""
        x = x.astype(jnp.float32)
        square = x.var(-1) if self.kind == "layer" else jnp.square(x).mean(-1)
        return jnp.sqrt(square + self.epsilon)


class Mlp(nn.Module):
    """The token-wise network of a block.

    Attributes:
      hidden: width of the hidden layer.
      kind: of ``MLPS``: GELU exact, by tanh or by a sigmoid ("quick_gelu", CLIP's), or
        SwiGLU (arXiv 2002.05202).
      inner_norm: of the hidden layer (EVA-02, arXiv 2303.11331), or None for none.
      dtype: of the computation.
    """

    hidden: int
    kind: str = "gelu_tanh"
    inner_norm: Norm | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Transforms every token on its own."""

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                kernel_init=nn.initializers.xavier_uniform(),
                bias_init=nn.initializers.normal(stddev=1e-6),
                dtype=self.dtype,
                name=name,
            )

        hidden = dense(self.hidden, "up")(x)
        if self.kind == "swiglu":
            hidden = nn.silu(dense(self.hidden, "gate")(x)) * hidden
        elif self.kind == "quick_gelu":
            hidden = hidden * nn.sigmoid(1.702 * hidden)
        else:
            hidden = nn.gelu(hidden, approximate=self.kind == "gelu_tanh")
        if self.inner_norm is not None:
            hidden = self.inner_norm.module(self.dtype, "norm")(hidden)
        return dense(x.shape[-1], "down")(hidden)


class Block(nn.Module):
    """One pre-norm transformer block, with LayerScale and stochastic depth.

    Attributes:
      attention: arguments of ``SelfAttention``.
      mlp: arguments of ``Mlp``.
      layer_scale: initial LayerScale (arXiv 2103.17239), or None for none.
      drop_path: rate of stochastic depth (arXiv 1603.09382), per example.
      norm: of the tokens before the attention and before the MLP.
      dtype: of the computation.
    """

    attention: Mapping[str, Any]
    mlp: Mapping[str, Any]
    layer_scale: float | None
    drop_path: float
    norm: Norm
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        bias: Float[Array, "#B #H N N"] | None,
        train: bool,
        record: bool,
        patches: Int[Array, "B kept"] | None,
    ) -> tuple[Float[Array, "B N D"], Any, Record]:
        """Returns the tokens after the block, the layer's fields and its record."""

        def normed(name: str, x: Float[Array, "B N D"]) -> Array:
            return self.norm.module(self.dtype, name)(x)

        def residual(name: str, branch: Float[Array, "B N D"]) -> Array:
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                scale = self.param(name, init, branch.shape[-1:])
                branch = branch * scale.astype(branch.dtype)[None, None]
            if train and self.drop_path:
                keep = 1.0 - self.drop_path
                shape = (branch.shape[0], 1, 1)
                kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, shape)
                branch = jnp.where(kept, branch / keep, 0)
            return branch

        attended, fields, recorded = SelfAttention(
            **self.attention, dtype=self.dtype, name="attention"
        )(normed("attention_norm", x), bias, record, patches)
        if record:
            recorded["scale"] = self.norm.divisor(x)
        x = x + residual("attention_scale", attended)
        # The gradient here is what the propagated indicator is made of.
        x = self.perturb("after_attention", x)
        hidden = Mlp(**self.mlp, dtype=self.dtype, name="mlp")(normed("mlp_norm", x))
        return x + residual("mlp_scale", hidden), fields, recorded


class AttentionPool(nn.Module):
    """Multi-head attention pooling with one learned query (arXiv 1810.00825).

    Attributes:
      num_heads: of the pooling.
      mlp: arguments of the ``Mlp`` that follows; None for none.
      norm: before that.
      dtype: of the computation.
    """

    num_heads: int
    mlp: Mapping[str, Any] | None
    norm: Norm
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        """Returns one vector per image."""
        probe = self.param(
            "probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1])
        )
        probe = jnp.tile(probe.astype(x.dtype), (x.shape[0], 1, 1))
        pooled = nn.MultiHeadDotProductAttention(
            self.num_heads,
            dtype=self.dtype,
            force_fp32_for_softmax=True,
            kernel_init=nn.initializers.xavier_uniform(),
            name="attention",
        )(probe, x)
        if self.mlp is not None:
            hidden = self.norm.module(self.dtype, "norm")(pooled)
            pooled = pooled + Mlp(**self.mlp, dtype=self.dtype, name="mlp")(hidden)
        return pooled[:, 0]
