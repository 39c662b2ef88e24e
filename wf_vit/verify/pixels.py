"""The protocol ``pixels``: does a map say which pixels an answer rests on?

Patches of the image are filled in the order of the map, in steps, and the model is
asked after every step. The rule, which published numbers often leave open:

- the image is filled in 10 steps of 10 % of the patches (their number rounded), and
  the image itself, as step 0, is a point of the curve, so that it has 11;
- the area under the curve is that of the trapezoids, with 0 to 1 as the share filled;
- a patch is filled with the mean colour of its image, or with the same patch of the
  blurred image (a Gaussian whose standard deviation is one patch);
- **deletion** fills the most important patches first and takes the probability of a
  class: lower is better. **Insertion** starts from the filled image and restores the
  most important first: higher is better. It passes through the same images as filling
  the least important first, read backwards, and has the same area;
- **positive perturbation** fills the most important first and takes whether the top-1
  is a class: lower is better. **Negative perturbation** fills the least important
  first: higher is better (Chefer et al., arXiv 2012.09838);
- the class is the one that the model predicts for the image, or the true one.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from wf_vit.errors import UsageError
from wf_vit.figures import evidence
from wf_vit.grid import Grid
from wf_vit.shapes import Images, Labels, Logits
from wf_vit.verify import report
from wf_vit.verify.maps import importance_maps, map_names
from wf_vit.verify.subject import (
    Case,
    Estimate,
    Outcomes,
    Subject,
    Summary,
    classify,
)

STEPS = 10
ORDERS = ("most important first", "least important first")
# What patches are filled with.
FILLS = ("mean", "blur")
# Each area by name: of which outcome, and which order of filling.
AREAS = {
    "deletion": ("probability", 0),
    "insertion": ("probability", 1),
    "positive perturbation": ("top1", 0),
    "negative perturbation": ("top1", 1),
}


class Pixels:
    """Patches of the image filled (`wf_vit.verify.subject.Protocol`)."""

    needs_head = True

    def __init__(self, subject: Subject, config: ml_collections.ConfigDict):
        """Asks for the true class, too, if the labels are the model's classes."""
        del config
        self._kinds = ("predicted", "true") if subject.labelled else ("predicted",)

    def measure(self, case: Case, count: int) -> Outcomes:
        """Returns the outcomes of `pixels` for all images of a batch."""
        del count  # The whole batch: one shape, traced once.
        model, params = case.subject.model, case.subject.params
        classes = {"predicted": case.whole.logits.argmax(-1), "true": case.labels}
        fills = (mean_filled(case.images), blurred(case.images, model.patch_size))
        return pixels(
            partial(classify, params, model=model),
            case.images,
            importance_maps(case, {kind: classes[kind] for kind in self._kinds}),
            dict(zip(FILLS, fills, strict=True)),
            grid=model.grid,
            labels=case.labels,
        )

    def summarize(self, outcomes: Outcomes, estimate: Estimate) -> Summary:
        """Returns areas and curves by class, area, map and fill."""
        names = map_names(self._kinds), FILLS

        def summary(of_curves):
            return {
                kind: {
                    area: report.nested(
                        estimate(of_curves(outcomes[f"{kind}_{name}"][..., order, :])),
                        *names,
                    )
                    for area, (name, order) in AREAS.items()
                }
                for kind in self._kinds
            }

        return {"auc": summary(auc), "curves": summary(lambda curves: curves)}

    def tables(self, summary: Summary, images: int) -> Iterator[str]:
        """Yields a table of the maps for each class and fill."""
        yield (
            f"**Pixels**, {images:,} images: area under the curve while patches are "
            "filled in the order of a map (rule: wf_vit/verify/pixels.py), in %. Lower "
            "is better for deletion and positive perturbation."
        )
        for kind, by_area in summary["auc"].items():
            for fill in FILLS:
                of_map = {
                    name: {area: by_map[name][fill] for area, by_map in by_area.items()}
                    for name in map_names([kind])
                }
                head = f"{kind} class, {fill} fill"
                yield report.rows(head, of_map, "top1", bold=False)

    def figures(self, summary: Summary) -> Iterator[tuple[str, Figure]]:
        """Yields a figure for each class and fill, with a panel for each area."""
        for kind, by_area in summary["curves"].items():
            maps = map_names([kind])
            for fill in FILLS:
                panels = {
                    area: {
                        name: report.curve(_shown(area), of_map[name][fill], 100.0)
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


def _shown(area: str) -> Float[np.ndarray, " points"]:
    """Returns the horizontal axis, in %: insertion is read backwards."""
    filled = 100 * np.arange(STEPS + 1) / STEPS
    return 100 - filled if area == "insertion" else filled


def auc(
    curve: Float[np.ndarray, "*conditions points"],
) -> Float[np.ndarray, "*conditions"]:
    """Returns the area of the trapezoids under curves over the share 0 to 1."""
    return np.asarray(np.trapezoid(curve, dx=1 / (curve.shape[-1] - 1), axis=-1))


def mean_filled(images: Images) -> Images:
    """Returns images of one colour each: their mean."""
    return jnp.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)


def blurred(images: Images, patch_size: tuple[int, int]) -> Images:
    """Returns images blurred by a Gaussian whose standard deviation is one patch.

    Beyond the image's border there is nothing: the weights within it are scaled up.
    """

    def kernel(side, deviation):
        offset = np.subtract.outer(np.arange(side), np.arange(side))
        weight = np.exp(-0.5 * (offset / deviation) ** 2)
        return (weight / weight.sum(1, keepdims=True)).astype(np.float32)

    rows, columns = map(kernel, images.shape[1:3], patch_size)
    return jnp.einsum("yr,brxc,zx->byzc", rows, images, columns)


def pixels(
    predict: Callable[[Images], Logits],
    images: Images,
    maps: Mapping[str, Float[Array, "B P"]],
    fills: Mapping[str, Images],
    *,
    grid: Grid,
    labels: Labels | None,
) -> Outcomes:
    """Fills images in the order of maps, and asks the model after every step.

    Args:
      predict: from images to logits.
      images: normalised.
      maps: importance of every patch, by name; ties go to the first patch.
      fills: what patches are filled with, by name: images of the same shape.
      grid: ``(GH, GW)``; it divides the images.
      labels: the true classes, or None.

    Returns:
      For each image, map, fill, order and step, ``[B, maps, fills, 2, 11]``:
      ``predicted_probability`` and ``predicted_top1`` of the class predicted for the
      unperturbed image, and with labels ``true_probability`` and ``true_top1``.

    Raises:
      UsageError: the grid does not divide the images, or a map has another size.
    """
    height, width = images.shape[1:3]
    patches = grid[0] * grid[1]
    if height % grid[0] or width % grid[1]:
        raise UsageError(
            f"Images of {height} x {width} pixels have no grid of {tuple(grid)} equal "
            "patches: pass the model's grid as (rows, columns)."
        )
    for name, importance in maps.items():
        if importance.shape[-1] != patches:
            raise UsageError(
                f"The map {name!r} has {importance.shape[-1]} patches, but the grid "
                f"{tuple(grid)} has {patches}: leave out the prefix tokens."
            )
    counts = [round(patches * step / STEPS) for step in range(STEPS + 1)]
    # What no order changes is asked once.
    start = predict(images)
    ends = {name: predict(fill) for name, fill in fills.items()}

    def curve(order: Int[Array, "B P"], name: str) -> Float[Array, "B points C"]:
        middle = [
            predict(_fill(images, fills[name], order, count, grid))
            for count in counts[1:-1]
        ]
        return jnp.stack([start, *middle, ends[name]], axis=1)

    logits = jnp.stack(
        [
            curve(jnp.argsort(sign * importance, axis=-1), name)
            for importance in maps.values()
            for name in fills
            for sign in (-1, 1)
        ],
        axis=1,
    )
    conditions = (len(maps), len(fills), len(ORDERS), STEPS + 1)
    classes = {"predicted": start.argmax(-1)}
    if labels is not None:
        classes["true"] = labels
    outcomes = {}
    for kind, wanted in classes.items():
        of_class = jnp.broadcast_to(wanted[:, None, None], logits.shape[:-1])
        probability = jnp.take_along_axis(
            jax.nn.softmax(logits), of_class[..., None], axis=-1
        )
        outcomes[f"{kind}_probability"] = probability[..., 0]
        outcomes[f"{kind}_top1"] = (logits.argmax(-1) == of_class).astype(jnp.float32)
    return {
        name: np.asarray(outcome).reshape(-1, *conditions)
        for name, outcome in outcomes.items()
    }


@partial(jax.jit, static_argnames="grid")
def _fill(
    images: Images, fill: Images, order: Int[Array, "B P"], count, grid: Grid
) -> Images:
    """Returns images with the first ``count`` patches of an order filled."""
    return fill_patches(images, fill, jnp.argsort(order, axis=-1) < count, grid)


@partial(jax.jit, static_argnames="grid")
def fill_patches(
    images: Images, fill: Images, chosen: Bool[Array, "B P"], grid: Grid
) -> Images:
    """Returns images with some patches replaced by those of other images."""
    chosen = chosen.reshape(-1, *grid)
    for axis, side in ((1, images.shape[1]), (2, images.shape[2])):
        chosen = jnp.repeat(chosen, side // chosen.shape[axis], axis=axis)
    return jnp.where(chosen[..., None], fill, images)
