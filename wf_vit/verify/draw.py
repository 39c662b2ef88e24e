"""A summary as figures."""

from collections.abc import Iterator, Mapping

import numpy as np
from matplotlib.figure import Figure

from wf_vit.figures import Curve, evidence
from wf_vit.verify.network import map_names
from wf_vit.verify.pixels import STEPS
from wf_vit.verify.removal import OWN as REMOVAL_OWN
from wf_vit.verify.removal import RULES as REMOVAL_RULES
from wf_vit.verify.subject import FILLS
from wf_vit.verify.summary import Summary, measured
from wf_vit.verify.windows import OWN, RULES

_TITLES = {
    "top1": "top-1 (%)",
    "cosine": "cosine, pooled",
    "patch_cosine": "cosine, patches",
}


def drawings(results: Summary) -> Iterator[tuple[str, Figure]]:
    """Yields the name and the figure of everything that is drawn."""
    figures_of = {
        "windows": _windows,
        "removal": _removal,
        "pixels": _pixels,
        "faithfulness": _faithfulness,
    }
    for protocol, draw in figures_of.items():
        if protocol in results:
            yield from draw(results[protocol])


def _windows(summary: Summary) -> Iterator[tuple[str, Figure]]:
    measures = summary["measures"]
    panels = {
        _TITLES[measure]: _over_shares(measures[measure], measure)
        for measure in measured(summary)
    }
    figure = evidence(panels, "interactions kept (%)", own=(OWN,), aside=RULES[-1:])
    yield "windows", figure


def _removal(summary: Summary) -> Iterator[tuple[str, Figure]]:
    for measure in measured(summary):
        panels = {
            f"before layer {layer}": _over_shares(by_rule, measure)
            for layer, by_rule in summary["measures"][measure].items()
        }
        figure = evidence(
            panels,
            "patches removed (%)",
            own=REMOVAL_OWN,
            aside=REMOVAL_RULES[-1:],
            ylabel=_TITLES[measure],
        )
        yield f"removal_{measure}", figure


def _pixels(summary: Summary) -> Iterator[tuple[str, Figure]]:
    for kind, by_area in summary["curves"].items():
        maps = map_names([kind])
        for fill in FILLS:
            panels = {
                area: {
                    name: _curve(_shown(area), of_map[name][fill], 100.0)
                    for name in maps
                }
                for area, of_map in by_area.items()
            }
            figure = evidence(
                panels,
                "patches filled or shown (%)",
                ylabel=f"{kind} class (%)",
                own=maps[:2],
            )
            yield f"pixels_{kind}_{fill}", figure


def _shown(area: str) -> np.ndarray:
    """Returns the horizontal axis, in %: insertion is read backwards."""
    filled = 100 * np.arange(STEPS + 1) / STEPS
    return 100 - filled if area == "insertion" else filled


def _faithfulness(summary: Summary) -> Iterator[tuple[str, Figure]]:
    panels = {
        f"effect on {target}": {
            name: _curve(np.arange(len(numbers["mean"])), numbers)
            for name, numbers in of_indicator.items()
        }
        for target, of_indicator in summary["by_layer"].items()
    }
    figure = evidence(panels, "layer", ylabel="rank correlation", own=("propagated",))
    yield "faithfulness", figure


def _over_shares(by_rule: Summary, measure: str) -> dict[str, Curve]:
    """Returns a curve over the shares, which are the keys, for each rule."""
    scale = 100.0 if measure == "top1" else 1.0
    curves = {}
    for rule, by_share in by_rule.items():
        shares = 100 * np.array([float(share) for share in by_share])
        ends = {
            end: [numbers[end] for numbers in by_share.values()]
            for end in ("mean", "low", "high")
        }
        curves[rule] = _curve(shares, ends, scale)
    return curves


def _curve(
    x: np.ndarray, numbers: Mapping[str, list[float | None]], scale: float = 1.0
) -> Curve:
    ends = (np.array(numbers[end], float) for end in ("mean", "low", "high"))
    return Curve(x.astype(float), *(scale * end for end in ends))
