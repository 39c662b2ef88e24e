"""The protocol ``faithfulness``: do ranks agree with what happens in real cuts?

Interactions are drawn at random, each is really cut, the rest of the network is run,
and the ranks of what happened are compared with those of what an indicator says.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from scipy import stats

from wf_vit import measure
from wf_vit.errors import UsageError
from wf_vit.figures import evidence
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Key, Params
from wf_vit.verify import report
from wf_vit.verify.subject import Case, Estimate, Outcomes, Subject, Summary, streams

# The final tokens of one image, S times, from the index of a layer and from what is
# added to the attention logits of that layer in each of the S runs.
Predict = Callable[[int, Float[Array, "S 1 N N"]], Float[Array, "S N D"]]

TARGETS = ("tokens", "own", "cls")
# What is compared with real cuts.
INDICATORS = ("propagated", "knockout", "mean", "std", "distance", "random")


class Faithfulness:
    """The ranks of interactions (`wf_vit.verify.subject.Protocol`)."""

    needs_head = False

    def __init__(self, subject: Subject, config: ml_collections.ConfigDict):
        """Reads ``config.num_cuts``, for each layer and image."""
        self._num_cuts = config.num_cuts
        self._targets = tuple(
            target for target in TARGETS if target != "cls" or subject.model.cls_token
        )

    def measure(self, case: Case, count: int) -> Outcomes:
        """Returns ``correlation`` by image, target, indicator and layer."""
        images = [self._correlation(case, place) for place in range(count)]
        return {"correlation": np.stack(images)}

    def _correlation(
        self, case: Case, place: int
    ) -> Float[np.ndarray, "targets indicators L"]:
        """Returns the rank correlations of one image."""
        model, params = case.subject.model, case.subject.params
        image = case.images[place : place + 1]
        key = jax.random.fold_in(jax.random.fold_in(case.key, 3), place)
        cuts, probes, noise = jax.random.split(key, 3)
        layers = tuple(range(model.depth))
        impacts, recording = {}, None
        for name in INDICATORS:
            # The first one is propagated; the others look at its recording.
            measured = measure.impact(
                model,
                params,
                image,
                name,
                num_probes=case.subject.num_probes,
                key=noise if recording else probes,
                recording=recording,
            )
            impacts[name], recording = measured.impact[:, 0], measured.recording
        found = faithfulness(
            cut(params, image, layers=layers, model=model),
            impacts,
            layers,
            key=cuts,
            num_interactions=self._num_cuts,
            num_prefix_tokens=model.num_prefix_tokens,
        ).correlation
        return np.array(
            [[found[target][name] for name in INDICATORS] for target in self._targets]
        )

    def summarize(self, outcomes: Outcomes, estimate: Estimate) -> Summary:
        """Returns the correlations by target and indicator, and those by layer."""
        correlation = outcomes["correlation"]
        names = self._targets, INDICATORS
        # In the last layer no cut between patches reaches the CLS token.
        counted = np.isfinite(correlation)
        total = np.where(counted, correlation, 0.0).sum(-1)
        mean = total / np.where(counted.any(-1), counted.sum(-1), np.nan)
        return {
            "mean": report.nested(estimate(mean), *names),
            "by_layer": report.nested(estimate(correlation), *names),
        }

    def tables(self, summary: Summary, images: int) -> Iterator[str]:
        """Yields one table of the indicators."""
        yield (
            f"**Faithfulness**, {images:,} images: rank correlation of an indicator "
            "with what real cuts do, mean over layers."
        )
        targets = summary["mean"]
        of_indicator = {
            name: {f"effect on {target}": targets[target][name] for target in targets}
            for name in next(iter(targets.values()))
        }
        yield report.rows("indicator", of_indicator, "correlation")

    def figures(self, summary: Summary) -> Iterator[tuple[str, Figure]]:
        """Yields one figure over the layers, with a panel for each target."""
        panels = {
            f"effect on {target}": {
                name: report.curve(np.arange(len(numbers["mean"])), numbers)
                for name, numbers in of_indicator.items()
            }
            for target, of_indicator in summary["by_layer"].items()
        }
        own = INDICATORS[:1]
        yield (
            "faithfulness",
            evidence(panels, "layer", ylabel="rank correlation", own=own),
        )


class CutImpact(NamedTuple):
    """How far S real cuts, one at a time, move what the model computes.

    Euclidean norms of the displacement of the final tokens.

    Attributes:
      tokens: of all final tokens together, prefix tokens included.
      own: of the patch whose attention was cut.
      cls: of the first token, which is CLS in a model that has one.
    """

    tokens: Float[np.ndarray, " S"]
    own: Float[np.ndarray, " S"]
    cls: Float[np.ndarray, " S"]


class Comparison(NamedTuple):
    """What the cuts of one image did, and how well each indicator ranks them.

    Attributes:
      interactions: patches ``(i, j)`` of the cuts i<-j in each layer.
      truth: the cuts' real impact, by target, for ``TARGETS``.
      correlation: Spearman's rank correlation by target and indicator, for each layer
        and whatever axes the indicator has before it. NaN where all cuts have the
        same impact: in the last layer none of them reaches the CLS token.
    """

    interactions: Int[np.ndarray, "L S 2"]
    truth: dict[str, Float[np.ndarray, "L S"]]
    correlation: dict[str, dict[str, Float[np.ndarray, "*repeats L"]]]


def cut(
    params: Params, image: Images, *, layers: tuple[int, ...], model: ViT
) -> Predict:
    """Returns what a cut does to the final tokens of one image, in float64.

    The weakest cuts move the output by little more than the rounding of float32.
    """
    model = model.clone(dtype=jnp.float64)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        before = streams(params, image, layers=layers, model=model)

    def predict(layer, bias):
        with jax.enable_x64(True):
            return _cut(params, before[layer], bias, layer=layer, model=model)

    return predict


@partial(jax.jit, static_argnames=("layer", "model"))
def _cut(params, tokens, bias, *, layer: int, model: ViT):
    variables = {"params": params}
    tokens = jnp.broadcast_to(tokens, (len(bias), *tokens.shape[1:]))
    biases = [None] * model.depth
    biases[layer] = bias.astype(tokens.dtype)
    tokens, _ = model.apply(
        variables, tokens, start=layer, bias=biases, method="encode"
    )
    return model.apply(variables, tokens, method="readout")[1]["tokens"]


def sample_interactions(
    key: Key, num_patches: int, count: int
) -> Int[np.ndarray, "S 2"]:
    """Draws interactions uniformly from all ordered pairs, without replacement.

    Uniform, so that an indicator is judged on the interactions that there are, most
    of which are weak and close in rank. A patch and itself are a pair, too.

    Args:
      key: the randomness.
      num_patches: P.
      count: S, at most P * P, and at least 3, for ranks to be worth comparing.

    Returns:
      Pairs ``(i, j)`` of the interactions i<-j, counted without the prefix tokens.

    Raises:
      UsageError: fewer or more interactions than that.
    """
    if not 3 <= count <= num_patches**2:
        raise UsageError(
            f"{count} interactions were asked for, expected 3 to {num_patches**2}, "
            f"the number of pairs of {num_patches} patches: change their number."
        )
    pairs = jax.random.choice(key, num_patches**2, (count,), replace=False)
    return np.stack(np.divmod(np.asarray(pairs), num_patches), axis=-1)


def cut_impact(
    predict: Callable[[Float[Array, "S 1 N N"]], Float[Array, "S N D"]],
    interactions: Int[np.ndarray, "S 2"],
    *,
    num_tokens: int,
    num_prefix_tokens: int,
    batch_size: int = 20,
) -> CutImpact:
    """Cuts interactions one at a time, in all heads of a layer, and runs the model.

    A cut adds minus infinity to one attention logit. Every batch also holds a run
    without a cut, with which the others are compared: the same arithmetic on the same
    machine, so that rounding is no part of the difference.

    Args:
      predict: maps additive biases of the layer to the final tokens. It is always
        called with ``batch_size + 1`` biases.
      interactions: pairs ``(i, j)`` of patches.
      num_tokens: N.
      num_prefix_tokens: tokens before the patches, which are not cut.
      batch_size: cuts at once.

    Returns:
      The impact of each cut.

    Raises:
      UsageError: interactions of patches that do not exist, or an empty batch.
    """
    patches = num_tokens - num_prefix_tokens
    if interactions.min() < 0 or interactions.max() >= patches:
        raise UsageError(
            f"The interactions name patches {interactions.min()} to "
            f"{interactions.max()}, but there are {patches}: count patches from 0, "
            "without the prefix tokens."
        )
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, expected at least 1.")
    run = np.arange(1, batch_size + 1)
    moved = []
    for start in range(0, len(interactions), batch_size):
        # The last batch is filled up with its first cut: one shape, traced once.
        batch = np.resize(np.arange(start, len(interactions)), batch_size)
        query, key = (interactions[batch] + num_prefix_tokens).T
        bias = np.zeros((batch_size + 1, 1, num_tokens, num_tokens), np.float32)
        bias[run, 0, query, key] = -np.inf
        tokens = np.asarray(predict(jnp.asarray(bias)))
        moved.append(np.linalg.norm(tokens[1:] - tokens[:1], axis=-1))
    moved = np.concatenate(moved)[: len(interactions)]
    query = interactions[:, 0] + num_prefix_tokens
    return CutImpact(
        tokens=np.linalg.norm(moved, axis=-1),
        own=moved[np.arange(len(query)), query],
        cls=moved[:, 0],
    )


def rank_correlation(
    impact: Float[np.ndarray, "*repeats S"], truth: Float[np.ndarray, " S"]
) -> Float[np.ndarray, "*repeats"]:
    """Returns Spearman's rank correlation; NaN if either side is constant.

    Raises:
      UsageError: what is to be ranked is not finite.
    """
    if not (np.isfinite(impact).all() and np.isfinite(truth).all()):
        raise UsageError(
            "Numbers to be ranked are NaN or infinite, expected finite impacts: check "
            "the images and what the indicator or the model computes from them."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return np.apply_along_axis(
            lambda row: stats.spearmanr(row, truth).statistic, -1, impact
        )


def faithfulness(
    predict: Predict,
    impacts: Mapping[str, Float[Array | np.ndarray, "..."]],
    layers: tuple[int, ...],
    *,
    key: Key,
    num_prefix_tokens: int,
    num_interactions: int = 80,
    batch_size: int = 20,
) -> Comparison:
    """Compares indicators of one image with real cuts followed through the network.

    Args:
      predict: maps the index of a layer and additive biases of its attention to the
        final tokens of the image.
      impacts: indicators by name, ``[..., L, P, P]`` for the layers asked for. The
        axes in front are repeats, such as other seeds; each is correlated on its own.
      layers: indices of the layers to cut in, as ``predict`` knows them.
      key: draws the interactions, others in every layer.
      num_prefix_tokens: tokens before the patches, which are not cut.
      num_interactions: cuts for each layer.
      batch_size: cuts at once.

    Returns:
      The cuts, their real impact and the correlations.

    Raises:
      UsageError: no indicators, shapes that do not fit, or numbers that are not
        finite.
    """
    patches = _count_patches(impacts, len(layers))
    interactions, measured = [], []
    for layer in layers:
        own_key = jax.random.fold_in(key, layer)
        pairs = sample_interactions(own_key, patches, num_interactions)
        interactions.append(pairs)
        measured.append(
            cut_impact(
                partial(predict, layer),
                pairs,
                num_tokens=patches + num_prefix_tokens,
                num_prefix_tokens=num_prefix_tokens,
                batch_size=batch_size,
            )
        )
    truth = CutImpact(*map(np.stack, zip(*measured, strict=True)))._asdict()

    def correlate(impact, truth):
        by_layer = [
            rank_correlation(np.asarray(impact)[..., place, i, j], truth[place])
            for place, (i, j) in enumerate(np.moveaxis(interactions, -1, 1))
        ]
        return np.stack(by_layer, axis=-1)

    correlation = {
        target: {name: correlate(impact, moved) for name, impact in impacts.items()}
        for target, moved in truth.items()
    }
    return Comparison(np.stack(interactions), truth, correlation)


def _count_patches(impacts: Mapping, num_layers: int) -> int:
    shapes = {name: np.shape(impact)[-3:] for name, impact in impacts.items()}
    if not shapes or not num_layers:
        raise UsageError(
            f"There are {len(shapes)} indicators of {num_layers} layers, expected at "
            "least one of each: pass impacts={name: array} and layers=(index, ...)."
        )
    patches = (0, *next(iter(shapes.values())))[-1]
    for name, shape in shapes.items():
        if shape != (num_layers, patches, patches):
            raise UsageError(
                f"The indicator {name!r} ends in the shape {shape}, expected "
                f"[L, P, P] = {(num_layers, patches, patches)}: give each layer asked "
                "for one matrix of patches, the same number for all indicators."
            )
    return patches
