"""Is what an indicator keeps of attention what the model needs of it?

In all layers at once, attention between patches is restricted to a share of the
interactions: to the fields that an indicator gives each patch, or to controls that
keep exactly as many of each image's interactions (design.md, "Verification" b).
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from wf_vit import interventions
from wf_vit.grid import Grid, distances
from wf_vit.interventions import Keep
from wf_vit.shapes import Labels
from wf_vit.verify.answers import Answer, Outcomes, agreement

# What is put to the test first, then the controls.
OWN = "fields per head"
RULES = (
    OWN,
    "fields fused",
    "attention per head, top k",
    "mean attention, top k",
    "square window",
    "Swin-like partition",
    "nearest",
    "random",
    "least important",
)
CONTROLS = RULES[2:]


def masks(
    attention: Float[Array, "L B H P P"],
    impact: Float[Array, "L B H P P"],
    keys: KeyArray[Array, " B"],
    *,
    share: float,
    grid: Grid,
) -> dict[str, Keep]:
    """Returns the interactions that each rule keeps, as many for all of them.

    The fields are the strongest interactions by the geometric mean of attention and
    propagated impact, by one threshold, of each head or of the heads' mean. Those of
    fixed shapes, and of top k, are of the same size for every query.

    Args:
      attention: between patches, of all layers.
      impact: propagated, per head, of all layers.
      keys: randomness of each image.
      share: of the interactions between patches that is kept.
      grid: ``(GH, GW)``.

    Returns:
      For each of ``RULES`` what is kept, with an H of 1 (no axis) where heads do not
      differ and a B of 1 where images do not. Each patch keeps itself.

    Raises:
      UsageError: the share leaves a patch not even itself.
    """
    depth, _, heads, patches, _ = attention.shape
    # A whole number for each head, so that masks for all heads keep as many.
    share = round(share * depth * patches**2) / (depth * patches**2)
    score = jnp.sqrt(attention * impact)

    def one_for_all(scores):
        scores = jnp.asarray(scores, jnp.float32)
        return jnp.broadcast_to(scores, (depth, 1, patches, patches))

    def noise(key):
        return jax.random.uniform(key, (depth, heads, patches, patches))

    area = max(1, int(share * patches))
    square = interventions.square_window(grid, area)
    swin = interventions.partition(grid, depth, area)[:, None]
    keep = partial(interventions.keep_strongest, share=share)
    evenly = partial(keep, floor=1.0)
    return {
        OWN: keep(score),
        "fields fused": keep(score.mean(2)),
        "attention per head, top k": evenly(attention),
        "mean attention, top k": evenly(attention.mean(2)),
        "square window": evenly(one_for_all(square)),
        "Swin-like partition": evenly(one_for_all(swin)),
        "nearest": evenly(one_for_all(-distances(grid))),
        "random": keep(jnp.moveaxis(jax.vmap(noise)(keys), 0, 1)),
        "least important": keep(-score),
    }


def windows(
    predict: Callable[[Keep], Answer],
    whole: Answer,
    attention: Float[Array, "L B H P P"],
    impact: Float[Array, "L B H P P"],
    *,
    shares: Sequence[float],
    grid: Grid,
    keys: KeyArray[Array, " B"],
    labels: Labels | None,
) -> Outcomes:
    """Restricts attention to what each rule keeps, and asks the model again.

    Args:
      predict: the model's answer when it keeps some interactions between patches.
      whole: its answer when it keeps all.
      attention: see ``masks``.
      impact: see ``masks``.
      shares: of the interactions that are kept.
      grid: see ``masks``.
      keys: see ``masks``.
      labels: see ``agreement``.

    Returns:
      The measures of ``agreement`` for each image, rule and share:
      ``[B, len(RULES), len(shares)]``.
    """
    by_share = []
    for share in shares:
        kept = masks(attention, impact, keys, share=share, grid=grid)
        by_share.append(
            [agreement(predict(kept[rule]), whole, labels) for rule in RULES]
        )
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves, -1),
        *[jax.tree.map(lambda *x: jnp.stack(x, -1), *rules) for rules in by_share],
    )
    return {name: np.asarray(outcome) for name, outcome in stacked.items()}
