"""What others rank patches by before they are removed, or merge them by."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int
from jaxtyping import Key as KeyArray

from wf_vit.fields import discriminability
from wf_vit.indicators.arithmetic import einsum
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params, Tokens

EVIT = "CLS attention, as EViT"


def patch_scores(
    attention: Float[Array, "L B H N N"],
    impact: Float[Array, "L B H P P"],
    keys: KeyArray[Array, " B"],
) -> dict[str, Float[Array, "L B P"]]:
    """Returns by what each rule ranks the patches before each layer.

    Each score is summed over that layer and those after it, but for one:

    - ``least discriminative``: the standard deviation over the queries of the
      propagated impact a patch has on them;
    - ``least impact``: the propagated impact a patch has on others;
    - ``least attended``: the attention it receives, mean over heads, from the CLS
      token if there is one, else from all patches in the mean;
    - ``EVIT``: the same, of the layer before alone (arXiv 2202.07800), or of the first;
    - ``most discriminative``: the first one, reversed.

    Args:
      attention: of all layers and tokens.
      impact: propagated, per head, of all layers; heads are summed.
      keys: randomness of each image.
    """
    num_prefix_tokens = attention.shape[-1] - impact.shape[-1]
    impact = impact.sum(2)
    received = attention.mean(2)[..., num_prefix_tokens:]
    received = received[:, :, 0] if num_prefix_tokens else received.mean(2)
    on_others = jnp.where(jnp.eye(impact.shape[-1], dtype=bool), 0.0, impact).sum(-2)

    def to_come(score):
        return jnp.cumsum(score[::-1], 0)[::-1]

    def noise(key):
        return jax.random.uniform(key, (impact.shape[0], impact.shape[-1]))

    telling = to_come(discriminability(impact))
    return {
        "least discriminative": telling,
        "least impact": to_come(on_others),
        "least attended": to_come(received),
        EVIT: jnp.concatenate([received[:1], received[:-1]]),
        "random": jnp.moveaxis(jax.vmap(noise)(keys), 0, 1),
        "most discriminative": -telling,
    }


@partial(jax.jit, static_argnames=("layer", "model"))
def layer_keys(
    params: Params, tokens: Tokens, *, layer: int, model: ViT
) -> Float[Array, "B P K"]:
    """Returns the keys of a layer, mean over heads, of the patches."""
    _, captured = model.apply(
        {"params": params},
        tokens,
        start=layer,
        stop=layer + 1,
        method="encode",
        capture_intermediates=lambda module, _: module.name == "key",
        mutable=["intermediates"],
    )
    attention = captured["intermediates"][f"blocks_{layer}"]["attention"]
    (keys,) = attention["key"]["__call__"]
    return keys.mean(2)[:, model.num_prefix_tokens :].astype(jnp.float32)


class Merged(NamedTuple):
    """Patches of which some stand for several.

    Attributes:
      tokens: the means of those that each stands for.
      patches: which patches are left, in the order of the grid.
      sizes: for how many each stands.
      place: at which of those that are left each patch is now.
    """

    tokens: Float[Array, "B kept D"]
    patches: Int[Array, "B kept"]
    sizes: Float[Array, "B kept"]
    place: Int[Array, "B P"]


@partial(jax.jit, static_argnames="count")
def merge(
    tokens: Float[Array, "B P D"], keys: Float[Array, "B P K"], count: int
) -> Merged:
    """Merges patches with like keys until only some are left (ToMe, arXiv 2210.09461).

    Every other patch is matched with the likest of the rest by the cosine of the keys.
    The likest pairs become their mean, in which each patch counts once, at most half
    of the patches at a time. ToMe spreads this over the layers; here it is done at
    once, so that it has as many tokens in each layer as what it is compared with.

    Args:
      tokens: of the patches.
      keys: of the same, mean over heads.
      count: how many are left, at least 1.
    """

    def of_image(tokens, keys):
        sizes = jnp.ones(len(tokens))
        patches = place = jnp.arange(len(tokens))
        while len(tokens) > count:
            number = len(tokens)
            fewer = min(number // 2, number - count)
            unit = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
            likeness = einsum("ik,jk->ij", unit[::2], unit[1::2])
            _, gone = lax.top_k(likeness.max(-1), fewer)
            match = 2 * likeness.argmax(-1)[gone] + 1
            into = jnp.arange(number).at[2 * gone].set(match)
            total = jnp.zeros(number).at[into].add(sizes)

            def mean(x, into=into, sizes=sizes, total=total):
                summed = jnp.zeros_like(x).at[into].add(x * sizes[:, None])
                return summed / jnp.where(total > 0, total, 1.0)[:, None]

            stays = into == jnp.arange(number)
            place = (jnp.cumsum(stays) - 1)[into[place]]
            (left,) = jnp.nonzero(stays, size=number - fewer)
            tokens, keys = mean(tokens)[left], mean(keys)[left]
            sizes, patches = total[left], patches[left]
        return Merged(tokens, patches, sizes, place)

    return jax.vmap(of_image)(tokens, keys)
