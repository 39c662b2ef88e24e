"""Outcomes of images to means with intervals, in terms of JSON.

Everywhere in it a number is ``{"mean": ..., "low": ..., "high": ...}``, with the ends
of its 95 % bootstrap interval over images; None stands for no number.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from wf_vit.verify.answers import MEASURES, Collected, Outcomes
from wf_vit.verify.bootstrap import Interval, intervals
from wf_vit.verify.pixels import auc
from wf_vit.verify.removal import CONTROLS as REMOVAL_CONTROLS
from wf_vit.verify.removal import OWN as REMOVAL_OWN
from wf_vit.verify.removal import RULES as REMOVAL_RULES
from wf_vit.verify.subject import FILLS, INDICATORS, Subject
from wf_vit.verify.windows import CONTROLS, OWN, RULES

Summary = dict[str, Any]
_Estimate = Callable[[Float[np.ndarray, "..."]], Interval]

# The measures of pixels by name: of what, and which order of filling.
AREAS = {
    "deletion": ("probability", 0),
    "insertion": ("probability", 1),
    "positive perturbation": ("top1", 0),
    "negative perturbation": ("top1", 1),
}


def summarize(outcomes: Collected, subject: Subject) -> Summary:
    """Returns the summary of every protocol that has outcomes.

    Args:
      outcomes: of all images, by ``PROTOCOL/MEASURE`` (``Subject.outcomes``).
      subject: what they are of.
    """
    config = subject.config
    estimate = partial(intervals, seed=config.seed, samples=config.bootstrap_samples)
    by_protocol: dict[str, Outcomes] = {}
    for name, outcome in outcomes.items():
        protocol, _, measure = name.partition("/")
        by_protocol.setdefault(protocol, {})[measure] = outcome
    summarizers = {
        "whole": _whole,
        "windows": _windows,
        "removal": _removal,
        "pixels": _pixels,
        "faithfulness": _faithfulness,
    }
    return {
        protocol: summarizers[protocol](measures, subject, estimate)
        for protocol, measures in by_protocol.items()
    }


def nested(interval: Interval, *axes: Iterable[Any]) -> Summary:
    """Returns intervals as dicts within dicts, with an axis' names as the keys.

    What axes remain at the end become lists.
    """
    if not axes:
        return {end: _listed(values) for end, values in interval._asdict().items()}
    names, *rest = axes
    return {
        str(name): nested(Interval(*(part[place] for part in interval)), *rest)
        for place, name in enumerate(names)
    }


def _listed(values):
    """Returns numbers that JSON knows: rounded, and None for NaN."""
    if np.ndim(values):
        return [_listed(value) for value in values]
    return float(f"{values:.5g}") if np.isfinite(values) else None


def measured(summary: Summary) -> list[str]:
    """Returns which of ``MEASURES`` a protocol has, in their order."""
    return [measure for measure in MEASURES if measure in summary["measures"]]


def best_layer(removal: Summary) -> int:
    """Returns the layer before which removal is widest ahead of its best control.

    In the mean over the shares, by top-1 if there is one, and for the rule that is put
    to the test first. It is chosen on the images that it is reported on.
    """
    return removal["best_layer"][measured(removal)[0]][REMOVAL_OWN[0]]


def _whole(measures: Outcomes, subject: Subject, estimate: _Estimate) -> Summary:
    return {measure: nested(estimate(o)) for measure, o in measures.items()}


def _windows(measures: Outcomes, subject: Subject, estimate: _Estimate) -> Summary:
    shares = subject.config.kept
    own, controls = RULES.index(OWN), [RULES.index(rule) for rule in CONTROLS]
    return {
        "measures": {
            measure: nested(estimate(o), RULES, shares)
            for measure, o in measures.items()
        },
        "margins": {
            measure: nested(
                estimate(o[:, own, None] - o[:, controls]), CONTROLS, shares
            )
            for measure, o in measures.items()
        },
    }


def _removal(measures: Outcomes, subject: Subject, estimate: _Estimate) -> Summary:
    layers, shares = subject.layers, subject.config.removed
    controls = [REMOVAL_RULES.index(rule) for rule in REMOVAL_CONTROLS]

    def margins(outcome, own):
        own = REMOVAL_RULES.index(own)
        return estimate(outcome[:, :, own, None] - outcome[:, :, controls])

    by_rule = {
        measure: {own: margins(outcome, own) for own in REMOVAL_OWN}
        for measure, outcome in measures.items()
    }
    return {
        "measures": {
            measure: nested(estimate(o), layers, REMOVAL_RULES, shares)
            for measure, o in measures.items()
        },
        "margins": {
            measure: {
                own: nested(margin, layers, REMOVAL_CONTROLS, shares)
                for own, margin in margins_of.items()
            }
            for measure, margins_of in by_rule.items()
        },
        "best_layer": {
            measure: {
                own: layers[int(margin.mean.min(1).mean(1).argmax())]
                for own, margin in margins_of.items()
            }
            for measure, margins_of in by_rule.items()
        },
    }


def _pixels(measures: Outcomes, subject: Subject, estimate: _Estimate) -> Summary:
    names = subject.maps, FILLS

    def summary(of_curves):
        return {
            kind: {
                name: nested(
                    estimate(of_curves(measures[f"{kind}_{measure}"][..., order, :])),
                    *names,
                )
                for name, (measure, order) in AREAS.items()
            }
            for kind in subject.kinds
        }

    return {"auc": summary(auc), "curves": summary(lambda curves: curves)}


def _faithfulness(measures: Outcomes, subject: Subject, estimate: _Estimate) -> Summary:
    correlation = measures["correlation"]
    names = subject.targets, INDICATORS
    # In the last layer no cut between patches reaches the CLS token.
    counted = np.isfinite(correlation)
    total = np.where(counted, correlation, 0.0).sum(-1)
    mean = total / np.where(counted.any(-1), counted.sum(-1), np.nan)
    return {
        "mean": nested(estimate(mean), *names),
        "by_layer": nested(estimate(correlation), *names),
    }
