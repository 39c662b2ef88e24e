"""A model that is verified: the protocols, wired to it, on one batch."""

import dataclasses
from functools import cached_property, partial

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from wf_vit import indicators, measure
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Key, Labels, Params
from wf_vit.verify import network
from wf_vit.verify.answers import Collected, Outcomes
from wf_vit.verify.faithfulness import TARGETS, faithfulness
from wf_vit.verify.pixels import blurred, mean_filled, pixels
from wf_vit.verify.removal import patch_scores, removal
from wf_vit.verify.windows import windows

# What faithfulness compares with the propagated impact.
_METHODS = ("mean", "std", "distance", "random")
INDICATORS = ("propagated", "knockout", *_METHODS)
# What pixels fills patches with.
FILLS = ("mean", "blur")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is verified, and how.

    Attributes:
      model: the model.
      params: its parameters.
      layers: before which patches are removed.
      labelled: whether the data's labels are the model's classes.
      config: see ``configs/verify.py``.
    """

    model: ViT
    params: Params
    layers: tuple[int, ...]
    labelled: bool
    config: ml_collections.ConfigDict

    @property
    def targets(self) -> tuple[str, ...]:
        """The effects of a cut that mean something in this model."""
        return tuple(t for t in TARGETS if t != "cls" or self.model.cls_token)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The classes that pixels asks for."""
        return ("predicted", "true") if self.labelled else ("predicted",)

    @property
    def maps(self) -> tuple[str, ...]:
        """The maps that pixels compares."""
        return network.map_names(self.kinds)

    def outcomes(
        self, images: Images, labels: Labels, counts: dict[str, int], key: Key
    ) -> Collected:
        """Returns the outcomes of each protocol on the first images of a batch.

        Args:
          images: normalised.
          labels: their classes.
          counts: how many images each protocol takes; the others fill up the batch.
          key: randomness of the batch.

        Returns:
          ``PROTOCOL/MEASURE``: what the protocol returns for each image, and with
          labels ``whole/top1``, of the model left alone.
        """
        labels = labels if self.labelled else None
        case = _Case(self, images, labels, key)
        outcomes = {}
        if labels is not None:
            right = np.asarray(case.whole.logits.argmax(-1) == labels, np.float32)
            outcomes["whole/top1"] = right[: max(counts.values())]
        for protocol, count in counts.items():
            measures = getattr(case, protocol)(count) if count else {}
            for name, outcome in measures.items():
                outcomes[f"{protocol}/{name}"] = outcome[:count]
        return outcomes


class _Case:
    """One batch: what several protocols need of it is computed once.

    It has a method for each protocol, which may return the outcomes of more images
    than it is asked for.
    """

    def __init__(self, subject, images, labels, key):
        self.subject, self.images, self.labels = subject, images, labels
        self.model, self.params = subject.model, subject.params
        self.probes, noise, self.maps, self.cuts = jax.random.split(key, 4)
        self.noise = jax.random.split(noise, len(images))
        self.whole, self.attention = network.whole(
            self.params, images, model=self.model
        )

    @cached_property
    def impact(self) -> Float[Array, "L B H P P"]:
        config = self.subject.config
        (knockout,) = measure.propagate(
            self.model,
            self.params,
            self.images,
            target=config.target,
            key=self.probes,
            num_probes=config.num_probes,
            per_head=True,
            batch_size=len(self.images),
        )
        return knockout.impact

    def windows(self, count: int) -> Outcomes:
        del count  # The whole batch: one shape, traced once.
        prefix = self.model.num_prefix_tokens
        return windows(
            partial(network.masked, self.params, self.images, model=self.model),
            self.whole,
            self.attention[..., prefix:, prefix:],
            self.impact,
            shares=self.subject.config.kept,
            grid=self.model.grid,
            keys=self.noise,
            labels=self.labels,
        )

    def removal(self, count: int) -> Outcomes:
        del count  # The whole batch: one shape, traced once.
        layers = self.subject.layers
        streams = network.inputs(
            self.params, self.images, layers=layers, model=self.model
        )

        def predict(layer, patches):
            return network.gathered(
                self.params, streams[layer], patches, layer=layer, model=self.model
            )

        return removal(
            predict,
            self.whole,
            patch_scores(self.attention, self.impact, self.noise),
            layers=layers,
            shares=self.subject.config.removed,
            labels=self.labels,
        )

    def pixels(self, count: int) -> Outcomes:
        del count  # The whole batch: one shape, traced once.
        classes = {"predicted": self.whole.logits.argmax(-1)}
        if self.labels is not None:
            classes["true"] = self.labels
        maps = network.importance_maps(
            self.params,
            self.images,
            self.attention,
            classes=classes,
            num_probes=self.subject.config.num_probes,
            key=self.maps,
            model=self.model,
        )
        fills = (
            mean_filled(self.images),
            blurred(self.images, self.model.patch_size),
        )
        return pixels(
            partial(network.classify, self.params, model=self.model),
            self.images,
            {name: maps[name] for name in self.subject.maps},
            dict(zip(FILLS, fills, strict=True)),
            grid=self.model.grid,
            labels=self.labels,
        )

    def faithfulness(self, count: int) -> Outcomes:
        images = [self._correlation(place) for place in range(count)]
        return {"correlation": np.stack(images)}

    def _correlation(self, place: int) -> Float[np.ndarray, "targets indicators L"]:
        """Returns the rank correlations of one image."""
        image = self.images[place : place + 1]
        cuts, probes, noise = jax.random.split(jax.random.fold_in(self.cuts, place), 3)
        layers = tuple(range(self.model.depth))
        tokens = {"num_prefix_tokens": self.model.num_prefix_tokens}
        config = self.subject.config
        (recorded,) = measure.record(self.model, self.params, image)
        (propagated,) = measure.propagate(
            self.model,
            self.params,
            image,
            target="tokens",
            key=probes,
            num_probes=config.num_probes,
        )
        knockout = indicators.knockout_impact(
            recorded.attention,
            recorded.values,
            *parameters.output_projection(self.model, self.params),
            **tokens,
        )
        impacts = {"propagated": propagated.impact, "knockout": knockout}
        for method in _METHODS:
            impacts[method] = indicators.interaction_indicator(
                recorded.attention,
                method=method,
                grid=self.model.grid,
                key=noise,
                **tokens,
            )
        found = faithfulness(
            network.cut(self.params, image, layers=layers, model=self.model),
            {name: impact[:, 0] for name, impact in impacts.items()},
            layers,
            key=cuts,
            num_interactions=config.num_cuts,
            **tokens,
        ).correlation
        return np.array(
            [
                [found[target][name] for name in INDICATORS]
                for target in self.subject.targets
            ]
        )
