"""The protocol ``class_maps``: is the sum of first-order effects that of a removal?

The class map of a patch adds up, over layers and listeners, what its interactions add
to the logit of the predicted class, to first order. Here each patch is really removed,
one at a time, and the logit is read again:

- **cut off**: no other token hears the patch, in any layer: the map's own question;
- **gathered out**: its token is not there from the first layer on;
- **filled**: its pixels have the mean colour of the image.

The maps are compared with the three by Spearman's rank correlation over the patches of
each image. A map sees the class or not; controls are in ``wf_vit.verify.maps``.

Besides, SaCo (Wu et al., arXiv 2404.01415): the patches are sorted by the map into 10
groups, each group is filled with the image's mean colour, and every pair of groups
counts by the difference of their sums in the map: positively if the group with more
lowers the probability of the class at least as much, else negatively. 1: the map's
sizes are those of what happens; 0: they have nothing to do with it.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from wf_vit import measure
from wf_vit.interventions import gather_patches
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Labels, Logits, Params
from wf_vit.verify import report
from wf_vit.verify.faithfulness import rank_correlation
from wf_vit.verify.maps import importance_maps, map_names
from wf_vit.verify.pixels import fill_patches, mean_filled
from wf_vit.verify.subject import Case, Estimate, Outcomes, Subject, Summary, classify

KIND = "predicted"
REMOVALS = ("cut off", "gathered out", "filled")
GROUPS = 10
OWN = f"effect on {KIND} class"
# Other sums of the same effects: who listens, and whether the patch to itself.
VARIANTS = {
    "effect, patches only": (False, False),
    "effect, itself included": (True, True),
}
MAPS = (*map_names([KIND]), *VARIANTS)


class ClassMaps:
    """Class maps against real removal (`wf_vit.verify.subject.Protocol`)."""

    needs_head = True

    def __init__(self, subject: Subject, config: ml_collections.ConfigDict):
        """Needs the model only."""
        del subject, config

    def measure(self, case: Case, count: int) -> Outcomes:
        """Returns ``correlation [B, maps, removals]`` and ``saco [B, maps]``."""
        del count  # The whole batch: one shape, traced once.
        model, params = case.subject.model, case.subject.params
        classes = case.whole.logits.argmax(-1)
        maps = importance_maps(case, {KIND: classes}) | variants(case, classes)
        maps = {name: np.asarray(maps[name]) for name in MAPS}
        drops = removals(params, case.images, classes, model=model)
        stacked = np.stack(list(maps.values()), 1)
        correlation = [
            [rank_correlation(stacked[b], drops[how][b]) for how in REMOVALS]
            for b in range(len(stacked))
        ]
        predict = partial(classify, params, model=model)
        coefficients = [
            saco(predict, case.images, classes, importance, grid=model.grid)
            for importance in maps.values()
        ]
        return {
            "correlation": np.swapaxes(correlation, 1, 2),
            "saco": np.stack(coefficients, -1),
        }

    def summarize(self, outcomes: Outcomes, estimate: Estimate) -> Summary:
        """Returns both by map, and the margins of our map over those of others."""
        both = np.concatenate(
            [outcomes["correlation"], outcomes["saco"][..., None]], axis=-1
        )
        columns = (*REMOVALS, "SaCo")
        own = MAPS.index(OWN)
        others = [n for n, name in enumerate(MAPS) if name not in (OWN, *VARIANTS)]
        return {
            "measures": report.nested(estimate(both), MAPS, columns),
            "margins": report.nested(
                estimate(both[:, own, None] - both[:, others]),
                [MAPS[n] for n in others],
                columns,
            ),
        }

    def tables(self, summary: Summary, images: int) -> Iterator[str]:
        """Yields the table of the maps, and where ours is not ahead."""
        yield (
            f"**Class maps**, {images:,} images: rank correlation of maps with how far "
            "the logit of the predicted class falls when each patch is removed, and "
            "SaCo."
        )
        yield report.rows("map", summary["measures"], "")
        yield report.verdict(OWN, summary["margins"], "")

    def figures(self, summary: Summary) -> Iterator[tuple[str, Figure]]:
        """Yields none: the table says it all."""
        del summary
        return iter(())


def variants(case: Case, classes: Labels) -> dict[str, Float[Array, "B P"]]:
    """Returns the maps that add up other effects of the same interactions."""
    model = case.subject.model
    effect = measure.propagate_logit(
        model, case.subject.params, case.images, classes=classes, prefix_tokens=True
    ).sum(0)
    prefix = model.num_prefix_tokens
    own = jnp.diagonal(effect, axis1=-2, axis2=-1)
    found = {}
    for name, (with_prefix, itself) in VARIANTS.items():
        heard = (effect if with_prefix else effect[:, prefix:]).sum(-2)
        found[name] = (heard if itself else heard - own)[:, prefix:]
    return found


def removals(
    params: Params, images: Images, classes: Labels, *, model: ViT
) -> dict[str, Float[np.ndarray, "B P"]]:
    """Returns how far the logit of a class falls when each patch is removed.

    Args:
      params: the model's.
      images: normalised.
      classes: of each image.
      model: a classifier.

    Returns:
      By the names of ``REMOVALS``.
    """
    patches = model.grid[0] * model.grid[1]
    filled = mean_filled(images)
    before = _of_class(classify(params, images, model=model), classes)
    drops = {how: [] for how in REMOVALS}
    for patch in range(patches):
        after = (
            _cut_off(params, images, patch, model=model),
            _gathered_out(params, images, patch, model=model),
            _filled(params, images, filled, patch, model=model),
        )
        for how, logits in zip(REMOVALS, after, strict=True):
            drops[how].append(before - _of_class(logits, classes))
    return {how: np.stack(found, -1) for how, found in drops.items()}


def _of_class(logits: Logits, classes: Labels) -> Float[np.ndarray, " B"]:
    return np.asarray(jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0])


@partial(jax.jit, static_argnames="model")
def _cut_off(params: Params, images: Images, patch, *, model: ViT) -> Logits:
    """Returns the logits when no other token hears a patch."""
    token = patch + model.num_prefix_tokens
    tokens = jnp.arange(model.num_tokens)
    hidden = (tokens == token)[None, :] & (tokens != token)[:, None]
    bias = jnp.where(hidden, -jnp.inf, 0.0)[None, None]
    return model.apply({"params": params}, images, bias=[bias] * model.depth)[0]


@partial(jax.jit, static_argnames="model")
def _gathered_out(params: Params, images: Images, patch, *, model: ViT) -> Logits:
    """Returns the logits when a patch's token is not there."""
    variables = {"params": params}
    count = model.grid[0] * model.grid[1] - 1
    rest = jnp.arange(count)
    rest = jnp.broadcast_to(rest + (rest >= patch), (len(images), count))
    tokens = model.apply(variables, images, method="embed")
    tokens = gather_patches(tokens, rest, num_prefix_tokens=model.num_prefix_tokens)
    tokens, _ = model.apply(variables, tokens, patches=rest, method="encode")
    return model.apply(variables, tokens, method="readout")[0]


