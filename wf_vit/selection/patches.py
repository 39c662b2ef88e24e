"""The choice of patches that later layers can do without."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wf_vit.errors import UsageError
from wf_vit.indicators.arithmetic import einsum
from wf_vit.interventions import gather_patches
from wf_vit.models.parameters import output_projection
from wf_vit.models.recording import no_perturbations
from wf_vit.models.vit import ViT
from wf_vit.selection.yardstick import Yardstick, run_to, yardstick
from wf_vit.shapes import Images, Keys, Logits, Params, Tokens

# In how many steps all patches are removed; before each the model is run again.
_STEPS = 32
# How much more than on its own a removal counts, for each patch of its step: they may
# move the output the same way.
_CAUTION = 4.0
# The least weight that the other keys of a query may have, against division by 0.
_LEAST = 1e-6


def select_patches(
    model: ViT,
    params: Params,
    images: Images,
    layer: int,
    *,
    key: Keys,
    removed: float = 1.0,
    target: str = "tokens",
    num_probes: int = 8,
) -> Float[Array, "B P"]:
    """Ranks patches by how well the layers from one on can do without them.

    A 32nd of the patches is removed at a time: those whose removal takes the output of
    the model, as it is by then, least far from that of the full model. The cost of a
    removal is of second order, summed over the queries, heads and layers that lose the
    patch. With e the difference of the outputs now, and J delta what the removal adds
    to it, the first term is ``e . J delta``, with its sign, from one backward pass. The
    second is ``|J delta|^2`` in the metric of `select_interactions`. It leaves out what
    two patches do together, and counts more for that.

    Each step takes a forward and a backward pass, and there are ``num_probes`` backward
    passes before the first one.

    Args:
      model: a ViT or a window-free transformer.
      params: its parameters.
      images: normalised images.
      layer: the first layer without the patches.
      key: randomness of the probes, as in `measure.propagate`.
      removed: the share of the patches that is ranked; the others all come last.
      target: the output that is to stay, one of ``measure.OUTPUTS``: all final tokens
        that are there, CLS, or what the head reads. A head that pools by attention, or
        before the final norm, stands for "tokens".
      num_probes: of the metric, at least 1.

    Returns:
      How late each patch was removed, from 1, for `interventions.keep_patches`.

    Raises:
      UsageError: an unknown layer or target, a share out of range, or images that do
        not fit the model.
    """
    (layer,) = model.check_layers([layer])
    if not 0 <= removed <= 1:
        raise UsageError(f"removed is {removed}, expected a share of patches, 0 to 1.")
    if target == "pooled" and not _is_mean(model) and model.pool != "cls":
        target = "tokens"
    scale, recording = yardstick(model, params, images, target, key, num_probes)
    scale = jax.tree.map(lambda x: x[layer:], scale)
    prefix = model.num_prefix_tokens
    patches = model.num_tokens - prefix
    tokens = run_to(params, images, model=model, layer=layer)
    ranks = jnp.where(jnp.arange(model.num_tokens) < prefix, 0, patches + 1)
    ranks = jnp.broadcast_to(ranks, (len(images), model.num_tokens))
    wanted = _output(model, recording.tokens, ranks > 0, target)
    first = 1
    steps = np.array_split(np.arange(patches), min(_STEPS, patches))
    for step in steps:
        if first > round(removed * patches):  # As `interventions.num_kept` counts.
            break
        ranks = _remove(
            params,
            tokens,
            ranks,
            wanted,
            scale,
            jnp.asarray(first),
            jnp.asarray(len(step)),
            model=model,
            layer=layer,
            most=len(steps[0]),
            target=target,
        )
        first += len(step)
    return ranks[:, prefix:].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def run_without(
    params: Params,
    tokens: Tokens,
    patches: Int[Array, "B kept"],
    *,
    model: ViT,
    layer: int,
) -> tuple[Logits, dict[str, Any]]:
    """Runs the layers from one on with some of the patches only, a shorter sequence.

    Args:
      params: the model's.
      tokens: the residual stream of all patches before the layer.
      patches: those that stay, as `interventions.keep_patches` returns them.
      model: a ViT or a window-free transformer.
      layer: the first one without the others.

    Returns:
      Logits and ``tokens`` and ``pooled``, as ``ViT.readout`` does.
    """
    variables = {"params": params}
    tokens = gather_patches(tokens, patches, num_prefix_tokens=model.num_prefix_tokens)
    tokens, _ = model.apply(
        variables, tokens, start=layer, patches=patches, method="encode"
    )
    return model.apply(variables, tokens, method="readout")


def first_of_quarters(depth: int) -> tuple[int, ...]:
    """Returns the first layer of each quarter of a model's layers, each once."""
    return tuple(sorted({quarter * depth // 4 for quarter in range(4)}))


def _is_mean(model: ViT) -> bool:
    """Whether the head reads the mean of the normalised patches."""
    return model.pool in ("mean", "cls_mean") and not model.pool_before_norm


def _output(
    model: ViT, tokens: Tokens, there: Bool[Array, "B N"], target: str
) -> Float[Array, "B ..."]:
    """Returns the output that is to stay, of the tokens that are there."""
    prefix = model.num_prefix_tokens
    if target == "tokens":
        return jnp.where(there[..., None], tokens, 0.0)
    if target == "cls" or model.pool == "cls":
        return tokens[:, 0]
    weights = there[:, prefix:] / there[:, prefix:].sum(-1, keepdims=True)
    mean = einsum("bp,bpd->bd", weights, tokens[:, prefix:])
    return mean if model.pool == "mean" else jnp.concatenate([tokens[:, 0], mean], -1)


@functools.partial(jax.jit, static_argnames=("model", "layer", "most", "target"))
def _remove(
    params: Params,
    tokens: Tokens,
    ranks: Int[Array, "B N"],
    wanted: Float[Array, "B ..."],
    scale: Yardstick,
    first: Int[Array, ""],
    count: Int[Array, ""],
    *,
    model: ViT,
    layer: int,
    most: int,
    target: str,
) -> Int[Array, "B N"]:
    """Removes some patches, by what the layers from one on do without earlier ones.

    Args:
      params: the model's.
      tokens: the residual stream before the layer.
      ranks: when each patch was removed; P + 1 of those that are there, 0 of prefix
        tokens.
      wanted: the output of the full model.
      scale: of the layers from that one on.
      first: the first rank that is given out.
      count: how many are removed.
      model: the model.
      layer: the first layer without the patches.
      most: what the count is at most.
      target: the output.

    Returns:
      The ranks, with those of the removed.
    """
    prefix = model.num_prefix_tokens
    patches = model.num_tokens - prefix
    is_patch = (jnp.arange(model.num_tokens) >= prefix)[None]
    there = (ranks == 0) | (ranks > patches)
    bias = jnp.where(there, 0.0, -jnp.inf)[:, None, None]
    bias = jnp.broadcast_to(bias, (len(there), 1, *2 * there.shape[1:]))

    def run(perturbations):
        """Returns half the squared distance of the output to the full model's."""
        variables = {"params": params, "perturbations": perturbations}
        stream, out = model.apply(
            variables,
            tokens,
            start=layer,
            bias=[bias] * model.depth,
            record=True,
            method="encode",
        )
        final = model.apply(variables, stream, method="readout")[1]["tokens"]
        final = final.astype(jnp.float32)
        output = _output(model, final, there, target)
        goal = wanted
        if target == "tokens":
            goal = jnp.where(there[..., None], wanted, 0.0)
        distance = output - goal
        return jnp.square(distance).sum() / 2, (out["records"], final, distance)

    gradient, (records, final, distance) = jax.grad(run, has_aux=True)(
        no_perturbations(model, len(tokens))
    )
    kernel = output_projection(model, params).scaled
    layers = range(layer, model.depth)

    def heads(of):
        """Returns an array of each image, layer and head."""
        stacked = jnp.stack([of(n) for n in layers], 1)
        return stacked.reshape(len(tokens), -1, *stacked.shape[3:])

    def seen(n):
        written = gradient[f"blocks_{n}"]["after_attention"].astype(jnp.float32)
        return einsum("hkd,bnd->bhnk", kernel[n], written)

    arrays = (
        heads(lambda n: records[n]["attention"]),
        heads(lambda n: records[n]["values"].swapaxes(1, 2)),
        heads(seen),
        heads(lambda n: scale.root[n - layer]),
        heads(lambda n: scale.gain[n - layer]),
    )

    def of_image(image):
        there, arrays = image
        own = jnp.eye(len(there), dtype=bool)

        def of_head(head):
            attention, values, seen, root, gain = head
            weights = attention * there[None]
            total = weights.sum(-1, keepdims=True)
            output = weights @ values
            # Without key j the output moves by ratio (output - v_j).
            ratio = attention / jnp.maximum(total - attention, _LEAST)
            slope = (seen * output).sum(-1, keepdims=True) - seen @ values.T
            values, output = values @ root, output @ root
            apart = jnp.square(values).sum(-1)[None] - 2 * output @ values.T
            apart = jnp.maximum(apart + jnp.square(output).sum(-1, keepdims=True), 0.0)
            curve = _CAUTION * count / 2 * gain[:, None] * ratio * apart
            # Its own query goes with the token.
            shift = jnp.where(own, 0.0, ratio * (slope + curve))
            return there.astype(jnp.float32) @ shift

        return lax.map(of_head, arrays).sum(0)

    error = lax.map(of_image, (there, arrays))
    if target == "pooled" and _is_mean(model):
        # The mean that the head reads has one token less.
        mean = distance[:, -model.width :]
        centre = _output(model, final, there, target)[:, -model.width :]
        left = (there & is_patch).sum(-1, keepdims=True)
        shift = (centre[:, None] - final) / jnp.maximum(left - 1, 1)[..., None]
        error += einsum("bd,bnd->bn", mean, shift)
        error += _CAUTION * count / 2 * jnp.square(shift).sum(-1)
    error = jnp.where(there & is_patch, error, jnp.inf)
    _, least = lax.top_k(-error, most)
    order = jnp.arange(most)[None]
    # Those beyond the count are out of range, and left out.
    least = jnp.where(order < count, least, model.num_tokens)
    rows = jnp.arange(len(ranks))[:, None]
    return ranks.at[rows, least].set(first + order, mode="drop")
