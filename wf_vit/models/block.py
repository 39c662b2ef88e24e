"""What a vision transformer is made of: the block, its MLP, and attention pooling."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from wf_vit.models.attention import Dtype, Record, SelfAttention

MLPS = ("gelu", "gelu_tanh", "swiglu")


class Mlp(nn.Module):
    """The token-wise network of a block: GELU, or SwiGLU (arXiv 2002.05202)."""

    hidden: int
    kind: str = "gelu_tanh"
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
        else:
            hidden = nn.gelu(hidden, approximate=self.kind == "gelu_tanh")
        return dense(x.shape[-1], "down")(hidden)


def token_scale(x: Float[Array, "B N D"], epsilon: float) -> Float[Array, "B N"]:
    """Returns what a layer norm divides each token by."""
    return jnp.sqrt(x.astype(jnp.float32).var(-1) + epsilon)


class Block(nn.Module):
    """One pre-norm transformer block, with LayerScale and stochastic depth.

    Attributes:
      attention: arguments of ``SelfAttention``.
      mlp: arguments of ``Mlp``.
      layer_scale: initial LayerScale (arXiv 2103.17239), or None for none.
      drop_path: rate of stochastic depth (arXiv 1603.09382), per example.
      norm_epsilon: of the layer norms.
      dtype: of the computation.
    """

    attention: Mapping[str, Any]
    mlp: Mapping[str, Any]
    layer_scale: float | None
    drop_path: float
    norm_epsilon: float
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

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name=name)

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
        )(norm("attention_norm")(x), bias, record, patches)
        if record:
            recorded["scale"] = token_scale(x, self.norm_epsilon)
        x = x + residual("attention_scale", attended)
        # The gradient here is what the propagated indicator is made of.
        x = self.perturb("after_attention", x)
        hidden = Mlp(**self.mlp, dtype=self.dtype, name="mlp")(norm("mlp_norm")(x))
        return x + residual("mlp_scale", hidden), fields, recorded


class AttentionPool(nn.Module):
    """Multi-head attention pooling with one learned query (arXiv 1810.00825)."""

    num_heads: int
    mlp: Mapping[str, Any]
    norm_epsilon: float
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
        hidden = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm")(pooled)
        pooled = pooled + Mlp(**self.mlp, dtype=self.dtype, name="mlp")(hidden)
        return pooled[:, 0]