@partial(jax.jit, static_argnames="model")
def _filled(
    params: Params, images: Images, fill: Images, patch, *, model: ViT
) -> Logits:
    """Returns the logits when a patch's pixels are those of another image."""
    chosen = jnp.arange(model.grid[0] * model.grid[1]) == patch
    chosen = jnp.broadcast_to(chosen, (len(images), len(chosen)))
    filled = fill_patches(images, fill, chosen, model.grid)
    return model.apply({"params": params}, filled)[0]


def saco(
    predict: Callable[[Images], Logits],
    images: Images,
    classes: Labels,
    importance: Float[np.ndarray, "B P"],
    *,
    grid: tuple[int, int],
) -> Float[np.ndarray, " B"]:
    """Returns the salience-guided faithfulness coefficient of a map, from -1 to 1.

    Args:
      predict: from images to logits.
      images: normalised.
      classes: of each image.
      importance: the map.
      grid: ``(GH, GW)``.
    """
    fill = mean_filled(images)

    def probability(pixels: Images) -> np.ndarray:
        return _of_class(jax.nn.softmax(predict(pixels)), classes)

    rank = np.argsort(np.argsort(-importance, axis=-1, kind="stable"), axis=-1)
    group = rank * GROUPS // importance.shape[-1]
    before = probability(images)
    sums, falls = [], []
    for number in range(GROUPS):
        chosen = group == number
        sums.append((importance * chosen).sum(-1))
        filled = fill_patches(images, fill, jnp.asarray(chosen), grid)
        falls.append(before - probability(filled))
    sums, falls = np.stack(sums, -1), np.stack(falls, -1)
    first, second = np.triu_indices(GROUPS, 1)
    weight = sums[:, first] - sums[:, second]
    sign = np.where(falls[:, first] >= falls[:, second], 1.0, -1.0)
    total = np.abs(weight).sum(-1)
    return (weight * sign).sum(-1) / np.where(total > 0, total, 1.0)
