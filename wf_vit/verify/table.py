"""A summary as tables in Markdown."""

from collections.abc import Iterator, Mapping

import numpy as np

from wf_vit.verify.network import map_names
from wf_vit.verify.removal import OWN as REMOVAL_OWN
from wf_vit.verify.subject import FILLS
from wf_vit.verify.summary import Summary, best_layer, measured
from wf_vit.verify.windows import OWN

_NAMES = {
    "top1": "top-1 (%)",
    "cosine": "cosine of the pooled representation",
    "patch_cosine": "mean cosine of the patches that are there",
}


def table(results: Summary) -> str:
    """Returns the results as Markdown: a table for each protocol and measure.

    The best of each column is bold, and below each table stands where what is put to
    the test does not beat a control: where the interval of its margin, paired by
    image, reaches 0.
    """
    parts = [_heading(results)]
    sections = {
        "windows": _windows,
        "removal": _removal,
        "pixels": _pixels,
        "faithfulness": _faithfulness,
    }
    for protocol, section in sections.items():
        if protocol in results:
            parts += section(results[protocol], results["images"][protocol])
    return "\n\n".join(parts) + "\n"


def _heading(results: Summary) -> str:
    machine = results["machine"]
    text = f"`{results['command']}`. Mean over images ± half the 95 % interval of the "
    text += "bootstrap; margins are paired by image. "
    text += f"{machine['cpus']} CPU cores, device {machine['device']}."
    if "whole" in results:
        text += " Left alone, the model has a top-1 of "
        text += f"{_number(results['whole']['top1'], 'top1')} %."
    return text


def _windows(summary: Summary, images: int) -> Iterator[str]:
    yield (
        f"**Windows**, {images:,} images: attention between patches restricted, in all "
        "layers, to a share of the interactions."
    )
    for measure in measured(summary):
        by_rule = summary["measures"][measure]
        head = f"{_NAMES[measure]}, attention kept"
        yield _rows(head, by_rule, measure)
        yield _verdict(OWN, summary["margins"][measure], measure)


def _removal(summary: Summary, images: int) -> Iterator[str]:
    for measure in measured(summary):
        layer = summary["best_layer"][measure][REMOVAL_OWN[0]]
        yield (
            f"**Removal**, {images:,} images: a share of the patches gathered out "
            f"before layer {layer}, the one with the widest margin over the best "
            "control on these images; the figure shows the others."
        )
        by_rule = summary["measures"][measure][str(layer)]
        yield _rows(f"{_NAMES[measure]}, patches removed", by_rule, measure)
        for own in REMOVAL_OWN:
            yield _verdict(own, summary["margins"][measure][own][str(layer)], measure)
    if "milliseconds_per_image" in summary:
        yield _times(summary["milliseconds_per_image"], best_layer(summary))


def _times(by_batch: Mapping[str, Mapping[str, float]], layer: int) -> str:
    rows = []
    for batch_size, by_share in by_batch.items():
        whole = by_share["0"]
        cells = [f"{time:.3g} ({whole / time:.2f} x)" for time in by_share.values()]
        rows.append([f"batch {batch_size}", *cells])
    head = f"ms an image (speed-up), patches removed before layer {layer}"
    return _markdown([head, *map(_percent, by_share)], rows)


def _pixels(summary: Summary, images: int) -> Iterator[str]:
    yield (
        f"**Pixels**, {images:,} images: area under the curve while patches are filled "
        "in the order of a map (rule: wf_vit/verify/pixels.py), in %. Lower is "
        "better for deletion and positive perturbation."
    )
    for kind, by_area in summary["auc"].items():
        for fill in FILLS:
            of_map = {
                name: {area: by_map[name][fill] for area, by_map in by_area.items()}
                for name in map_names([kind])
            }
            yield _rows(f"{kind} class, {fill} fill", of_map, "top1", bold=False)


def _faithfulness(summary: Summary, images: int) -> Iterator[str]:
    yield (
        f"**Faithfulness**, {images:,} images: rank correlation of an indicator with "
        "what real cuts do, mean over layers."
    )
    targets = summary["mean"]
    of_indicator = {
        name: {f"effect on {target}": targets[target][name] for target in targets}
        for name in next(iter(targets.values()))
    }
    yield _rows("indicator", of_indicator, "correlation")


def _rows(head: str, table: Summary, measure: str, *, bold: bool = True) -> str:
    """Returns a table with a row for each rule, the best of each column bold."""
    columns = list(next(iter(table.values())))

    def mean(rule, column):
        value = table[rule][column]["mean"]
        return -np.inf if value is None else value

    best = {c: max(mean(rule, c) for rule in table) for c in columns}
    rows = []
    for rule in table:
        cells = [_number(table[rule][column], measure) for column in columns]
        marked = [
            f"**{cell}**" if bold and mean(rule, column) == best[column] else cell
            for cell, column in zip(cells, columns, strict=True)
        ]
        rows.append([rule, *marked])
    return _markdown([head, *map(_percent, columns)], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: str) -> str:
    """Returns a share, which is a key of the summary, in %; other names unchanged."""
    try:
        return f"{100 * float(share):g} %"
    except ValueError:
        return share


def _number(interval: Mapping[str, float | None], measure: str) -> str:
    if interval["mean"] is None:
        return ""
    half = (interval["high"] - interval["low"]) / 2
    if measure == "top1":
        return f"{100 * interval['mean']:.1f} ± {100 * half:.1f}"
    return f"{interval['mean']:.3f} ± {half:.3f}"


def _verdict(own: str, margins: Summary, measure: str) -> str:
    """Says at which shares the margin over every control is surely positive."""

    def listing(controls, share):
        return ", ".join(
            f"{control} ({_margin(margins[control][share], measure)})"
            for control in controls
        )

    parts = []
    for share in next(iter(margins.values())):
        failed = [c for c in margins if margins[c][share]["low"] <= 0]
        nearest = min(margins, key=lambda c, s=share: margins[c][s]["mean"])
        found = (
            f"does not beat {listing(failed, share)}"
            if failed
            else f"beats every control, the nearest is {listing([nearest], share)}"
        )
        parts.append(f"at {_percent(share)} it {found}")
    return f"{own.capitalize()}: {'; '.join(parts)}."


def _margin(interval: Mapping[str, float], measure: str) -> str:
    half = (interval["high"] - interval["low"]) / 2
    if measure == "top1":
        return f"{100 * interval['mean']:+.1f} ± {100 * half:.1f}"
    return f"{interval['mean']:+.2g} ± {half:.1g}"
