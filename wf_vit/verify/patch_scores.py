"""What patches are ranked by before they are removed, one at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from wf_vit.fields import discriminability
from wf_vit.indicators.arithmetic import einsum
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params, Tokens

EVIT, TOME = "CLS attention, as EViT", "most alike, as ToMe"


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


@jax.jit
def alike(keys: Float[Array, "B P K"]) -> Float[Array, "B P"]:
    """Ranks patches by how unlike their keys are, in the order in which ToMe merges.

    Every other patch is matched with the likest of the rest by the cosine of the keys
    (arXiv 2210.09461); the likest go first. Then the same with the rest, until one is
    left. Here a patch is removed, where ToMe averages it with its match.
    """
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    score = jnp.full(keys.shape[:2], float(keys.shape[1]))
    places, first = np.arange(keys.shape[1]), 0
    while len(places) > 1:
        gone, rest = places[::2], places[1::2]
        likeness = einsum("bik,bjk->bij", keys[:, gone], keys[:, rest]).max(-1)
        ranks = jnp.argsort(jnp.argsort(-likeness, axis=-1), axis=-1)
        score = score.at[:, gone].set(first + ranks.astype(jnp.float32))
        places, first = rest, first + len(gone)
    return score
