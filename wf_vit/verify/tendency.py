"""The protocol ``tendency``: do excess arrows tell about the photograph?

A displacement contains what geometry alone gives (`wf_vit.tendency`). Three nulls for
that part are compared on the same impact, that of the heads together:

- *fitted*: the stationary kernel that is fitted together with the popularity of the
  patches. It is what ``Field.excess`` is relative to;
- *mean kernel*: the mean of the impact over all pairs of equal offset, laid on the
  grid at the patch and normalised: simpler, and not chosen;
- *fitted, with popularity*: the kernel times the popularity, which also takes out the
  pull of patches that everyone hears.

A good null explains nothing of the excess that it leaves, and arrows of different
photographs are not alike. Besides: how much of a patch's impact the field that is drawn
holds, its mask, and the box of extents that was drawn before. And, on synthetic
impact, whether a tendency that was planted is found again.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from wf_vit import fields
from wf_vit.figures import Curve, evidence
from wf_vit.grid import Grid, coordinates, displacements, distances
from wf_vit.tendency import explained_share, tendency
from wf_vit.verify import report
from wf_vit.verify.subject import Case, Estimate, Outcomes, Subject, Summary

MASS = 0.5
FITTED = "fitted"
NULLS = (FITTED, "mean kernel", "fitted, with popularity")
# What is counted inside the box and inside the mask.
INSIDE = ("share of the impact", "share of the field's patches", "strongest patch")
REGIONS = ("box of extents", "mask")

# The synthetic impact: a stationary kernel times 1 + strength * bump at one patch.
_PLANTED_GRID: Grid = (16, 16)
_WIDTHS, _STRENGTHS, _TARGETS = (2.0, 5.0), (3.0, 30.0, 300.0), (17, 52, 136, 205)
_FLOOR, _BUMP = 0.02, 0.7


class Tendency:
    """Excess displacements of photographs (`wf_vit.verify.subject.Protocol`)."""

    needs_head = False

    def __init__(self, subject: Subject, config: ml_collections.ConfigDict):
        """Needs the grid only."""
        del config
        self._grid = subject.model.grid

    def measure(self, case: Case, count: int) -> Outcomes:
        """Returns arrows, and what box and mask hold, for all images of a batch.

        ``arrows`` are ``[B, 1 + nulls, L, P, 2]``, the displacement first;
        ``inside`` is ``[B, regions, 3, L]``.
        """
        del count  # The whole batch: one shape, traced once.
        impact = case.fused_impact
        total = impact.sum(-1, keepdims=True)
        # Who listens to no patch, such as those of the last layer where CLS is all that
        # counts, has itself alone as its field.
        impact = jnp.where(total > 0, impact, jnp.eye(impact.shape[-1]))
        field = fields.responsive_field(impact, self._grid, mass=MASS)
        share = impact / impact.sum(-1, keepdims=True)
        parts = tendency(share, self._grid)
        arrows = np.stack(
            [
                parts.displacement,
                parts.geometry,
                mean_kernel_geometry(np.asarray(impact), self._grid),
                parts.geometry + parts.popularity,
            ]
        )
        masks = np.stack([in_box(np.asarray(field.extents), self._grid), field.mask])
        inside = _inside(np.asarray(share), np.asarray(field.mask), masks)
        return {
            "arrows": np.moveaxis(arrows, 2, 0),
            "inside": np.moveaxis(inside, 3, 0),
        }

    def summarize(self, outcomes: Outcomes, estimate: Estimate) -> Summary:
        """Returns shares and correlations by null and layer, regions, plants."""
        displacement, *geometries = np.moveaxis(outcomes["arrows"], 1, 0)
        summary: Summary = {"raw_correlation": _correlations(displacement)}
        summary["nulls"] = {
            name: {
                "raw_share": _shares(displacement, geometry, estimate),
                "excess_share": _shares(displacement - geometry, geometry, estimate),
                "correlation": _correlations(displacement - geometry),
            }
            for name, geometry in zip(NULLS, geometries, strict=True)
        }
        summary["regions"] = report.nested(
            estimate(outcomes["inside"].mean(-1)), REGIONS, INSIDE
        )
        summary["planted"] = planted()
        return summary

    def tables(self, summary: Summary, images: int) -> Iterator[str]:
        """Yields the table of the nulls, that of the regions and that of the plants."""
        yield (
            f"**Tendency**, {images:,} images: displacements of the fields that hold "
            f"{100 * MASS:.0f} %, all layers. Shares are of squared arrow length, over "
            "all patches of an image and layer; correlations are between two images' "
            "arrows in the same layer."
        )
        raw = summary["raw_correlation"]
        head = [
            "null", "explains of the displacement: mean, least",
            "explains of the excess: mean, largest",
            "images correlate: mean, largest pair",
        ]  # fmt: skip
        lines = [["none", "", "", f"{raw['mean']:.2f}, {raw['largest']:.2f}"]]
        for name, of in summary["nulls"].items():
            before, after, pairs = of["raw_share"], of["excess_share"], "correlation"
            lines.append(
                [
                    name,
                    f"{before['over_all']:.2f}, {before['least']:.2f}",
                    f"{after['over_all']:.3f}, {after['largest']:.2f}",
                    f"{of[pairs]['mean']:.2f}, {of[pairs]['largest']:.2f}",
                ]
            )
        yield report.markdown(head, lines)
        yield "What a region of a patch holds, mean over layers and patches:"
        yield report.rows("region", summary["regions"], "", bold=False)
        yield (
            "A planted tendency: a stationary kernel (Gaussian of this width in "
            "patches, and a floor) times 1 + strength x bump at one patch. Slope of "
            "the excess against what was planted, and the error relative to it; "
            f"mean over {len(_TARGETS)} places of the bump, and the worst error."
        )
        yield report.markdown(
            ["kernel width", "strength", "slope", "error", "worst error"],
            [
                [f"{p['width']:g}", f"{p['strength']:g}"]
                + [f"{p[k]:.3f}" for k in ("slope", "error", "worst")]
                for p in summary["planted"]
            ],
        )

    def figures(self, summary: Summary) -> Iterator[tuple[str, Figure]]:
        """Yields one figure: what nulls explain, and correlations, over depth."""
        nulls = summary["nulls"]
        layers = np.arange(len(nulls[FITTED]["raw_share"]["mean"]))
        shares = {
            title: {name: report.curve(layers, of[key]) for name, of in nulls.items()}
            for title, key in (
                ("share, displacement", "raw_share"),
                ("share, excess", "excess_share"),
            )
        }
        pairs = {"displacement": summary["raw_correlation"]}
        pairs |= {name: of["correlation"] for name, of in nulls.items()}
        shares["correlation"] = {
            name: Curve(layers.astype(float), *[np.array(of["by_layer"], float)] * 3)
            for name, of in pairs.items()
        }
        yield "tendency", evidence(shares, "layer", own=(FITTED,))


def mean_kernel_geometry(
    impact: Float[np.ndarray, "*batch P P"], grid: Grid
) -> Float[np.ndarray, "*batch P 2"]:
    """Returns the centroids of the mean kernel, laid on the grid at each patch."""
    step = displacements(grid).astype(int)
    height, width = 2 * grid[0] - 1, 2 * grid[1] - 1
    place = (step[..., 1] + grid[0] - 1) * width + step[..., 0] + grid[1] - 1
    count = np.bincount(place.ravel(), minlength=height * width)
    found = []
    for matrix in impact.reshape(-1, *impact.shape[-2:]):
        total = np.bincount(place.ravel(), matrix.ravel(), minlength=height * width)
        rows = (total / np.maximum(count, 1))[place]
        rows /= rows.sum(-1, keepdims=True)
        found.append(np.einsum("ij,ijc->ic", rows, step))
    return np.reshape(found, (*impact.shape[:-1], 2)).astype(np.float32)


def in_box(
    extents: Float[np.ndarray, "*batch P 4"], grid: Grid
) -> Float[np.ndarray, "*batch P P"]:
    """Returns which patches' centres lie in the box of extents of each patch."""
    dx, dy = np.moveaxis(displacements(grid), -1, 0)
    left, top, right, bottom = np.moveaxis(extents[..., None], -2, 0)
    inside = (dx >= -left) & (dx <= right) & (dy >= -top) & (dy <= bottom)
    return inside.astype(np.float32)


