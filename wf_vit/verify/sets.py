"""Sets of interactions to cut at once, of several kinds and of equal size.

A set is drawn for a share of the interactions between patches in the layers that are
cut: one layer, or all. A patch always keeps the interaction with itself, as in
`wf_vit.interventions`, so that no row is left without a key. Kinds that have a shape,
such as whole columns, come as near to the share as whole patches allow.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from wf_vit.grid import Grid, distances

# Drawn several times, and each once: what the scores choose, and what distance does.
DRAWN = ("random", "columns", "rows", "window", "object")
SCORES = ("impact", "attention")
CHOSEN = (
    "far",
    *(f"{end} {score}" for score in SCORES for end in ("least", "most")),
)


class DrawnSet(NamedTuple):
    """A set of interactions to cut.

    Attributes:
      kind: one of ``DRAWN`` and ``CHOSEN``.
      cut: the interactions of the set, in all layers of the model.
    """

    kind: str
    cut: Bool[np.ndarray, "L H P P"]


def draw(
    rng: np.random.Generator,
    impact: Float[np.ndarray, "L H P P"],
    attention: Float[np.ndarray, "L H P P"],
    *,
    share: float,
    grid: Grid,
    one_layer: bool,
    num_sets: int,
) -> Iterator[DrawnSet]:
    """Yields sets of one image, ``num_sets`` of each kind drawn, one of each chosen.

    - *random*: interactions drawn uniformly from all layers, heads and queries;
    - *columns*, *rows*: some patches that no other hears, or that hear no other;
    - *window*: a square of patches at a random place that no other hears;
    - *object*: a connected region that no other hears, grown over the patches with the
      greatest impact on others from the greatest one; from random ones after that;
    - *far*: everything farther than some distance;
    - *least* and *most*, by the propagated impact and by attention: one threshold over
      the layers, heads and queries.

    Args:
      rng: the randomness.
      impact: propagated, of the image.
      attention: between patches, of the image.
      share: of the interactions in the layers that are cut.
      grid: ``(GH, GW)``.
      one_layer: whether each set is in one layer, drawn for it, or in all.
      num_sets: of each kind that is drawn.
    """
    depth, heads, patches, _ = impact.shape
    own = np.eye(patches, dtype=bool)
    received = impact.sum((0, 1))
    strength = np.where(own, 0.0, received).sum(0)
    count = max(1, round(share * patches))
    side = min(max(1, round((share * patches) ** 0.5)), *grid)

    def region(kind, turn):
        chosen = np.zeros(patches, bool)
        if kind == "window":
            row, column = (rng.integers(cells - side + 1) for cells in grid)
            chosen.reshape(grid)[row : row + side, column : column + side] = True
        elif kind == "object":
            start = rng.integers(patches) if turn else strength.argmax()
            chosen = grown(strength, grid, count, int(start))
        else:
            chosen[rng.choice(patches, count, replace=False)] = True
        return chosen

    def cut(kind, layers, turn):
        shape = (len(layers), heads, patches, patches)
        if kind == "random":
            return lowest(rng.random(shape), share)
        if kind == "far":
            apart = distances(grid)
            return np.broadcast_to(apart > np.quantile(apart, 1 - share), shape)
        end, _, score = kind.partition(" ")
        if score:
            scores = impact[layers] if score == "impact" else attention[layers]
            return lowest(scores if end == "least" else -scores, share)
        chosen = region(kind, turn)
        chosen = chosen[:, None] if kind == "rows" else chosen[None]
        return np.broadcast_to(chosen & ~own, shape)

    turns = [(kind, turn) for turn in range(num_sets) for kind in DRAWN]
    for kind, turn in turns + [(kind, 0) for kind in CHOSEN]:
        layers = [int(rng.integers(depth))] if one_layer else list(range(depth))
        found = np.zeros(impact.shape, bool)
        found[layers] = cut(kind, layers, turn)
        yield DrawnSet(kind, found)


def lowest(
    scores: Float[np.ndarray, "layers H P P"], share: float
) -> Bool[np.ndarray, "layers H P P"]:
    """Returns the lowest scores, a share of all; never of a patch and itself."""
    patches = scores.shape[-1]
    count = min(round(share * scores.size), scores.size - scores.size // patches)
    flat = np.where(np.eye(patches, dtype=bool), np.inf, scores).ravel()
    found = np.zeros(scores.size, bool)
    if count:
        found[np.argpartition(flat, count - 1)[:count]] = True
    return found.reshape(scores.shape)


def grown(
    strength: Float[np.ndarray, " P"], grid: Grid, count: int, start: int
) -> Bool[np.ndarray, " P"]:
    """Returns a connected region: again and again its strongest neighbour is added.

    Args:
      strength: of each patch.
      grid: ``(GH, GW)``; patches that share a side are neighbours.
      count: patches of the region, 1 to P.
      start: the first of them.
    """
    region = np.zeros(grid, bool)
    region.flat[start] = True
    for _ in range(count - 1):
        near = np.zeros(grid, bool)
        near[1:] |= region[:-1]
        near[:-1] |= region[1:]
        near[:, 1:] |= region[:, :-1]
        near[:, :-1] |= region[:, 1:]
        outside = near.ravel() & ~region.ravel()
        region.flat[np.where(outside, strength, -np.inf).argmax()] = True
    return region.ravel()
