"""What a model computes for some images, and how near that is to something else."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wf_vit.shapes import Labels

# Numbers per image, by what they measure.
Outcomes = dict[str, Float[np.ndarray, " B *conditions"]]
# The same of several protocols, each with its own number of images.
Collected = dict[str, Float[np.ndarray, "..."]]

# What `agreement` measures, the most telling first.
MEASURES = ("top1", "cosine", "patch_cosine")


class Answer(NamedTuple):
    """What a model computes for a batch.

    Attributes:
      logits: of the head; of the model's own representation if it has none.
      pooled: what the head reads: CLS, or the mean of the patches.
      patches: the final tokens of the patches that are there.
    """

    logits: Float[Array, "B C"]
    pooled: Float[Array, "B D"]
    patches: Float[Array, "B P Q"]


def agreement(
    answer: Answer,
    whole: Answer,
    labels: Labels | None,
    patches: Int[Array, "B kept"] | None = None,
) -> dict[str, Float[Array, " B"]]:
    """Compares a model that was interfered with with the same one left alone.

    Args:
      answer: with the intervention.
      whole: without it.
      labels: the true classes, or None if the head knows others or there is none.
      patches: which patches the answer still has; None for all.

    Returns:
      For each image ``cosine``, of the pooled representations; ``patch_cosine``, the
      mean over the patches that are left; and with labels ``top1``, 1 where the
      answer is right.
    """
    expected = whole.patches
    if patches is not None:
        expected = jnp.take_along_axis(expected, patches[..., None], axis=1)
    outcome = {
        "cosine": _cosine(answer.pooled, whole.pooled),
        "patch_cosine": _cosine(answer.patches, expected).mean(-1),
    }
    if labels is not None:
        right = answer.logits.argmax(-1) == labels
        outcome["top1"] = right.astype(jnp.float32)
    return outcome


def _cosine(a, b):
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / norms
