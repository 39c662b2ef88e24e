"""What a page holds: interactions as shares, their fields, and effects on a class."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int16, UInt8, UInt16

from wf_vit import fields
from wf_vit.errors import UsageError
from wf_vit.grid import Grid
from wf_vit.page import coding

# Lengths of learned fields are stored in steps of 1/64 patch.
LENGTH_STEPS = 64

# A signed effect keeps a bit for its sign.
_SIGNED_LEVELS = 127


@dataclasses.dataclass(frozen=True)
class Indicator:
    """One indicator's interactions in one image.

    Attributes:
      fused: impact of token j (column) on token i (row), non-negative; the prefix
        tokens come first.
      heads: the same for every head, or None.
      fused_field: the responsive fields of the patches in ``fused`` with the page's
        ``mass``, where they have been measured; None: they are measured here.
      heads_field: the same of ``heads``.
    """

    fused: Float[np.ndarray, "L N N"]
    heads: Float[np.ndarray, "L H N N"] | None = None
    fused_field: fields.Field | None = None
    heads_field: fields.Field | None = None


@dataclasses.dataclass(frozen=True)
class ClassEffect:
    """What the interactions in one image add to the logit of a class.

    Attributes:
      effect: of interaction i<-j, signed; the prefix tokens come first.
      class_map: what each patch adds in all.
      by_layer: the same in each layer.
      name: of the class.
      probability: that the model gives it.
    """

    effect: Float[np.ndarray, "L N N"]
    class_map: Float[np.ndarray, " P"]
    by_layer: Float[np.ndarray, "L P"]
    name: str
    probability: float


def check(
    indicators: Mapping[str, Indicator],
    class_effect: ClassEffect | None,
    grid: Grid,
    prefix: Sequence[str],
    learned: np.ndarray | None,
) -> int:
    """Returns the number of layers that all arrays agree on.

    Raises:
      UsageError: they do not fit each other or the grid, or hold what cannot be shown.
    """
    if not indicators:
        raise UsageError("No indicator was given: pass at least one to show.")
    patches = grid[0] * grid[1]
    tokens = patches + len(prefix)
    num_layers = len(next(iter(indicators.values())).fused)

    def fits(name: str, matrices: np.ndarray) -> None:
        if (len(matrices), *matrices.shape[-2:]) != (num_layers, tokens, tokens):
            raise UsageError(
                f"{name} has the shape {matrices.shape}, expected {num_layers} layers, "
                f"{len(prefix)} prefix tokens and grid {tuple(grid)} = {patches} "
                "patches: name the prefix tokens, or drop them, or correct the grid."
            )
        if not np.isfinite(matrices).all():
            raise UsageError(f"{name} is NaN or infinite somewhere: expected numbers.")

    for name, indicator in indicators.items():
        for kind in ("fused", "heads"):
            impact = getattr(indicator, kind)
            if impact is None:
                continue
            fits(f"{kind} impact of {name!r}", impact)
            if impact.min() < 0:
                raise UsageError(
                    f"{kind} impact of {name!r} is negative somewhere, expected "
                    "magnitudes: pass their absolute value, or signed effects on a "
                    "class as class_effect."
                )
    if class_effect is not None:
        fits("The effect on a class", class_effect.effect)
    if learned is not None and (learned.shape[0], learned.shape[2]) != (
        num_layers,
        patches,
    ):
        raise UsageError(
            f"learned has the shape {learned.shape}, expected [L, H, P, 4] with "
            f"{num_layers} layers and {patches} patches."
        )
    return num_layers


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """The shares of one indicator, fused or per head, and the fields in them.

    Attributes:
      indicator: its place in the menu.
      kind: "fused" or "heads".
      share: of all patches in what a token takes from patches; first the rows of the
        patches, then those of the prefix tokens.
      given: share of all that a token takes from the prefix tokens, in 65535ths.
      field: arrow of the excess, and area in patches.
      mask: of the fields, the bits of eight patches in a number.
    """

    indicator: int
    kind: str
    share: Float[np.ndarray, "L *heads N P"]
    given: UInt16[np.ndarray, "L *heads N T"]
    field: Int16[np.ndarray, "3 L *heads P"]
    mask: UInt8[np.ndarray, "L *heads P bytes"]


def stacks_of(
    indicators: Mapping[str, Indicator], grid: Grid, mass: float, num_prefix: int
) -> list[Stack]:
    """Returns the shares and fields of all indicators, of all heads together first."""
    stacks = []
    for index, indicator in enumerate(indicators.values()):
        for kind in ("fused", "heads"):
            impact = getattr(indicator, kind)
            if impact is None:
                continue
            rows = coding.over_largest(_patches_first(impact, num_prefix))
            share = coding.row_shares(rows[..., num_prefix:])
            field = getattr(indicator, f"{kind}_field")
            if field is None:
                patches = impact[..., num_prefix:, num_prefix:]
                field = _fields(patches, grid, mass)
            # Not `row_shares`: who takes nothing takes nothing from the prefix tokens.
            total = rows.sum(-1, keepdims=True)
            given = rows[..., :num_prefix] / np.where(total > 0, total, 1)
            given = np.rint(65535 * given).astype(np.uint16)
            mask = np.packbits(field.mask, axis=-1)
            coded = _coded(field, arrow_steps(grid))
            stacks.append(Stack(index, kind, share, given, coded, mask))
    return stacks


def arrow_steps(grid: Grid) -> int:
    """Returns the steps of a patch in which arrows are stored: none leaves the grid."""
    return 32767 // max(grid)


def _patches_first(matrices: np.ndarray, num_prefix: int) -> np.ndarray:
    """Returns matrices with the rows of the prefix tokens after those of patches."""
    return np.roll(matrices, -num_prefix, axis=-2) if num_prefix else matrices


def _fields(impact: np.ndarray, grid: Grid, mass: float) -> fields.Field:
    """Returns the responsive fields; those of heads layer by layer: memory is bounded.

    Those of all heads together as one image of a batch, for which an explanation has
    compiled its own.
    """
    if impact.ndim == 3:
        of_batch = jnp.asarray(impact)[:, None]
        found = fields.responsive_field(of_batch, grid, mass=mass)
        return jax.tree.map(lambda part: np.asarray(part)[:, 0], found)
    layers = [
        fields.responsive_field(jnp.asarray(layer), grid, mass=mass) for layer in impact
    ]
    return jax.tree.map(lambda *parts: np.stack(parts), *layers)


def _coded(field: fields.Field, steps: int) -> Int16[np.ndarray, "3 L *heads P"]:
    arrow = coding.fixed_point(np.moveaxis(field.excess, -1, 0), steps)
    area = np.asarray(field.area)[None] * field.area.shape[-1]
    return np.concatenate([arrow, coding.fixed_point(area, 1)])


def class_payload(
    of: ClassEffect, kept: Sequence[int], num_prefix: int
) -> dict[str, str]:
    """Returns the packed arrays of signed effects: sizes, with a bit for the sign."""
    effect = _patches_first(of.effect[list(kept)], num_prefix)[..., num_prefix:]
    size = np.abs(np.float32(effect))
    largest = float(np.abs(of.effect).max()) or 1.0
    coded = coding.encode(size / largest, _SIGNED_LEVELS)
    codes = coded.codes | np.where(effect < 0, 128, 0).astype(np.uint8)
    maps = np.concatenate([of.by_layer[list(kept)], of.class_map[None]])
    # Divided first: a large number times the steps is out of range.
    steps = np.rint(32767 * (np.float32(maps) / (_largest_in_maps(of) or 1.0)))
    return {
        "class-codes": coding.pack(codes),
        "class-scales": coding.pack(coded.scales),
        "class-maps": coding.pack(steps.astype(np.int16)),
    }


def class_note(of: ClassEffect, num_prefix: int) -> dict:
    """Returns what the page says of a class, as the last entry of its menu."""
    patches = of.effect[..., num_prefix:, num_prefix:]

    def top(values: np.ndarray) -> float:
        return float(f"{np.quantile(np.abs(values), 0.99) or 1.0:.1g}")

    return {
        "name": f"effect on {of.name} ({of.probability:.0%})",
        "className": of.name,
        "probability": of.probability,
        "stacks": {},
        "levels": _SIGNED_LEVELS,
        "largest": float(np.abs(of.effect).max()),
        "top": top(patches),
        "mapTop": top(of.class_map),
        "layerTop": top(of.by_layer),
        "mapLargest": _largest_in_maps(of),
    }


def _largest_in_maps(of: ClassEffect) -> float:
    """Returns the largest size in the maps of all layers, also of those not kept."""
    return float(max(np.abs(of.by_layer).max(), np.abs(of.class_map).max()))
