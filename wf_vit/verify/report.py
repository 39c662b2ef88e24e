"""Intervals as JSON, as rows of Markdown tables and as curves of figures.

In a summary a number is ``{"mean": ..., "low": ..., "high": ...}``, with the ends of
its 95 % bootstrap interval over images; None stands for no number.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from wf_vit.figures import Curve
from wf_vit.verify.bootstrap import Interval
from wf_vit.verify.subject import Summary

# What `subject.agreement` measures, the most telling first: titles in a table and in
# a figure.
MEASURES = {
    "top1": ("top-1 (%)", "top-1 (%)"),
    "cosine": ("cosine of the pooled representation", "cosine, pooled"),
    "patch_cosine": (
        "mean cosine of the patches that are there",
        "cosine, patches",
    ),
}


def measured(summary: Summary) -> list[str]:
    """Returns which of ``MEASURES`` a protocol has, in their order."""
    return [measure for measure in MEASURES if measure in summary["measures"]]


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


def rows(head: str, table: Summary, measure: str, *, bold: bool = True) -> str:
    """Returns a table with a row for each rule, the best of each column bold.

    Args:
      head: what the rows are.
      table: intervals by rule and column; columns that are shares are shown in %.
      measure: what the numbers are: "top1" is shown in %.
      bold: whether the highest number is the best.
    """
    columns = list(next(iter(table.values())))

    def mean(rule, column):
        value = table[rule][column]["mean"]
        return -np.inf if value is None else value

    best = {c: max(mean(rule, c) for rule in table) for c in columns}
    lines = []
    for rule in table:
        cells = [number(table[rule][column], measure) for column in columns]
        marked = [
            f"**{cell}**" if bold and mean(rule, column) == best[column] else cell
            for cell, column in zip(cells, columns, strict=True)
        ]
        lines.append([rule, *marked])
    return markdown([head, *map(percent, columns)], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: str) -> str:
    """Returns a share, which is a key of the summary, in %; other names unchanged."""
    try:
        return f"{100 * float(share):g} %"
    except ValueError:
        return share


def number(interval: Mapping[str, float | None], measure: str) -> str:
    """Returns a mean with half of its interval; nothing if there is no number."""
    if interval["mean"] is None:
        return ""
    half = (interval["high"] - interval["low"]) / 2
    if measure == "top1":
        return f"{100 * interval['mean']:.1f} ± {100 * half:.1f}"
    return f"{interval['mean']:.3f} ± {half:.3f}"


def verdict(own: str, margins: Summary, measure: str) -> str:
    """Says at which shares a rule surely beats every control.

    Args:
      own: the rule.
      margins: its margins over the controls, paired by image, by control and share.
        A control is not beaten where the interval of the margin reaches 0. Where a
        margin has no number, its mean is None.
      measure: what the numbers are: "top1" is shown in %.
    """

    def listing(controls, share):
        return ", ".join(
            f"{control} ({_margin(margins[control][share], measure)})"
            for control in controls
        )

    parts = []
    for share in next(iter(margins.values())):
        known = [c for c in margins if margins[c][share]["mean"] is not None]
        failed = [c for c in known if margins[c][share]["low"] <= 0]
        if failed:
            found = f"does not beat {listing(failed, share)}"
        elif known:
            nearest = min(known, key=lambda c, s=share: margins[c][s]["mean"])
            found = f"beats every control, the nearest is {listing([nearest], share)}"
        else:
            found = "cannot be compared"
        without = ", ".join(c for c in margins if c not in known)
        found += f" (no number for {without})" if without else ""
        parts.append(f"at {percent(share)} it {found}")
    return f"{own.capitalize()}: {'; '.join(parts)}."


def _margin(interval: Mapping[str, float], measure: str) -> str:
    half = (interval["high"] - interval["low"]) / 2
    if measure == "top1":
        return f"{100 * interval['mean']:+.1f} ± {100 * half:.1f}"
    return f"{interval['mean']:+.2g} ± {half:.1g}"


def curve(
    x: np.ndarray, numbers: Mapping[str, list[float | None]], scale: float = 1.0
) -> Curve:
    """Returns what a summary lists along an axis as a curve."""
    ends = (np.array(numbers[end], float) for end in Interval._fields)
    return Curve(x.astype(float), *(scale * end for end in ends))


def over_shares(by_rule: Summary, measure: str) -> dict[str, Curve]:
    """Returns a curve over the shares, which are the keys, for each rule."""
    scale = 100.0 if measure == "top1" else 1.0
    curves = {}
    for rule, by_share in by_rule.items():
        shares = 100 * np.array([float(share) for share in by_share])
        ends = {
            end: [numbers[end] for numbers in by_share.values()]
            for end in Interval._fields
        }
        curves[rule] = curve(shares, ends, scale)
    return curves
