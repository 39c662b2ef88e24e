"""The choice of interactions, layer by layer in the model that is already cut."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wf_vit.errors import UsageError
from wf_vit.interventions import Keep, attention_bias
from wf_vit.models.recording import Recording
from wf_vit.models.vit import ViT
from wf_vit.selection.yardstick import Yardstick, run_to, yardstick
from wf_vit.shapes import Images, Keys, Params, Tokens

# Keys are added one of so many that are there at a time.
_GROWTH = 8
# A query whose kept weights sum to less hands on nothing. Its square is no denormal.
_LEAST = 1e-12


def select_interactions(
    model: ViT,
    params: Params,
    images: Images,
    shares: Sequence[float],
    *,
    key: Keys,
    target: str = "tokens",
    num_probes: int = 8,
) -> tuple[Keep, ...]:
    """Chooses which interactions between patches to keep, per head, in all layers.

    The keys of each query are those whose renormalised mean is nearest to what the head
    hands on in the full model: added one after the other, or taken away from all, by
    what is nearer at that number of keys. How many a query gets is decided for all
    layers, heads and queries of an image at once, by what a further key gains. The
    layers are then cut in their order: each chooses anew in the model that is already
    cut before it, still towards the full model.

    It takes ``num_probes`` backward passes, three forward passes for each share, and
    searches that cost more than these (results/selection/README.md).

    Args:
      model: a ViT or a window-free transformer.
      params: its parameters.
      images: normalised images.
      shares: of the interactions between patches that are kept, each 1 / P to 1. A
        patch always keeps itself, which counts; prefix tokens are always kept, and do
        not count. The budget of an image is met exactly.
      key: randomness of the probes, as in `measure.propagate`.
      target: the output that is to stay, one of ``measure.OUTPUTS``.
      num_probes: of the metric, at least 1.

    Returns:
      For each share what is kept, ``[L, B, H, P, P]``, for
      `interventions.attention_bias`.

    Raises:
      UsageError: a share or target out of range, or images that do not fit the model.
    """
    patches = model.num_tokens - model.num_prefix_tokens
    for share in shares:
        if not 1 / patches <= share <= 1:
            raise UsageError(
                f"shares has {share}, expected 1 / P = {1 / patches:.3g} to 1: each of "
                f"the {patches} patches keeps at least the interaction with itself."
            )
    scale, recording = yardstick(model, params, images, target, key, num_probes)
    prefix, layers = model.num_prefix_tokens, range(model.depth)
    of_layer = [jax.tree.map(lambda x, n=n: x[n], scale) for n in layers]
    found = [
        _search(*_heads(recording, n), of_layer[n], num_prefix_tokens=prefix)
        for n in layers
    ]
    errors = jnp.stack([paths.errors.min(2) for paths in found])
    selected = []
    for share in shares:
        budget = round(share * model.depth * model.num_heads * patches**2)
        counts = _allocate(errors, budget)
        tokens, kept = run_to(params, images, model=model, layer=0), []
        for n in layers:
            seen = _record_layer(params, tokens, model=model, layer=n)
            paths = _search(*seen, of_layer[n], num_prefix_tokens=prefix)
            kept.append(_kept(paths, counts[n]))
            tokens = _run_layer(params, tokens, kept[n], model=model, layer=n)
        selected.append(jnp.stack(kept))
    return tuple(selected)


def _heads(
    recording: Recording, layer: int
) -> tuple[Float[Array, "B H N N"], Float[Array, "B H N K"]]:
    """Returns the attention and the values of one layer, heads in front."""
    return recording.attention[layer], recording.values[layer].swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def _record_layer(
    params: Params, tokens: Tokens, *, model: ViT, layer: int
) -> tuple[Float[Array, "B H N N"], Float[Array, "B H N K"]]:
    """Returns the attention and the values of a layer that is not cut."""
    _, out = model.apply(
        {"params": params},
        tokens,
        start=layer,
        stop=layer + 1,
        record=True,
        method="encode",
    )
    record = out["records"][layer]
    return record["attention"], record["values"].swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def _run_layer(
    params: Params,
    tokens: Tokens,
    keep: Bool[Array, "B H P P"],
    *,
    model: ViT,
    layer: int,
) -> Tokens:
    """Returns the residual stream after a layer that is cut."""
    bias = [None] * model.depth
    (bias[layer],) = attention_bias(
        keep[None], num_prefix_tokens=model.num_prefix_tokens
    )
    return model.apply(
        {"params": params},
        tokens,
        start=layer,
        stop=layer + 1,
        bias=bias,
        method="encode",
    )[0]


class _Paths(NamedTuple):
    """The order of the keys of each query on both paths, adding and taking away.

    Attributes:
      ranks: the place of each key; 0 of the patch itself.
      errors: squared, with as many keys as `_counts` says.
    """

    ranks: Int[Array, "*batch 2 P P"]
    errors: Float[Array, "*batch 2 P S"]


class _Means(NamedTuple):
    """The queries of one head, each with keys of its own, in the metric.

    Attributes:
      weights: attention.
      values: of the keys.
      wanted: what the mean is to be near to.
      distance: of each value to what each query wants, squared.
    """

    weights: Float[Array, "Q N"]
    values: Float[Array, "N K"]
    wanted: Float[Array, "Q K"]
    distance: Float[Array, "Q N"]

    @classmethod
    def of(cls, attention, values, wanted, root) -> "_Means":
        """Returns them in the metric of which that is the root."""
        values, wanted = values @ root, wanted @ root
        both = wanted @ values.T
        square = jnp.square(wanted).sum(-1, keepdims=True)
        distance = jnp.square(values).sum(-1)[None] - 2 * both + square
        return cls(attention, values, wanted, distance)

    def errors(
        self, kept: Bool[Array, "Q N"], sign: int
    ) -> tuple[Float[Array, "Q N"], Float[Array, " Q"]]:
        """Returns the squared error with each key added or taken away, and as it is.

        With r the sum over the keys of ``a_j (v_j - wanted)`` and s that of ``a_j``,
        it is ``|r|^2 / s^2``.

        Args:
          kept: the keys that are there.
          sign: 1 to add a key, -1 to take one away.
        """
        weights = jnp.where(kept, self.weights, 0.0)
        total = weights.sum(-1, keepdims=True)
        rest = weights @ self.values - total * self.wanted
        along = rest @ self.values.T - (rest * self.wanted).sum(-1, keepdims=True)
        square = jnp.square(rest).sum(-1, keepdims=True)
        change = self.weights * (2 * sign * along + self.weights * self.distance)
        # A query whose keys have no weight hands on nothing.
        nothing = jnp.square(self.wanted).sum(-1, keepdims=True)

        def relative(square, total):
            some = total > _LEAST
            divisor = jnp.where(some, total, 1.0)
            found = jnp.maximum(square, 0.0) / jnp.square(divisor)
            return jnp.where(some, found, nothing)

        changed = relative(square + change, total + sign * self.weights)
        return changed, relative(square, total)[:, 0]


@functools.partial(jax.jit, static_argnames="num_prefix_tokens")
def _search(
    attention: Float[Array, "B H N N"],
    values: Float[Array, "B H N K"],
    scale: Yardstick,
    *,
    num_prefix_tokens: int,
) -> _Paths:
    """Adds keys to each query of a layer, and takes keys away from it."""
    prefix = num_prefix_tokens
    patches = attention.shape[-1] - prefix
    own = jnp.pad(jnp.eye(patches, dtype=bool), [(0, 0), (prefix, 0)])
    always = own | (jnp.arange(patches + prefix) < prefix)[None]
    rows = jnp.arange(patches)[:, None]
    schedule = _schedule(patches)

    def of_head(head):
        attention, values, (wanted, root, gain) = head
        means = _Means.of(attention[prefix:], values, wanted[prefix:], root)

        def add(size, ranks, start):
            kept = ranks < patches
            errors, now = means.errors(kept, 1)
            _, best = lax.top_k(-jnp.where(kept, jnp.inf, errors), size)
            return ranks.at[rows, best].set(start + jnp.arange(size)[None]), now

        def take(size, ranks, start):
            kept = ranks == 0
            errors, _ = means.errors(kept, -1)
            _, best = lax.top_k(-jnp.where(kept & ~always, errors, jnp.inf), size)
            last = start + size - 1 - jnp.arange(size)[None]
            ranks = ranks.at[rows, best].set(last)
            return ranks, means.errors(ranks == 0, -1)[1]

        added, taken = jnp.where(always, 0, patches), jnp.zeros_like(own, int)
        adding, taking = [], []
        for size, starts in schedule:
            added, errors = lax.scan(functools.partial(add, size), added, starts)
            adding.append(errors)
        for size, starts in schedule[::-1]:
            of_size = functools.partial(take, size)
            taken, errors = lax.scan(of_size, taken, starts[::-1])
            taking.append(errors[::-1])
        # With all keys there is no error.
        none = jnp.zeros((1, patches))
        errors = [
            jnp.concatenate([*found, none]).T * gain[prefix:, None]
            for found in (adding, taking[::-1])
        ]
        ranks = [ranks[:, prefix:] for ranks in (added, taken)]
        return _Paths(jnp.stack(ranks), jnp.stack(errors))

    return lax.map(lambda image: lax.map(of_head, image), (attention, values, scale))


def _schedule(patches: int) -> list[tuple[int, np.ndarray]]:
    """Returns how many keys are added at a time, and the ranks of the first of each."""
    schedule, start = [], 1
    while start < patches:
        size = max(1, start // _GROWTH)
        size = min(1 << size.bit_length() - 1, patches - start)
        if schedule and schedule[-1][0] == size:
            schedule[-1][1].append(start)
        else:
            schedule.append((size, [start]))
        start += size
    return [(size, np.asarray(starts)) for size, starts in schedule]


@jax.jit
def _kept(paths: _Paths, counts: Int[Array, "B H P"]) -> Bool[Array, "B H P P"]:
    """Returns the first keys of each query, on the path that leads nearer."""
    patches = counts.shape[-1]
    last = jnp.searchsorted(_counts(patches), counts, side="right") - 1
    error = jnp.take_along_axis(paths.errors, last[:, :, None, :, None], -1)[..., 0]
    nearer = jnp.argmin(error, 2)[:, :, None, :, None]
    ranks = jnp.take_along_axis(paths.ranks, nearer, 2)[:, :, 0]
    return ranks < counts[..., None]


def _counts(patches: int) -> Int[Array, " S"]:
    """Returns how many keys there are before each step of the schedule, and at last."""
    starts = [starts for _, starts in _schedule(patches)]
    return jnp.asarray(np.concatenate([*starts, [patches]]))


@functools.partial(jax.jit, static_argnames="budget")
def _allocate(errors: Float[Array, "L B H P S"], budget: int) -> Int[Array, "L B H P"]:
    """Returns how many keys each query keeps, so that errors are least in their sum.

    Each query takes the number of keys at which ``error + price * keys`` is least; the
    price is searched for by halving, so that the budget of an image is met.
    """
    patches = errors.shape[-2]
    counts = _counts(patches)

    def of_image(errors):
        def at(log_price):
            prices = jnp.exp(log_price) * counts
            return counts[(errors + prices[None, None, None]).argmin(-1)]

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            over = at(middle).sum() > budget
            return jnp.where(over, middle, low), jnp.where(over, high, middle)

        low, high = lax.fori_loop(0, 40, halve, (-87.0, 87.0))
        # What is left goes to those that are next; last to those with no error.
        given = _deal(at(high), at(low), budget)
        return _deal(given, jnp.full_like(given, patches), budget)

    return lax.map(of_image, errors.swapaxes(0, 1)).swapaxes(0, 1)


def _deal(counts: Int[Array, "..."], most: Int[Array, "..."], budget: int) -> Array:
    """Returns the counts raised towards the most, first come, until a budget is met."""
    extra = jnp.maximum(most - counts, 0).ravel()
    left = budget - counts.sum()
    given = jnp.clip(left - (extra.cumsum() - extra), 0, extra)
    return counts + given.reshape(counts.shape)
