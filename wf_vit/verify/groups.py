"""The protocol ``groups``: is what a whole set of cuts does predicted, too?

Sets of interactions are drawn, of several kinds and shares (`wf_vit.verify.sets`), in
one layer or in all. Each is really cut, in one forward pass, and how far the output
moves is compared with what is predicted from the network left alone: by the effect of
the set (`wf_vit.indicators.set_effect`), and by sums over its interactions.

How much patches repair what they lost (``repair``) is chosen for each image and share,
by the real cuts of all other images. Each exponent also has a row of its own. Where
several layers are cut, so have the plain first order, in which the effects of layers
add with their signs, and the root of the sum of their squares.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from wf_vit import interventions, measure
from wf_vit.figures import evidence
from wf_vit.indicators import set_effect
from wf_vit.models.parameters import output_projection
from wf_vit.models.recording import Recording, linearize
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Key, Params
from wf_vit.verify import report, sets
from wf_vit.verify.faithfulness import rank_correlation
from wf_vit.verify.subject import Case, Estimate, Outcomes, Subject, Summary

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
SCOPES = ("one layer", "all layers")
OWN = "effect of the set"
LAYERS = ("layers with signs", "layers without signs")
REPAIRS = (0.0, 0.25, 0.5, 0.75)
FIXED = tuple(f"{OWN}, repair {exponent:g}" for exponent in REPAIRS)
# What predicts the displacement; the first of them in units of the output.
IN_UNITS = (*FIXED, *LAYERS, "sum of propagated impact", "root sum of squared impact")
PREDICTORS = (*IN_UNITS, "sum of knockout impact", "sum of attention", "random")

# Sets that are cut in one call.
_BATCH_SIZE = 8


class Groups:
    """Cuts of whole sets (`wf_vit.verify.subject.Protocol`)."""

    needs_head = False

    def __init__(self, subject: Subject, config: ml_collections.ConfigDict):
        """Reads ``config.num_sets``, of each kind that is drawn."""
        del subject
        self._num_sets = config.num_sets

    def measure(self, case: Case, count: int) -> Outcomes:
        """Returns numbers by image, scope and share.

        ``correlation`` for each predictor, over the sets of the image; ``ratio`` of
        predicted and real displacement for those in units of the output, their median
        over the sets.
        """
        images = [self._image(case, place) for place in range(count)]
        return {name: np.stack([i[name] for i in images]) for name in images[0]}

    def _image(self, case: Case, place: int) -> dict[str, np.ndarray]:
        """Returns the outcomes of one image, without its axis."""
        subject = case.subject
        model, params = subject.model, subject.params
        image = case.images[place : place + 1]
        key = jax.random.fold_in(jax.random.fold_in(case.key, 4), place)
        probes, seed = jax.random.split(key)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(seed)))
        options = {"model": model, "target": subject.target}
        gradients, recording = _gradients(
            params, image, probes, num_probes=subject.num_probes, **options
        )
        knockout = measure.impact(
            model, params, image, "knockout", per_head=True, recording=recording
        )
        prefix = model.num_prefix_tokens
        attention = np.asarray(recording.attention[:, 0, :, prefix:, prefix:])
        impact = np.asarray(case.impact[:, place])
        found = Numbers([], [])
        for one_layer in (True, False):
            for share in SHARES:
                drawn = sets.draw(
                    rng,
                    impact,
                    attention,
                    share=share,
                    grid=model.grid,
                    one_layer=one_layer,
                    num_sets=self._num_sets,
                )
                cuts = [drawn_set.cut for drawn_set in drawn]
                real = displacements(partial(_cut, params, image, **options), cuts)
                effects = [
                    _predict(params, recording, gradients, ~cut, model=model)
                    for cut in cuts
                ]
                predicted = {
                    **dict(zip((*FIXED, *LAYERS), np.array(effects).T, strict=True)),
                    **sums(cuts, impact, np.asarray(knockout.heads[:, 0]), attention),
                    "random": rng.random(len(cuts)),
                }
                found.add(predicted, real)
        shape = len(SCOPES), len(SHARES), -1
        return {
            name: np.reshape(numbers, shape)
            for name, numbers in found._asdict().items()
        }

    def summarize(self, outcomes: Outcomes, estimate: Estimate) -> Summary:
        """Returns correlations and ratios by scope, predictor and share."""
        chosen = chosen_repair(outcomes["correlation"])
        summary = {}
        for name, predictors in ("correlation", PREDICTORS), ("ratio", IN_UNITS):
            numbers = outcomes[name]
            own = np.take_along_axis(numbers, chosen[..., None], -1)
            numbers = np.concatenate([own, numbers], -1).swapaxes(2, 3)
            names = SCOPES, (OWN, *predictors), SHARES
            summary[name] = report.nested(estimate(numbers), *names)
        return summary

    def tables(self, summary: Summary, images: int) -> Iterator[str]:
        """Yields tables of correlations and of ratios, for one layer and for all."""
        yield (
            f"**Groups**, {images:,} images: rank correlation, over the sets of an "
            "image, of what is predicted and what cutting the whole set does."
        )
        for scope, by_predictor in summary["correlation"].items():
            shown = _distinct(scope, by_predictor)
            yield report.rows(f"cut in {scope}", shown, "correlation")
        yield "Predicted over real displacement, median over the sets of an image:"
        for scope, by_predictor in summary["ratio"].items():
            head = f"cut in {scope}, ratio"
            shown = _distinct(scope, by_predictor)
            yield report.rows(head, shown, "ratio", bold=False)

    def figures(self, summary: Summary) -> Iterator[tuple[str, Figure]]:
        """Yields one figure over the shares, with a panel for each scope."""
        shown = [name for name in (OWN, *PREDICTORS) if name not in FIXED + LAYERS]
        panels = {
            f"cut in {scope}": report.over_shares(
                {name: by_predictor[name] for name in shown}, "correlation"
            )
            for scope, by_predictor in summary["correlation"].items()
        }
        yield (
            "groups",
            evidence(
                panels,
                "interactions cut (%)",
                ylabel="rank correlation",
                own=(OWN,),
                aside=("random",),
            ),
        )


def _distinct(scope: str, by_predictor: Summary) -> Summary:
    """Leaves out rows that cannot differ from the first, where one layer is cut."""
    same = FIXED + LAYERS if scope == SCOPES[0] else ()
    return {name: rows for name, rows in by_predictor.items() if name not in same}


def chosen_repair(
    correlation: Float[np.ndarray, "B scopes shares predictors"],
) -> Int[np.ndarray, "B scopes shares"]:
    """Returns which of ``REPAIRS`` predicts best in all images but the one in question.

    The least wins a tie, and wherever there is one image only.
    """
    known = np.nan_to_num(correlation[..., : len(REPAIRS)])
    return np.argmax(known.sum(0) - known, -1)


class Numbers(NamedTuple):
    """What is said of the sets of an image, one entry for each scope and share.

    Attributes:
      correlation: Spearman's, by ``PREDICTORS``.
      ratio: median over the sets that move the output, by ``IN_UNITS``.
    """

    correlation: list[Float[np.ndarray, " predictors"]]
    ratio: list[Float[np.ndarray, " in_units"]]

    def add(
        self,
        predicted: dict[str, Sequence[float] | np.ndarray],
        real: Float[np.ndarray, " S"],
    ) -> None:
        """Adds those of S sets, of which at least one moves the output."""
        by_name = {name: np.asarray(numbers) for name, numbers in predicted.items()}
        stacked = np.stack([by_name[name] for name in PREDICTORS])
        self.correlation.append(rank_correlation(stacked, real))
        moved = real > 0
        ratio = np.stack([by_name[name][moved] for name in IN_UNITS]) / real[moved]
        empty = np.full(len(IN_UNITS), np.nan)
        self.ratio.append(np.median(ratio, -1) if moved.any() else empty)


def sums(
    cuts: Sequence[Bool[np.ndarray, "L H P P"]],
    impact: Float[np.ndarray, "L H P P"],
    knockout: Float[np.ndarray, "L H P P"],
    attention: Float[np.ndarray, "L H P P"],
) -> dict[str, list[float]]:
    """Returns what each set sums up to, by the names of ``PREDICTORS``."""
    of = {
        "sum of propagated impact": impact,
        "root sum of squared impact": np.square(impact),
        "sum of knockout impact": knockout,
        "sum of attention": attention,
    }
    found = {
        name: [float(numbers[cut].sum(dtype=np.float64)) for cut in cuts]
        for name, numbers in of.items()
    }
    root = "root sum of squared impact"
    found[root] = [total**0.5 for total in found[root]]
    return found


def displacements(
    predict, cuts: Sequence[Bool[np.ndarray, "L H P P"]], batch_size: int = _BATCH_SIZE
) -> Float[np.ndarray, " S"]:
    """Cuts sets, each in a forward pass, and returns how far the output moves.

    Every batch also holds a run without a cut, with which the others are compared, so
    that rounding is no part of the difference.

    Args:
      predict: maps what is kept, ``[L, S + 1, H, P, P]``, to the outputs of S + 1 runs.
        It is always called with ``batch_size + 1`` of them.
      cuts: the S sets.
      batch_size: sets at once.

    Returns:
      Euclidean norms, in units of the output.
    """
    moved = []
    for start in range(0, len(cuts), batch_size):
        # The last batch is filled up with its first sets: one shape, traced once.
        batch = np.resize(np.arange(start, len(cuts)), batch_size)
        keep = [np.ones_like(cuts[0]), *(~cuts[place] for place in batch)]
        output = np.asarray(predict(jnp.asarray(np.stack(keep, 1))), np.float64)
        apart = (output[1:] - output[:1]).reshape(batch_size, -1)
        moved.append(np.linalg.norm(apart, axis=-1))
    return np.concatenate(moved)[: len(cuts)]


@partial(jax.jit, static_argnames=("model", "target"))
def _cut(
    params: Params,
    image: Images,
    keep: Bool[Array, "L S H P P"],
    *,
    model: ViT,
    target: str,
) -> Float[Array, "S ..."]:
    """Returns the output of one image in runs that keep some interactions."""
    bias = interventions.attention_bias(keep, num_prefix_tokens=model.num_prefix_tokens)
    images = jnp.broadcast_to(image, (keep.shape[1], *image.shape[1:]))
    _, out = model.apply({"params": params}, images, bias=bias)
    return out["tokens"][:, 0] if target == "cls" else out[target]


@partial(jax.jit, static_argnames=("model", "target", "num_probes"))
def _gradients(
    params: Params,
    image: Images,
    key: Key,
    *,
    model: ViT,
    target: str,
    num_probes: int,
) -> tuple[Float[Array, "M L B N D"], Recording]:
    """Returns the gradients of probes of random signs, and the recording."""
    output, pull_back, recording = linearize(
        model, tuple(range(model.depth)), params, image, lambda outputs: outputs[target]
    )

    def of_probe(key):
        return pull_back(jax.random.rademacher(key, output.shape, output.dtype))

    return lax.map(of_probe, jax.random.split(key, num_probes)), recording


@partial(jax.jit, static_argnames="model")
def _predict(
    params: Params,
    recording: Recording,
    gradients: Float[Array, "M L B N D"],
    keep: Bool[Array, "L H P P"],
    *,
    model: ViT,
) -> Float[Array, " predictors"]:
    """Returns how far one image's output moves, as FIXED and LAYERS have it."""
    projection = output_projection(model, params)
    found = set_effect(
        recording.attention,
        recording.values,
        projection.output_kernel,
        gradients,
        projection.residual_scale,
        keep=keep[:, None],
        num_prefix_tokens=model.num_prefix_tokens,
        repair=REPAIRS,
    )
    with_signs = jnp.square(found.effect.sum(1)).mean(0)
    without = jnp.square(found.effect).sum(1).mean(0)
    parts = jnp.concatenate([with_signs, without])
    return jnp.concatenate([found.norm[:, 0], jnp.sqrt(parts)])
