"""The protocol ``windows``: is what an indicator keeps of attention what matters?

In all layers at once, attention between patches is restricted to a share of the
interactions: to those that are chosen together, to the strongest by their single cuts,
or to controls. All keep exactly as many of each image's interactions.
"""

from collections.abc import Callable, Iterator, Mapping
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
from wf_vit.indicators.arithmetic import einsum
from wf_vit.interventions import Keep, Scores
from wf_vit.measure import impact
from wf_vit.models.parameters import output_projection
from wf_vit.models.recording import linearize
from wf_vit.models.vit import ViT
from wf_vit.selection import select_interactions
from wf_vit.shapes import Images, Labels, Params
from wf_vit.verify import cost, report
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

# What is put to the test first, then the single cuts that it is to improve on, then the
# controls: the top k of scores that others use, fixed shapes, and the worst.
OWN, SINGLE = "chosen together", "single cuts"
SCORES = (
    "attention per head, top k",
    "mean attention, top k",
    "attention rollout, top k",
    "value-weighted attention, top k",
    "attention times gradient, top k",
)
RULES = (
    OWN,
    SINGLE,
    *SCORES,
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
        """Reads ``config.kept`` and ``config.timing_turns``."""
        self._subject, self._turns = subject, config.timing_turns
        model = subject.model
        patches = model.num_tokens - model.num_prefix_tokens
        self._named = tuple(config.kept)
        self._shares = tuple(
            whole_share(share, model.depth, patches) for share in self._named
        )

    def measure(self, case: Case, count: int) -> Outcomes:
        """Returns the measures of `windows` for all images of a batch."""
        del count  # The whole batch: one shape, traced once.
        model, params = case.subject.model, case.subject.params
        # Towards all tokens, whatever is watched: it keeps more of what is pooled, too.
        selected = select_interactions(
            model,
            params,
            case.images,
            self._shares,
            key=case.probe_key,
            num_probes=case.subject.num_probes,
        )
        prefix = model.num_prefix_tokens
        attention = case.attention[..., prefix:, prefix:]
        return windows(
            partial(_masked, params, case.images, model=model),
            case.whole,
            dict(zip(self._shares, selected, strict=True)),
            jnp.sqrt(attention * case.impact),
            _scores(case),
            grid=model.grid,
            keys=case.image_keys,
            labels=case.labels,
        )

    def summarize(self, outcomes: Outcomes, estimate: Estimate) -> Summary:
        """Returns every measure by rule and share, margins over controls, and costs."""
        own, controls = RULES.index(OWN), [RULES.index(rule) for rule in CONTROLS]
        summary = {
            "measures": {
                measure: report.nested(estimate(o), RULES, self._named)
                for measure, o in outcomes.items()
            },
            "margins": {
                measure: report.nested(
                    estimate(o[:, own, None] - o[:, controls]), CONTROLS, self._named
                )
                for measure, o in outcomes.items()
            },
        }
        if self._turns:

            def choose(images, key):
                return select_interactions(
                    self._subject.model,
                    self._subject.params,
                    images,
                    self._shares[:1],
                    key=key,
                    num_probes=self._subject.num_probes,
                )

            summary["cost"] = cost.measure(self._subject, choose, self._turns)
        return summary

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
        if "cost" in summary:
            yield cost.table(summary["cost"], "one share")

    def figures(self, summary: Summary) -> Iterator[tuple[str, Figure]]:
        """Yields one figure, with a panel for each measure."""
        measures = summary["measures"]
        panels = {
            report.MEASURES[measure][1]: report.over_shares(measures[measure], measure)
            for measure in report.measured(summary)
        }
        figure = evidence(
            panels, "interactions kept (%)", own=(OWN, SINGLE), aside=RULES[-1:]
        )
        yield "windows", figure


@partial(jax.jit, static_argnames="model")
def _masked(params: Params, images: Images, keep: Keep, *, model: ViT) -> Answer:
    """Returns the answer when only some interactions between patches are kept."""
    bias = interventions.attention_bias(keep, num_prefix_tokens=model.num_prefix_tokens)
    return answer_of(model, *model.apply({"params": params}, images, bias=bias))


def _scores(case: Case) -> dict[str, Scores]:
    """Returns the scores that others rank interactions by, in the order of SCORES.

    Attention times gradient is that of Chefer et al. (arXiv 2103.15679), of the class
    that is predicted, or of the squared norm of what is pooled in a model without head.
    """
    model, params, recording = case.subject.model, case.subject.params, case.recording
    prefix = model.num_prefix_tokens
    attention = recording.attention[..., prefix:, prefix:]
    rollout = impact(model, params, case.images, "rollout", recording=recording).impact
    kernel = output_projection(model, params).scaled
    written = einsum("lbnhk,lhkd->lbhnd", recording.values, kernel)
    norms = jnp.linalg.norm(written, axis=-1)[..., None, prefix:]
    gradient = _attention_gradient(params, case.images, model=model)
    scores = (
        attention,
        attention.mean(2),
        rollout,
        attention * norms,
        attention * jnp.maximum(gradient[..., prefix:, prefix:], 0.0),
    )
    return dict(zip(SCORES, scores, strict=True))


@partial(jax.jit, static_argnames="model")
def _attention_gradient(
    params: Params, images: Images, *, model: ViT
) -> Float[Array, "L B H N N"]:
    """Returns what the output gains for a little more of each attention weight."""

    def read(outputs):
        if model.num_classes:
            return outputs["logits"].max(-1)
        return jnp.square(outputs["pooled"]).sum(-1) / 2

    layers = model.check_layers(None)
    output, gradients, recording = linearize(model, layers, params, images, read)
    kernel = output_projection(model, params).scaled
    seen = einsum("lhkd,lbnd->lbhnk", kernel, gradients(jnp.ones_like(output)))
    return einsum("lbhik,lbjhk->lbhij", seen, recording.values)


def masks(
    selected: Keep,
    single: Float[Array, "L B H P P"],
    scores: Mapping[str, Scores],
    keys: KeyArray[Array, " B"],
    *,
    share: float,
    grid: Grid,
) -> dict[str, Keep]:
    """Returns the interactions that each rule keeps, as many for all of them.

    The strongest by their single cuts are taken by one threshold. Those of fixed
    shapes, and of top k, are of the same size for every query.

    Args:
      selected: what is chosen together, of the same share.
      single: the geometric mean of attention and propagated impact, per head.
      scores: what others rank by.
      keys: randomness of each image.
      share: of the interactions between patches that is kept.
      grid: ``(GH, GW)``.

    Returns:
      For each of ``RULES`` what is kept, with an H of 1 (no axis) where heads do not
      differ and a B of 1 where images do not. Each patch keeps itself.

    Raises:
      UsageError: the share leaves a patch not even itself.
    """
    depth, _, heads, patches, _ = single.shape

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
        OWN: selected,
        SINGLE: keep(single),
        **{name: evenly(score) for name, score in scores.items()},
        "square window": evenly(one_for_all(square)),
        "Swin-like partition": evenly(one_for_all(swin)),
        "nearest": evenly(one_for_all(-distances(grid))),
        "random": keep(jnp.moveaxis(jax.vmap(noise)(keys), 0, 1)),
        "least important": keep(-single),
    }


