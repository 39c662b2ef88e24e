"""What is verified, and what a protocol is.

A `Subject` is a model, a `Case` is the subject on one batch of images. A `Protocol`
changes something about a case (which interactions are kept, which patches are there),
asks the model again and compares the two answers.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int
from jaxtyping import Key as KeyArray
from matplotlib.figure import Figure

from wf_vit import measure
from wf_vit.models.recording import Recording
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Key, Labels, Logits, Params, Tokens
from wf_vit.verify.bootstrap import Interval

# Numbers per image, by what they measure.
Outcomes = dict[str, Float[np.ndarray, " B *conditions"]]
# What is made of the outcomes, in terms of JSON.
Summary = dict[str, Any]
Estimate = Callable[[Float[np.ndarray, "..."]], Interval]


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


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is verified.

    Attributes:
      model: the model.
      params: its parameters.
      labelled: whether the labels of the data are the classes of the model.
      target: the output that the propagated impact looks at (`measure.propagate`).
      num_probes: of the propagated impact.
    """

    model: ViT
    params: Params
    labelled: bool
    target: str = "tokens"
    num_probes: int = 8


class Case:
    """One batch of images. What several protocols need of it is computed once.

    Attributes:
      subject: the model.
      images: normalised, ``[B, height, width, 3]``.
      labels: their classes, or None if the model does not know them.
      key: randomness of the batch. A protocol that needs its own folds a number in
        that no other one uses; 0 and 1 are taken here.
    """

    def __init__(
        self, subject: Subject, images: Images, labels: Labels | None, key: Key
    ):
        """Computes nothing yet."""
        self.subject, self.images, self.key = subject, images, key
        self.labels = labels if subject.labelled else None

    @cached_property
    def _propagated(self) -> measure.Impact:
        return measure.impact(
            self.subject.model,
            self.subject.params,
            self.images,
            "propagated",
            per_head=True,
            target=self.subject.target,
            num_probes=self.subject.num_probes,
            key=self.probe_key,
        )

    @property
    def impact(self) -> Float[Array, "L B H P P"]:
        """The propagated impact, per head."""
        return self._propagated.heads

    @property
    def fused_impact(self) -> Float[Array, "L B P P"]:
        """The propagated impact of the heads together."""
        return self._propagated.impact

    @property
    def recording(self) -> Recording:
        """The forward pass of the model left alone."""
        return self._propagated.recording

    @property
    def attention(self) -> Float[Array, "L B H N N"]:
        """The attention of all layers and tokens."""
        return self.recording.attention

    @property
    def probe_key(self) -> Key:
        """Randomness of the probes, of the impact and of what is chosen together."""
        return jax.random.fold_in(self.key, 0)

    @property
    def whole(self) -> Answer:
        """The answer of the model left alone."""
        recording = self.recording
        patches = recording.tokens[:, self.subject.model.num_prefix_tokens :]
        return Answer(recording.logits, recording.pooled, patches)

    @property
    def image_keys(self) -> KeyArray[Array, " B"]:
        """Randomness of each image, for controls that choose at random."""
        return jax.random.split(jax.random.fold_in(self.key, 1), len(self.images))


@typing.runtime_checkable
class Protocol(typing.Protocol):
    """Evidence for an indicator, beside controls of equal size.

    To add one: write a class like this in a file of its own, and name it in
    ``wf_vit.verify.PROTOCOLS``.

    Attributes:
      needs_head: whether it makes no sense for a model without classes.
    """

    needs_head: bool

    def __init__(self, subject: Subject, config: ml_collections.ConfigDict):
        """Reads its settings.

        Args:
          subject: the model.
          config: that of ``configs/verify.py``, where its keys are documented.

        Raises:
          UsageError: the settings do not fit the model.
        """

    def measure(self, case: Case, count: int) -> Outcomes:
        """Returns the outcomes of at least the first ``count`` images of a batch."""

    def summarize(self, outcomes: Outcomes, estimate: Estimate) -> Summary:
        """Returns what ``verify.json`` says of the outcomes of all images.

        Args:
          outcomes: by the names that ``measure`` gave them.
          estimate: the mean over images and its interval, see `bootstrap.intervals`.
        """

    def tables(self, summary: Summary, images: int) -> Iterator[str]:
        """Yields paragraphs and tables in Markdown of the summary of some images."""

    def figures(self, summary: Summary) -> Iterator[tuple[str, Figure]]:
        """Yields the file name, without its suffix, and the figure of each drawing."""


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


def stacked(
    outcomes: Sequence[dict[str, Float[Array, " B"]]], conditions: tuple[int, ...]
) -> Outcomes:
    """Returns the outcomes of conditions, last axis fastest, as arrays over them."""
    return {
        name: np.stack([o[name] for o in outcomes], -1).reshape(-1, *conditions)
        for name in outcomes[0]
    }


# The model, as several protocols run it: jitted for the model, parameters first.


def answer_of(model: ViT, logits: Logits, out: dict[str, Any]) -> Answer:
    """Returns the answer in what ``ViT.__call__`` or ``ViT.readout`` return."""
    patches = out["tokens"][:, model.num_prefix_tokens :]
    pooled, patches = (x.astype(jnp.float32) for x in (out["pooled"], patches))
    return Answer(logits, pooled, patches)


@partial(jax.jit, static_argnames="model")
def classify(params: Params, images: Images, *, model: ViT) -> Logits:
    """Returns the logits of images."""
    return model.apply({"params": params}, images)[0]


@partial(jax.jit, static_argnames=("layers", "model"))
def streams(
    params: Params, images: Images, *, layers: tuple[int, ...], model: ViT
) -> dict[int, Tokens]:
    """Returns the residual stream before each of some layers."""
    variables = {"params": params}
    tokens = model.apply(variables, images, method="embed")
    before, start = {}, 0
    for layer in sorted(layers):
        tokens, _ = model.apply(
            variables, tokens, start=start, stop=layer, method="encode"
        )
        before[layer], start = tokens, layer
    return before
