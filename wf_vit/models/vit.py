"""The Vision Transformer (Dosovitskiy et al., arXiv 2010.11929), open to analysis.

The forward pass can be entered and left between blocks (``embed``, ``encode``,
``readout``), every block takes an additive attention bias, and what the indicators
need is returned on request as plain arrays under fixed names.
"""

import operator
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.models.attention import Dtype
from wf_vit.models.block import AttentionPool, Block, Norm
from wf_vit.models.checks import check
from wf_vit.models.positions import Rotary, sincos_positions


class ViT(nn.Module):
    """A vision transformer.

    Prefix tokens come first: CLS (if ``cls_token``), the distillation token (if
    ``distillation_token``), the registers. Each is one learned vector, to which a
    published model's position embedding of that token has been added.

    Attributes:
      num_classes: C; 0 for a backbone without a head, which returns the pooled
        representation in place of logits.
      image_size: ``(height, width)`` in pixels.
      patch_size: ``(height, width)`` in pixels; it divides ``image_size``.
      width: D.
      depth: L.
      mlp_dim: width of the hidden layer of each MLP.
      num_heads: H; it divides ``width``.
      pool: what the head reads: "cls" token, "mean" of the patches, "cls_mean" (both,
        one after the other), or "map" (attention pooling).
      pool_tokens: what attention pooling looks at: "all" tokens, or the "patches".
      pool_heads: of attention pooling; None for ``num_heads``.
      pool_mlp_dim: of the MLP after attention pooling; None for ``mlp_dim``, 0 for no
        MLP.
      cls_token: whether there is a CLS token.
      distillation_token: whether there is DeiT's token (arXiv 2012.12877), with its
        own head; the logits are the mean of both heads'.
      num_registers: number of register tokens (arXiv 2309.16588).
      positions: what is added to the patches: a "learned" table, fixed "sincos" or
        "sincos_mae" (see ``sincos_positions``), or "none".
      rotary: how each layer rotates queries and keys by their positions, or None.
      relative_positions: whether each layer adds a learned bias of displacements to
        its attention logits.
      normed_embedding: what is normalised before the first block: "none"; the
        "patches", before their positions are added; or all "tokens", after.
      mlp: "gelu", "gelu_tanh" (its approximation), "quick_gelu" (a coarser one) or
        "swiglu".
      mlp_inner_norm: whether the hidden layer of each MLP is normalised.
      layer_scale: initial LayerScale, or None.
      drop_path: stochastic depth of the last block; it grows linearly from 0.
      qkv_bias: whether queries, keys and values have a bias.
      norm_kind: "layer" or "rms" norms.
      norm_epsilon: of the norms.
      final_norm: whether there is a norm after the last block.
      pool_before_norm: whether the final norm follows the pooling.
      representation_size: width of the dense layer between the pooling and the head,
        or None for none: with tanh in original ViTs pretrained on ImageNet-21k,
        without as the projection of image-text models.
      representation_tanh: whether that layer has a tanh.
      dtype: of the computation; parameters and softmax are float32.
      remat: whether the backward pass recomputes each block's activations.
    """

    num_classes: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    pool: str = "cls"
    pool_tokens: str = "all"
    pool_heads: int | None = None
    pool_mlp_dim: int | None = None
    cls_token: bool = True
    distillation_token: bool = False
    num_registers: int = 0
    positions: str = "learned"
    rotary: Rotary | None = None
    relative_positions: bool = False
    normed_embedding: str = "none"
    mlp: str = "gelu_tanh"
    mlp_inner_norm: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0
    qkv_bias: bool = True
    norm_kind: str = "layer"
    norm_epsilon: float = 1e-6
    final_norm: bool = True
    pool_before_norm: bool = False
    representation_size: int | None = None
    representation_tanh: bool = True
    dtype: Dtype = jnp.float32
    remat: bool = False

    @property
    def grid(self) -> geometry.Grid:
        """``(GH, GW)``, the rows and columns of patches."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens come before the patches."""
        return int(self.cls_token) + int(self.distillation_token) + self.num_registers

    @property
    def num_tokens(self) -> int:
        """N, prefix tokens included."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    def validate(self) -> "ViT":
        """Returns the model; raises UsageError if its attributes contradict."""
        check(self)
        return self

    def at_size(self, image_size: tuple[int, int]) -> "ViT":
        """Returns the model for images of another size.

        Raises:
          UsageError: patches do not divide the size.
        """
        return self.clone(image_size=tuple(image_size)).validate()

    def check_layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """Returns the numbers of some layers, checked; None: of all of them."""
        if layers is None:
            return tuple(range(self.depth))
        chosen = tuple(operator.index(layer) for layer in layers)
        known = set(range(self.depth))
        if not chosen or not set(chosen) <= known or len(set(chosen)) < len(chosen):
            raise UsageError(
                f"layers is {list(layers)}: name some of the layers 0 to "
                f"{self.depth - 1}, each once, or pass None for all."
            )
        return chosen

    def field_for_layer(self, layer: int):
        """Returns the maker of a layer's field module; None: attention is plain."""
        del layer

    def setup(self):
        """Declares the submodules; parameter names are part of the file format."""
        self.validate()
        norm = Norm(self.norm_kind, self.norm_epsilon)
        mlp = {
            "hidden": self.mlp_dim,
            "kind": self.mlp,
            "inner_norm": norm if self.mlp_inner_norm else None,
        }
        block = nn.remat(Block, static_argnums=(3, 4)) if self.remat else Block
        self.blocks = [
            block(
                attention={
                    "num_heads": self.num_heads,
                    "field": self.field_for_layer(layer),
                    "qkv_bias": self.qkv_bias,
                    "rotary": self.rotary,
                    "relative_positions": self.relative_positions,
                    "grid": self.grid,
                },
                mlp=mlp,
                layer_scale=self.layer_scale,
                drop_path=self.drop_path * layer / max(self.depth - 1, 1),
                norm=norm,
                dtype=self.dtype,
            )
            for layer in range(self.depth)
        ]
        self.patches = nn.Conv(
            self.width,
            self.patch_size,
            strides=self.patch_size,
            padding="VALID",
            dtype=self.dtype,
        )
        normal = nn.initializers.normal(stddev=0.02)
        if self.num_prefix_tokens:
            shape = (self.num_prefix_tokens, self.width)
            self.prefix = self.param("prefix", normal, shape)
        if self.positions == "learned":
            shape = (*self.grid, self.width)
            self.position_table = self.param("position_table", normal, shape)
        if self.normed_embedding != "none":
            self.embedding_norm = norm.module(self.dtype)
        if self.final_norm:
            self.norm = norm.module(self.dtype)
        if self.pool == "map":
            hidden = self.mlp_dim if self.pool_mlp_dim is None else self.pool_mlp_dim
            pool_mlp = {"hidden": hidden, "kind": self.mlp} if hidden else None
            heads = self.pool_heads or self.num_heads
            self.attention_pool = AttentionPool(heads, pool_mlp, norm, self.dtype)
        if self.representation_size:
            self.representation = nn.Dense(self.representation_size, dtype=self.dtype)
        if self.num_classes:
            zeros = nn.initializers.zeros
            self.head = nn.Dense(self.num_classes, kernel_init=zeros)
            if self.distillation_token:
                self.head_distillation = nn.Dense(self.num_classes, kernel_init=zeros)

    def embed(self, images: Float[Array, "B height width 3"]) -> Float[Array, "B N D"]:
        """Turns images into tokens: patches, positions, prefix tokens in front."""
        if images.shape[1:3] != tuple(self.image_size):
            raise UsageError(
                f"The images are {images.shape[1:3]} (height, width), but the model "
                f"was made for {tuple(self.image_size)}: resize the images, or make "
                "the model with their image_size."
            )
        tokens = self.patches(images.astype(self.dtype))
        tokens = tokens.reshape(tokens.shape[0], -1, self.width)
        if self.normed_embedding == "patches":
            tokens = self.embedding_norm(tokens)
        if self.positions == "learned":
            table = self.position_table.reshape(-1, self.width)
            tokens = tokens + jnp.asarray(table, tokens.dtype)[None]
        elif self.positions != "none":
            table = sincos_positions(self.grid, self.width, self.positions)
            tokens = tokens + jnp.asarray(table, tokens.dtype)[None]
        if self.num_prefix_tokens:
            prefix = self.prefix.astype(tokens.dtype)
            prefix = jnp.broadcast_to(prefix, (tokens.shape[0], *prefix.shape))
            tokens = jnp.concatenate([prefix, tokens], axis=1)
        if self.normed_embedding == "tokens":
            tokens = self.embedding_norm(tokens)
        return tokens

    def encode(
        self,
        tokens: Float[Array, "B N D"],
        *,
        start: int = 0,
        stop: int | None = None,
        patches: Int[Array, "B kept"] | None = None,
        bias: Sequence[Array | None] | Array | None = None,
        train: bool = False,
        record: bool | Collection[int] = False,
    ) -> tuple[Float[Array, "B N D"], dict[str, Any]]:
        """Runs the blocks ``start`` to ``stop`` (exclusive; None: to the last).

        Args:
          tokens: the residual stream before block ``start``.
          start: first block.
          stop: one past the last block.
          patches: which patches of the grid the tokens after the prefix are, where
            others were gathered out (``interventions.gather_patches``); None for all
            of them in their order. Fields act between their true positions.
          bias: for interventions, what is added to the attention logits of each of
            the model's L layers: an array or None per layer, each broadcastable to
            [B, H, N, N].
          train: whether stochastic depth acts.
          record: True for all the layers that run, or their indices.

        Returns:
          The residual stream after the last block run, and a dict: ``records``, from
          the layer's index to ``attention [B H N N]``, ``values [B N H K]`` and
          ``scale [B N]``, what its layer norm divides each token by; and ``fields``,
          from the layer's index to its fields, for layers that have them.

        Raises:
          UsageError: a layer to record does not run, ``bias`` has not L entries, or
            ``patches`` does not name one patch for each token after the prefix.
        """
        stop = self.depth if stop is None else stop
        layers = range(start, stop)
        if isinstance(record, bool):
            wanted = frozenset(layers if record else ())
        else:
            wanted = frozenset(record)
        if not wanted <= set(layers):
            raise UsageError(
                f"record asks for layers {sorted(wanted)}, but the layers that run "
                f"are {start} to {stop - 1}: name some of those, or pass True."
            )
        if bias is not None and len(bias) != self.depth:
            raise UsageError(
                f"bias has {len(bias)} entries, but the model has {self.depth} "
                "layers: pass one array or None for each layer."
            )
        present = tokens.shape[1] - self.num_prefix_tokens
        if patches is not None and patches.shape[1] != present:
            raise UsageError(
                f"patches names {patches.shape[1]} patches, but there are {present} "
                f"tokens after the {self.num_prefix_tokens} of the prefix: pass the "
                "patches that the tokens were gathered by."
            )
        records, fields = {}, {}
        for layer in layers:
            layer_bias = None if bias is None else bias[layer]
            tokens, field, recorded = self.blocks[layer](
                tokens, layer_bias, train, layer in wanted, patches
            )
            if recorded:
                records[layer] = recorded
            if field is not None:
                fields[layer] = field
        return tokens, {"records": records, "fields": fields}

    def readout(
        self, tokens: Float[Array, "B N D"]
    ) -> tuple[Float[Array, "B C"], dict[str, Array]]:
        """Pools the final residual stream and classifies it.

        Returns:
          The logits in float32 (without a head, the pooled representation), and a
          dict: ``tokens [B N D]`` after the final norm; ``scale [B N]``, what that
          divides each token by (1 without one); and ``pooled``, what the head reads:
          ``[B D]``, unless ``pool`` or ``representation_size`` widens it, and the
          distillation token after it where there is one.
        """
        normed = self.norm(tokens) if self.final_norm else tokens
        source = tokens if self.pool_before_norm else normed
        cls, patches = source[:, 0], source[:, self.num_prefix_tokens :]
        if self.pool == "cls":
            pooled = cls
        elif self.pool == "mean":
            pooled = patches.mean(axis=1)
        elif self.pool == "cls_mean":
            pooled = jnp.concatenate([cls, patches.mean(axis=1)], axis=-1)
        else:
            pooled = self.attention_pool(
                patches if self.pool_tokens == "patches" else source
            )
        if self.pool_before_norm:
            pooled = self.norm(pooled)
        if self.representation_size:
            pooled = self.representation(pooled)
            pooled = nn.tanh(pooled) if self.representation_tanh else pooled
        scale = jnp.ones(tokens.shape[:2])
        if self.final_norm:
            scale = Norm(self.norm_kind, self.norm_epsilon).divisor(tokens)
        read = [pooled, normed[:, 1]] if self.distillation_token else [pooled]
        out = {"tokens": normed, "scale": scale, "pooled": jnp.concatenate(read, -1)}
        if not self.num_classes:
            return out["pooled"].astype(jnp.float32), out
        logits = self.head(pooled.astype(jnp.float32))
        if self.distillation_token:
            distilled = self.head_distillation(normed[:, 1].astype(jnp.float32))
            logits = (logits + distilled) / 2
        return logits, out

    def __call__(
        self,
        images: Float[Array, "B height width 3"],
        *,
        bias: Sequence[Array | None] | Array | None = None,
        train: bool = False,
        record: bool | Collection[int] = False,
    ) -> tuple[Float[Array, "B C"], dict[str, Any]]:
        """Classifies images.

        Args:
          images: normalised images.
          bias: what is added to the attention logits of each of the L layers: an
            array or None per layer, each broadcastable to [B, H, N, N].
          train: whether stochastic depth acts.
          record: True to record all layers, or their indices.

        Returns:
          The logits, and the dicts of ``encode`` and ``readout`` in one.
        """
        tokens, recorded = self.encode(
            self.embed(images), bias=bias, train=train, record=record
        )
        logits, out = self.readout(tokens)
        return logits, {**out, **recorded}
