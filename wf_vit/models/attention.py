"""Self-attention with three uses: plain, recorded, and with an additive bias.

One layer serves every model of the package. What runs is decided in two functions:

  * `attend` is written out and returns the weights, for recordings, and for learned
    fields where products of float32 are not exact: on accelerators, and in bfloat16.
  * `fused` returns no weights, so that it may choose: on a CPU `blocked.attend` for
    long sequences, else the arithmetic written out; ``jax.nn.dot_product_attention``
    on accelerators.

Elsewhere learned fields are folded into queries, keys and values
(`learned_fields.LearnedFields.fold`), so that they cost what plain attention costs.
Hard fields of a large grid visit only what they reach (`blocked.attend_within`).

Queries are scaled, not the logits, and outputs are divided by the softmax's sums, not
the weights: there are fewer of them.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from wf_vit import grid as geometry
from wf_vit.grid import Grid
from wf_vit.models import blocked
from wf_vit.models.positions import Rotary, rotate

Dtype = jnp.dtype | type

# Under these names the parameters of a layer's fields are kept: of what predicts them,
# and of what writes to the residual stream where each head listens.
FIELD, REPORT = "field", "field_report"
FIELD_NAMES = (FIELD, REPORT)

# Added to the logits of a key that must not be attended to: exp() of it is exactly 0.
DROPPED = -1e9

# Where attention is computed in blocks on a CPU: from so many tokens on, if a layer has
# more logits than 128 MiB. A step takes less CPU time from 1,024 tokens on anyway, but
# blocks keep one core busy, and whole logits all of them.
BLOCKED_FROM = 1024
WHOLE_LOGITS = 2**25

# What a layer records: its name, and the array.
Record = dict[str, Array]


class Bias(Protocol):
    """What a layer's field module returns: a bias of the logits between patches.

    Attributes:
      num_patches: how many patches it is of.
      is_learned_field: whether the model returns it among its ``out["fields"]``.
    """

    num_patches: int
    is_learned_field: bool

    def attention_bias(self, *, num_prefix_tokens: int) -> Float[Array, "#B #H N N"]:
        """Returns what is added to the logits, 0 to and from prefix tokens."""


def attend(
    query: Float[Array, "B H N K"],
    key: Float[Array, "B H N K"],
    value: Float[Array, "B H N K"],
    bias: Float[Array, "#B #H N N"] | None = None,
) -> tuple[Float[Array, "B H N K"], Float[Array, "B H N N"]]:
    """Scaled dot-product attention, with its weights.

    Args:
      query: queries, scaled.
      key: keys.
      value: values.
      bias: is added to the logits, or None.

    Returns:
      The heads' outputs in the dtype of ``value``, and the attention weights in
      float32, whose rows sum to 1 whatever the inputs' dtype.
    """
    weights = jax.nn.softmax(_logits(query, key, bias), axis=-1)
    return jnp.einsum("bhnm,bhmk->bhnk", weights.astype(value.dtype), value), weights


def fused(
    query: Float[Array, "B H N Q"],
    key: Float[Array, "B H N Q"],
    value: Float[Array, "B H N V"],
    bias: Float[Array, "#B #H N N"] | None = None,
) -> Float[Array, "B H N V"]:
    """Returns the output of `attend`, as fast as the backend can."""
    if jax.default_backend() != "cpu":
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        output = jax.nn.dot_product_attention(query, key, value, bias=bias, scale=1.0)
        return jnp.swapaxes(output, 1, 2)
    if bias is None and query.shape[2] >= BLOCKED_FROM:
        images, heads, tokens, _ = query.shape
        if images * heads * tokens**2 > WHOLE_LOGITS:
            return blocked.attend(query, key, value).astype(value.dtype)
    logits = _logits(query, key, bias)
    highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - highest)
    output = jnp.einsum(
        "bhnm,bhmk->bhnk",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return (output / weights.sum(-1, keepdims=True)).astype(value.dtype)


def _logits(
    query: Float[Array, "B H N Q"],
    key: Float[Array, "B H N Q"],
    bias: Float[Array, "#B #H N N"] | None,
) -> Float[Array, "B H N N"]:
    logits = jnp.einsum(
        "bhnk,bhmk->bhnm", query, key, preferred_element_type=jnp.float32
    )
    return logits if bias is None else logits + bias


class RelativePositions(nn.Module):
    """A learned bias for every head and displacement (BEiT, arXiv 2106.08254).

    What goes from and to prefix tokens has one number each for every head.

    Attributes:
      num_heads: H.
      grid: ``(GH, GW)``.
    """

    num_heads: int
    grid: Grid

    @nn.compact
    def __call__(
        self, num_prefix_tokens: int, patches: Int[Array, "B kept"] | None
    ) -> Float[Array, "#B H N N"]:
        """Returns the bias of the logits, of all patches or of those that there are."""
        rows, columns = self.grid
        zeros = nn.initializers.zeros
        shape = (2 * rows - 1, 2 * columns - 1, self.num_heads)
        table = self.param("table", zeros, shape)
        prefix = self.param("prefix", zeros, (3, self.num_heads))
        # From the key to the query, as in BEiT.
        dx, dy = -np.moveaxis(geometry.displacements(self.grid), -1, 0).astype(int)
        bias = jnp.moveaxis(table[dy + rows - 1, dx + columns - 1], -1, 0)
        if patches is None:
            bias = bias[None]
        else:
            pick = jax.vmap(lambda kept: bias[:, kept[:, None], kept[None]])
            bias = pick(patches)
        before = [(0, 0), (0, 0), (num_prefix_tokens, 0), (num_prefix_tokens, 0)]
        is_prefix = np.arange(bias.shape[-1] + num_prefix_tokens) < num_prefix_tokens
        # 0 for a prefix token's row, 1 for a column, 2 for both.
        which = np.where(is_prefix[:, None], 2 * is_prefix[None], 1)
        touched = is_prefix[:, None] | is_prefix[None]
        own = jnp.moveaxis(prefix[which], -1, 0)[None]
        return jnp.where(touched[None, None], own, jnp.pad(bias, before))


class SelfAttention(nn.Module):
    """Multi-head self-attention, optionally restricted by learned fields.

    Attributes:
      num_heads: H; it divides the width.
      field: makes the module that predicts each patch's field (``models.windowfree``)
        or a bias in its place (``models.controls``). It returns a ``Bias``, which is
        added to the logits. None for plain attention.
      qkv_bias: whether queries, keys and values have a bias.
      rotary: how queries and keys are rotated by their positions, or None for not.
      relative_positions: whether a learned bias of displacements is added to the
        logits.
      grid: ``(GH, GW)``; only rotary and relative positions need it.
      dtype: of the computation; the softmax is in float32 regardless.
    """

    num_heads: int
    field: Callable[..., nn.Module] | None = None
    qkv_bias: bool = True
    rotary: Rotary | None = None
    relative_positions: bool = False
    grid: Grid | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        bias: Float[Array, "#B #H N N"] | None = None,
        record: bool = False,
        patches: Int[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B N D"], Any, Record]:
        """Lets the tokens attend to one another.

        Args:
          x: normalised tokens, prefix tokens first.
          bias: is added to the logits, for interventions.
          record: whether to return what the indicators need.
          patches: which patches of the grid the tokens after the prefix are; None for
            all of them. Fields and positions need to know.

        Returns:
          The layer's output; the fields, if the layer has them; and the record,
          which is empty unless asked for: ``attention [B H N N]`` and
          ``values [B N H K]``, both float32.
        """
        width = x.shape[-1]

        def project(name: str) -> Float[Array, "B N H K"]:
            return nn.DenseGeneral(
                (self.num_heads, width // self.num_heads),
                use_bias=self.qkv_bias,
                kernel_init=nn.initializers.xavier_uniform(),
                dtype=self.dtype,
                name=name,
            )(x)

        query, key, value = project("query"), project("key"), project("value")
        if self.rotary is not None:
            query, key = (
                rotate(x, self.rotary, self.grid, patches) for x in (query, key)
            )
        if self.relative_positions:
            count = self.grid[0] * self.grid[1] if patches is None else patches.shape[1]
            own = RelativePositions(
                self.num_heads, self.grid, name="relative_positions"
            )(x.shape[1] - count, patches)
            bias = own if bias is None else bias + own
        query = query * query.shape[-1] ** -0.5
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        fields, weights, report = None, None, None
        if self.field is not None:
            own = self.field(num_heads=self.num_heads, name=FIELD)(x, patches)
            if own.is_learned_field:
                fields = own
            else:
                prefix = x.shape[1] - own.num_patches
                field_bias = own.attention_bias(num_prefix_tokens=prefix)
                bias = field_bias if bias is None else bias + field_bias
        if fields is not None:
            output, weights, moments = fields.attend(query, key, value, bias, record)
            report = jnp.swapaxes(fields.report(moments), 1, 2).astype(self.dtype)
        elif record:
            output, weights = attend(query, key, value, bias)
        else:
            output = fused(query, key, value, bias)
        recorded = {}
        if record:
            values = jnp.swapaxes(value, 1, 2).astype(jnp.float32)
            recorded = {"attention": weights, "values": values}

        def write(x: Float[Array, "B N H K"], name: str, use_bias: bool) -> Array:
            return nn.DenseGeneral(
                width,
                axis=(-2, -1),
                use_bias=use_bias,
                kernel_init=nn.initializers.xavier_uniform(),
                dtype=self.dtype,
                name=name,
            )(x)

        output = write(jnp.swapaxes(output, 1, 2), "out", True)
        if report is not None:
            output += write(report, REPORT, False)
        return output, fields, recorded