def whole_share(share: float, depth: int, patches: int) -> float:
    """Returns the nearest share of which each head keeps a whole number.

    Masks for all heads then keep as many as masks per head.
    """
    return round(share * depth * patches**2) / (depth * patches**2)


def windows(
    predict: Callable[[Keep], Answer],
    whole: Answer,
    selected: Mapping[float, Keep],
    single: Float[Array, "L B H P P"],
    scores: Mapping[str, Scores],
    *,
    grid: Grid,
    keys: KeyArray[Array, " B"],
    labels: Labels | None,
) -> Outcomes:
    """Restricts attention to what each rule keeps, and asks the model again.

    Args:
      predict: the model's answer when it keeps some interactions between patches.
      whole: its answer when it keeps all.
      selected: what is chosen together, by the share of the interactions.
      single: what `masks` says.
      scores: what others rank by.
      grid: ``(GH, GW)``.
      keys: randomness of each image.
      labels: the true classes, or None if the model does not know them.

    Returns:
      The measures of ``agreement`` for each image, rule and share:
      ``[B, len(RULES), len(selected)]``.
    """
    outcomes = []
    for share, chosen in selected.items():
        kept = masks(chosen, single, scores, keys, share=share, grid=grid)
        outcomes += [agreement(predict(kept[rule]), whole, labels) for rule in RULES]
    by_share = stacked(outcomes, (len(selected), len(RULES)))
    return {name: outcome.swapaxes(1, 2) for name, outcome in by_share.items()}
