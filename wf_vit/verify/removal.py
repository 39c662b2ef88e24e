"""The protocol ``removal``: can indiscriminative patches really be done without?

From some layer on their tokens are gathered out, so that the sequence is shorter. What
is left of the model's answer is compared with what other choices of as many patches
leave, and with as many merged ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Int
from matplotlib.figure import Figure

from wf_vit.errors import UsageError
from wf_vit.figures import evidence
from wf_vit.interventions import gather_patches, keep_patches, num_kept
from wf_vit.models.vit import ViT
from wf_vit.selection import first_of_quarters, run_without, select_patches
from wf_vit.shapes import Images, Labels, Logits, Params, Tokens
from wf_vit.verify import cost, report
from wf_vit.verify.patch_scores import EVIT, layer_keys, merge, patch_scores
from wf_vit.verify.subject import (
    Answer,
    Case,
    Estimate,
    Outcomes,
    Subject,
    Summary,
    agreement,
    answer_of,
    classify,
    stacked,
    streams,
)

# What is put to the test first, then scores of single cuts that it is to improve on,
# then the controls. Each removes what it scores lowest, but for one, which merges.
OWN = ("chosen together",)
SINGLE = ("least discriminative", "least impact")
TOME = "merged by likeness, as ToMe"
CONTROLS = (
    "least attended",
    EVIT,
    TOME,
    "random",
    "most discriminative",
)
RULES = (*OWN, *SINGLE, *CONTROLS)
# Of the images that are timed.
_BATCH_SIZES = (1, 64)


class Removal:
    """Patches gathered out (`wf_vit.verify.subject.Protocol`)."""

    needs_head = False

    def __init__(self, subject: Subject, config: ml_collections.ConfigDict):
        """Reads ``config.layers``, ``config.removed`` and ``config.timing_turns``.

        Raises:
          UsageError: the model has no such layers.
        """
        depth = subject.model.depth
        self._subject, self._turns = subject, config.timing_turns
        self._layers = tuple(config.layers) or first_of_quarters(depth)
        self._shares = tuple(config.removed)
        if not set(self._layers) <= set(range(depth)):
            raise UsageError(
                f"config.layers is {self._layers}: name some of the model's layers, 0 "
                f"to {depth - 1}, or none for the first of each quarter."
            )

    def measure(self, case: Case, count: int) -> Outcomes:
        """Returns the measures of `removal` for all images of a batch."""
        del count  # The whole batch: one shape, traced once.
        model, params = case.subject.model, case.subject.params
        before = streams(params, case.images, layers=self._layers, model=model)

        scores = patch_scores(case.attention, case.impact, case.image_keys)
        scores[OWN[0]] = {
            layer: select_patches(
                model,
                params,
                case.images,
                layer,
                key=case.probe_key,
                removed=max(self._shares),
                target=case.subject.target,
                num_probes=case.subject.num_probes,
            )
            for layer in self._layers
        }

        def gathered(score, layer, left):
            patches = keep_patches(score[layer], left)
            out = run_without(params, before[layer], patches, model=model, layer=layer)
            return answer_of(model, *out), patches

        def merged(layer, left):
            tokens = before[layer]
            return merged_answer(params, tokens, layer=layer, count=left, model=model)

        without = {rule: partial(gathered, score) for rule, score in scores.items()}
        without[TOME] = merged
        return removal(
            {rule: without[rule] for rule in RULES},
            case.whole,
            layers=self._layers,
            shares=self._shares,
            labels=case.labels,
        )

    def summarize(self, outcomes: Outcomes, estimate: Estimate) -> Summary:
        """Returns measures and margins by layer, rule and share, and the wall-clock.

        ``best_layer`` is the one before which a rule is widest ahead of its best
        control, in the mean over the shares: it is chosen on the images that it is
        reported on. The time is that of removal before the best layer of the first
        rule by the first measure.
        """
        layers, shares = self._layers, self._shares
        controls = [RULES.index(rule) for rule in CONTROLS]
        margins = {
            measure: {
                own: estimate(o[:, :, RULES.index(own), None] - o[:, :, controls])
                for own in OWN
            }
            for measure, o in outcomes.items()
        }
        summary = {
            "measures": {
                measure: report.nested(estimate(o), layers, RULES, shares)
                for measure, o in outcomes.items()
            },
            "margins": {
                measure: {
                    own: report.nested(margin, layers, CONTROLS, shares)
                    for own, margin in by_rule.items()
                }
                for measure, by_rule in margins.items()
            },
            "best_layer": {
                measure: {
                    own: layers[int(margin.mean.min(1).mean(1).argmax())]
                    for own, margin in by_rule.items()
                }
                for measure, by_rule in margins.items()
            },
        }
        if self._turns:
            layer = _timed_layer(summary)
            summary["milliseconds_per_image"] = self._times(layer)
            share = max(self._shares)

            def choose(images, key):
                model, params = self._subject.model, self._subject.params
                return select_patches(
                    model,
                    params,
                    images,
                    layer,
                    key=key,
                    removed=share,
                    num_probes=self._subject.num_probes,
                )

            summary["cost"] = cost.measure(self._subject, choose, self._turns)
        return summary

    def tables(self, summary: Summary, images: int) -> Iterator[str]:
        """Yields a table of the rules for each measure, and one of the wall-clock."""
        for measure in report.measured(summary):
            layer = summary["best_layer"][measure][OWN[0]]
            yield (
                f"**Removal**, {images:,} images: a share of the patches gathered out "
                f"before layer {layer}, the one with the widest margin over the best "
                "control on these images; the figure shows the others."
            )
            by_rule = summary["measures"][measure][str(layer)]
            head = f"{report.MEASURES[measure][0]}, patches removed"
            yield report.rows(head, by_rule, measure)
            for own in OWN:
                margins = summary["margins"][measure][own][str(layer)]
                yield report.verdict(own, margins, measure)
        if "milliseconds_per_image" in summary:
            layer = _timed_layer(summary)
            yield _time_table(summary["milliseconds_per_image"], layer)
            what = (
                f"ranking {report.percent(str(max(self._shares)))} before layer {layer}"
            )
            yield cost.table(summary["cost"], what)

    def figures(self, summary: Summary) -> Iterator[tuple[str, Figure]]:
        """Yields a figure for each measure, with a panel for each layer."""
        for measure in report.measured(summary):
            panels = {
                f"before layer {layer}": report.over_shares(by_rule, measure)
                for layer, by_rule in summary["measures"][measure].items()
            }
            figure = evidence(
                panels,
                "patches removed (%)",
                own=OWN,
                aside=RULES[-1:],
                ylabel=report.MEASURES[measure][1],
            )
            yield f"removal_{measure}", figure

    def _times(self, layer: int) -> dict[str, dict[str, float]]:
        """Times whole forward passes, from images to logits, turn by turn.

        Which patches go is given: what it takes to find out is not in the time, nor is
        the compilation. What else the machine does is spread evenly over all
        conditions.

        Returns:
          Milliseconds an image, the median over the turns, by batch size and share;
          the share 0 is the whole model.
        """
        model, params = self._subject.model, self._subject.params
        patches = model.num_tokens - model.num_prefix_tokens
        order = jax.random.permutation(jax.random.key(1), patches)
        times = {}
        for size in _BATCH_SIZES:
            images = jax.random.normal(jax.random.key(0), (size, *model.image_size, 3))
            forward = {0: partial(classify, params, images, model=model)}
            for share in self._shares:
                kept = jnp.sort(order[: num_kept(share, patches)])
                kept = jnp.broadcast_to(kept, (size, len(kept)))
                forward[share] = partial(
                    _shortened, params, images, kept, layer=layer, model=model
                )
            times[str(size)] = {
                str(share): milliseconds / size
                for share, milliseconds in cost.take_turns(forward, self._turns).items()
            }
        return times


def _timed_layer(summary: Summary) -> int:
    return summary["best_layer"][report.measured(summary)[0]][OWN[0]]


def _time_table(by_batch: Mapping[str, Mapping[str, float]], layer: int) -> str:
    lines = []
    for size, by_share in by_batch.items():
        whole = by_share["0"]
        cells = [f"{time:.3g} ({whole / time:.2f} x)" for time in by_share.values()]
        lines.append([f"batch {size}", *cells])
    head = f"ms an image (speed-up), patches removed before layer {layer}"
    return report.markdown([head, *map(report.percent, by_share)], lines)


@partial(jax.jit, static_argnames=("layer", "count", "model"))
def merged_answer(
    params: Params, tokens: Tokens, *, layer: int, count: int, model: ViT
) -> tuple[Answer, Int[Array, "B kept"]]:
    """Returns the answer when from a layer on there are fewer, merged patches.

    As in ToMe a merged patch has as much attention as those that it stands for would
    have, and as much weight in a mean. A head that pools by attention sees it once.

    Args:
      params: the model's.
      tokens: the residual stream of all patches before the layer.
      layer: the first one with merged patches.
      count: how many there are.
      model: the model.

    Returns:
      The answer, and which patches are left.
    """
    variables, prefix = {"params": params}, model.num_prefix_tokens
    keys = layer_keys(params, tokens, layer=layer, model=model)
    left = merge(tokens[:, prefix:], keys, count)
    tokens = jnp.concatenate([tokens[:, :prefix], left.tokens], axis=1)
    sizes = jnp.pad(jnp.log(left.sizes), [(0, 0), (prefix, 0)])
    bias = jnp.broadcast_to(sizes[:, None, None], (len(sizes), 1, *2 * sizes.shape[1:]))
    tokens, _ = model.apply(
        variables,
        tokens,
        start=layer,
        patches=left.patches,
        bias=[bias] * model.depth,
        method="encode",
    )
    if model.pool not in ("mean", "cls_mean"):
        out = model.apply(variables, tokens, method="readout")
        return answer_of(model, *out), left.patches
    # For the mean each patch is where it was merged to.
    tokens = gather_patches(tokens, left.place, num_prefix_tokens=prefix)
    answer = answer_of(model, *model.apply(variables, tokens, method="readout"))
    own = jnp.take_along_axis(answer.patches, left.patches[..., None], axis=1)
    return answer._replace(patches=own), left.patches


@partial(jax.jit, static_argnames=("layer", "model"))
def _shortened(
    params: Params,
    images: Images,
    patches: Int[Array, "B kept"],
    *,
    layer: int,
    model: ViT,
) -> Logits:
    """Returns the logits when from a layer on only some patches are there."""
    tokens = streams(params, images, layers=(layer,), model=model)[layer]
    return run_without(params, tokens, patches, model=model, layer=layer)[0]


def removal(
    without: Mapping[str, Callable[[int, int], tuple[Answer, Int[Array, "B kept"]]]],
    whole: Answer,
    *,
    layers: Sequence[int],
    shares: Sequence[float],
    labels: Labels | None,
) -> Outcomes:
    """Asks the model again with fewer patches, by each rule.

    Args:
      without: for each rule the model's answer when from a layer on there are so many
        patches, and which of them are left.
      whole: its answer when all are.
      layers: before which patches are removed.
      shares: of the patches that are removed.
      labels: the true classes, or None if the model does not know them.

    Returns:
      The measures of ``agreement`` for each image, layer, rule and share:
      ``[B, len(layers), len(without), len(shares)]``.
    """
    patches = whole.patches.shape[1]

    def outcome(layer, rule, share):
        answer, left = without[rule](layer, num_kept(share, patches))
        return agreement(answer, whole, labels, left)

    outcomes = [
        outcome(layer, rule, share)
        for layer in layers
        for rule in without
        for share in shares
    ]
    return stacked(outcomes, (len(layers), len(without), len(shares)))
