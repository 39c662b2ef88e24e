"""The protocol ``windows``: is what an indicator keeps of attention what matters?

In all layers at once, attention between patches is restricted to a share of the
interactions: to the fields that an indicator gives each patch, or to controls that
keep exactly as many of each image's interactions.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray
from matplotlib.figure import Figure

from wf_vit import interventions
from wf_vit.figures import evidence
from wf_vit.grid import Grid, distances
from wf_vit.interventions import Keep
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Labels, Params
from wf_vit.verify import report
from wf_vit.verify.subject import (
    Answer,
    Case,
    Estimate,
    Outcomes,
    Subject,
    Summary,
    agreement,
    answer_of,
    stacked,
)

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


class Windows:
    """Attention restricted in all layers (`wf_vit.verify.subject.Protocol`)."""

    needs_head = False

    def __init__(self, subject: Subject, config: ml_collections.ConfigDict):
        """Reads ``config.kept``, the shares of the interactions that are kept."""
        del subject
        self._shares = tuple(config.kept)

    def measure(self, case: Case, count: int) -> Outcomes:
        """Returns the measures of `windows` for all images of a batch."""
        del count  # The whole batch: one shape, traced once.
        model, params = case.subject.model, case.subject.params
        prefix = model.num_prefix_tokens
        return windows(
            partial(_masked, params, case.images, model=model),
            case.whole,
            case.attention[..., prefix:, prefix:],
            case.impact,
            shares=self._shares,
            grid=model.grid,
            keys=case.image_keys,
            labels=case.labels,
        )

    def summarize(self, outcomes: Outcomes, estimate: Estimate) -> Summary:
        """Returns every measure by rule and share, and the margins over controls."""
        own, controls = RULES.index(OWN), [RULES.index(rule) for rule in CONTROLS]
        return {
            "measures": {
                measure: report.nested(estimate(o), RULES, self._shares)
                for measure, o in outcomes.items()
            },
            "margins": {
                measure: report.nested(
                    estimate(o[:, own, None] - o[:, controls]), CONTROLS, self._shares
                )
                for measure, o in outcomes.items()
            },
        }

    def tables(self, summary: Summary, images: int) -> Iterator[str]:
        """Yields a table of the rules for each measure, and what was not beaten."""
        yield (
            f"**Windows**, {images:,} images: attention between patches restricted, in "
            "all layers, to a share of the interactions."
        )
        for measure in report.measured(summary):
            head = f"{report.MEASURES[measure][0]}, attention kept"
            yield report.rows(head, summary["measures"][measure], measure)
            yield report.verdict(OWN, summary["margins"][measure], measure)

    def figures(self, summary: Summary) -> Iterator[tuple[str, Figure]]:
        """Yields one figure, with a panel for each measure."""
        measures = summary["measures"]
        panels = {
            report.MEASURES[measure][1]: report.over_shares(measures[measure], measure)
            for measure in report.measured(summary)
        }
        figure = evidence(panels, "interactions kept (%)", own=(OWN,), aside=RULES[-1:])
        yield "windows", figure


@partial(jax.jit, static_argnames="model")
def _masked(params: Params, images: Images, keep: Keep, *, model: ViT) -> Answer:
    """Returns the answer when only some interactions between patches are kept."""
    bias = interventions.attention_bias(keep, num_prefix_tokens=model.num_prefix_tokens)
    return answer_of(model, *model.apply({"params": params}, images, bias=bias))


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
      attention: between patches, of all layers.
      impact: propagated, per head, of all layers.
      shares: of the interactions that are kept.
      grid: ``(GH, GW)``.
      keys: randomness of each image.
      labels: the true classes, or None if the model does not know them.

    Returns:
      The measures of ``agreement`` for each image, rule and share:
      ``[B, len(RULES), len(shares)]``.
    """
    outcomes = []
    for share in shares:
        kept = masks(attention, impact, keys, share=share, grid=grid)
        outcomes += [agreement(predict(kept[rule]), whole, labels) for rule in RULES]
    by_share = stacked(outcomes, (len(shares), len(RULES)))
    return {name: outcome.swapaxes(1, 2) for name, outcome in by_share.items()}
