"""Can patches that an indicator calls indiscriminative really be done without?

From some layer on their tokens are gathered out, so that the sequence is shorter. What
is left of the model's answer is compared with what other choices of as many patches
leave (design.md, "Verification" c).
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from jaxtyping import Key as KeyArray

from wf_vit.fields import discriminability
from wf_vit.interventions import keep_patches
from wf_vit.shapes import Labels
from wf_vit.verify.answers import Answer, Outcomes, agreement

# What is put to the test first, then the controls. Each removes what it scores lowest.
OWN = ("least discriminative", "least impact")
RULES = (*OWN, "least attended", "random", "most discriminative")
CONTROLS = RULES[2:]


def patch_scores(
    attention: Float[Array, "L B H N N"],
    impact: Float[Array, "L B H P P"],
    keys: KeyArray[Array, " B"],
) -> dict[str, Float[Array, "L B P"]]:
    """Returns by what each rule ranks the patches before each layer.

    Each score is summed over that layer and those after it:

    - ``least discriminative``: the standard deviation over the queries of the
      propagated impact a patch has on them;
    - ``least impact``: the propagated impact a patch has on others;
    - ``least attended``: the attention it receives, mean over heads, from the CLS
      token if there is one, else from all patches in the mean;
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
        "random": jnp.moveaxis(jax.vmap(noise)(keys), 0, 1),
        "most discriminative": -telling,
    }


def num_kept(share: float, num_patches: int) -> int:
    """Returns how many patches are left when a share of them is removed, at least 1."""
    return max(1, num_patches - round(share * num_patches))


def removal(
    predict: Callable[[int, Int[Array, "B kept"]], Answer],
    whole: Answer,
    scores: Mapping[str, Float[Array, "L B P"]],
    *,
    layers: Sequence[int],
    shares: Sequence[float],
    labels: Labels | None,
) -> Outcomes:
    """Removes what each rule scores lowest, and asks the model again.

    Args:
      predict: the model's answer when from a layer on only some patches are there.
      whole: its answer when all are.
      scores: of the patches before each of the model's layers, by rule.
      layers: before which patches are removed.
      shares: of the patches that are removed.
      labels: see ``agreement``.

    Returns:
      The measures of ``agreement`` for each image, layer, rule and share:
      ``[B, len(layers), len(scores), len(shares)]``.
    """

    def outcome(layer, score, share):
        patches = keep_patches(score[layer], num_kept(share, score.shape[-1]))
        return agreement(predict(layer, patches), whole, labels, patches)

    outcomes = [
        outcome(layer, score, share)
        for layer in layers
        for score in scores.values()
        for share in shares
    ]
    conditions = (len(layers), len(scores), len(shares))
    return {
        name: np.stack([o[name] for o in outcomes], -1).reshape(-1, *conditions)
        for name in outcomes[0]
    }