def _inside(share, field, masks) -> Float[np.ndarray, "regions 3 L B"]:
    """Returns what each region holds, in the order of ``INSIDE``."""
    strongest = share.argmax(-1)[None, ..., None]
    strongest = np.broadcast_to(strongest, (*masks.shape[:-1], 1))
    held = (
        (share * masks).sum(-1),
        (field * masks).sum(-1) / field.sum(-1),
        np.take_along_axis(masks, strongest, -1)[..., 0],
    )
    return np.stack([part.astype(np.float32).mean(-1) for part in held], 1)


def _shares(arrows, by, estimate: Estimate) -> Summary:
    share = np.asarray(explained_share(jnp.asarray(arrows), jnp.asarray(by)))
    return report.nested(estimate(share)) | {
        "over_all": float(share.mean()),
        "least": float(share.min()),
        "largest": float(share.max()),
    }


def _correlations(arrows: Float[np.ndarray, "B L P 2"]) -> Summary:
    """Returns correlations of two images' arrows: by layer, their mean, the largest.

    Where all arrows of an image are 0 there is none; a layer without any has None.
    """
    count, depth = arrows.shape[:2]
    flat = arrows.reshape(count, depth, -1).swapaxes(0, 1)
    first, second = np.triu_indices(count, 1)
    if not len(first):
        return {"by_layer": [0.0] * depth, "mean": 0.0, "largest": 0.0}
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = np.stack([np.corrcoef(layer)[first, second] for layer in flat])
    there = [layer[np.isfinite(layer)] for layer in pairs]
    found = np.concatenate([*there, [] if any(map(len, there)) else [0.0]])
    return {
        "by_layer": [float(layer.mean()) if len(layer) else None for layer in there],
        "mean": float(found.mean()),
        "largest": float(found.max()),
    }


def planted() -> list[dict[str, float]]:
    """Returns how well a planted tendency is found again, by kernel and strength."""
    grid, apart = _PLANTED_GRID, distances(_PLANTED_GRID)
    step = displacements(grid)

    def centroids(rows):
        return np.einsum("ij,ijc->ic", rows / rows.sum(-1, keepdims=True), step)

    results = []
    for width in _WIDTHS:
        kernel = np.exp(-0.5 * np.square(apart / width)) + _FLOOR
        for strength in _STRENGTHS:
            slopes, errors = [], []
            for target in _TARGETS:
                off = coordinates(grid) - coordinates(grid)[target]
                bump = np.exp(-0.5 * np.square(off).sum(-1) / _BUMP**2)
                rows = kernel * (1 + strength * bump)
                true = centroids(rows) - centroids(kernel)
                share = rows / rows.sum(-1, keepdims=True)
                excess = np.asarray(tendency(jnp.asarray(share), grid).excess)
                slopes.append(float((excess * true).sum() / np.square(true).sum()))
                error = np.linalg.norm(excess - true) / np.linalg.norm(true)
                errors.append(float(error))
            results.append(
                {
                    "width": width,
                    "strength": strength,
                    "slope": float(np.mean(slopes)),
                    "error": float(np.mean(errors)),
                    "worst": max(errors),
                }
            )
    return results
