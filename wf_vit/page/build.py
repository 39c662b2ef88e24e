"""Arrays to one HTML page: what is embedded, how precisely, and the page's parts."""

import base64
import dataclasses
import hashlib
import html
import io
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int16, UInt8, UInt16
from matplotlib.colors import Colormap
from PIL import Image

from wf_vit import fields
from wf_vit.errors import UsageError
from wf_vit.figures.scales import AMOUNTS, SIGNED
from wf_vit.grid import Grid
from wf_vit.page import coding

# Lengths (extents and arrows) are stored in steps of 1/64 patch.
_LENGTH_STEPS = 64

# Levels for fused and for per-head interactions, most precise first. Fused ones keep
# theirs longer: they are fewer, and looked at first.
_PRECISIONS = (
    (255, 255),
    (255, 127),
    (255, 63),
    (127, 63),
    (127, 31),
    (63, 31),
    (31, 15),
    (15, 7),
)
_FUSED_ONLY = (255, 127, 63, 31, 15, 7)
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


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a page embeds.

    Attributes:
      kept: positions on the layer axis.
      fused_levels: precision of fused interactions.
      heads_levels: precision of per-head interactions.
      with_heads: how many of the indicators that have heads keep them.
    """

    kept: tuple[int, ...]
    fused_levels: int
    heads_levels: int = 0
    with_heads: int = 0


def explorer(
    image: UInt8[np.ndarray, "height width 3"],
    indicators: Mapping[str, Indicator],
    grid: Grid,
    *,
    prefix: Sequence[str] = (),
    class_effect: ClassEffect | None = None,
    extents: Float[np.ndarray, "L H P 4"] | None = None,
    layers: Sequence[int] | None = None,
    mass: float = 0.9,
    title: str = "Patch interactions",
    model: str = "",
    max_bytes: int = 25_000_000,
) -> str:
    """Builds the page.

    To stay within ``max_bytes`` it stores interactions less precisely, then leaves
    out the heads of the last indicators, then layers, in this order and no further
    than needed. The page says what it leaves out and how large the error is. Fields
    are measured before any rounding.

    Args:
      image: the image that the model saw.
      indicators: by name, in the order of the page's menu; all of the same layers.
      grid: ``(GH, GW)``.
      prefix: names of the prefix tokens, which come first in all interactions.
      class_effect: of a class, to be chosen from the menu, too.
      extents: a window-free transformer's learned extents to the left, top, right and
        bottom of every patch, in patches.
      layers: names of the layers, by default 0 to L - 1.
      mass: share of its impact that a patch's field holds.
      title: of the page.
      model: name of the model.
      max_bytes: size of the page at most.

    Returns:
      The page's HTML.

    Raises:
      UsageError: the arrays do not fit each other or the grid, hold negative or
        non-finite numbers, or not even one layer fits into ``max_bytes``.
    """
    num_layers = _check(indicators, class_effect, grid, prefix, extents)
    names = list(range(num_layers) if layers is None else layers)
    stacks = _stacks(indicators, grid, mass, len(prefix))
    picture = _data_uri(image)
    for plan in _plans(num_layers, sum(stack.kind == "heads" for stack in stacks)):
        stored = _stored(stacks, plan)
        # A page that is far too large need not be built to know that it is.
        if _estimate(stored, plan) + len(picture) > 1.1 * max_bytes:
            continue
        payload, notes = _payload(list(indicators), stored, plan)
        for stack in stacks:
            if stack not in stored:
                notes[stack.indicator]["omittedHeads"] = stack.share.shape[1]
        meta = {
            "title": title,
            "model": model,
            "grid": grid,
            "prefix": list(prefix),
            "mass": mass,
            "layers": [names[index] for index in plan.kept],
            "allLayers": names,
            "lengthSteps": _LENGTH_STEPS,
            "colors": {"amounts": _table(AMOUNTS), "signed": _table(SIGNED)},
            "indicators": notes,
        }
        if class_effect is not None:
            payload |= _class_payload(class_effect, plan, len(prefix))
            notes.append(_class_note(class_effect, len(prefix)))
        if extents is not None:
            meta["learnedHeads"] = extents.shape[1]
            # Beyond the grid's far side a longer extent changes nothing.
            kept = np.minimum(extents[list(plan.kept)], max(grid))
            payload["learned"] = coding.pack(coding.fixed_point(kept, _LENGTH_STEPS))
        text = _assemble(meta, payload, picture)
        if len(text.encode()) <= max_bytes:
            return text
    raise UsageError(
        f"Not even one layer of {grid[0]} x {grid[1]} patches and "
        f"{len(indicators)} indicators fits into max_bytes={max_bytes}: raise "
        "max_bytes or pass fewer indicators."
    )


def _check(indicators, class_effect, grid, prefix, extents) -> int:
    """Returns the number of layers that all arrays agree on."""
    if not indicators:
        raise UsageError("No indicator was given: pass at least one to show.")
    patches = grid[0] * grid[1]
    tokens = patches + len(prefix)
    num_layers = len(next(iter(indicators.values())).fused)

    def check(name: str, matrices: np.ndarray) -> None:
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
            check(f"{kind} impact of {name!r}", impact)
            if impact.min() < 0:
                raise UsageError(
                    f"{kind} impact of {name!r} is negative somewhere, expected "
                    "magnitudes: pass their absolute value, or signed effects on a "
                    "class as class_effect."
                )
    if class_effect is not None:
        check("The effect on a class", class_effect.effect)
    if extents is not None and (extents.shape[0], extents.shape[2]) != (
        num_layers,
        patches,
    ):
        raise UsageError(
            f"extents have the shape {extents.shape}, expected [L, H, P, 4] with "
            f"{num_layers} layers and {patches} patches."
        )
    return num_layers


@dataclasses.dataclass(frozen=True, eq=False)
class _Stack:
    """The shares of one indicator, fused or per head, and the fields in them.

    Attributes:
      indicator: its place in the menu.
      kind: "fused" or "heads".
      share: of all patches in what a token takes from patches; first the rows of the
        patches, then those of the prefix tokens.
      given: share of all that a token takes from the prefix tokens, in 65535ths.
      field: arrow of the excess, and area in patches.
    """

    indicator: int
    kind: str
    share: Float[np.ndarray, "L *heads N P"]
    given: UInt16[np.ndarray, "L *heads N T"]
    field: Int16[np.ndarray, "3 L *heads P"]

    def levels(self, plan: _Plan) -> int:
        return plan.fused_levels if self.kind == "fused" else plan.heads_levels


def _stacks(
    indicators: Mapping[str, Indicator], grid: Grid, mass: float, num_prefix: int
) -> list[_Stack]:
    stacks = []
    for index, indicator in enumerate(indicators.values()):
        for kind in ("fused", "heads"):
            impact = getattr(indicator, kind)
            if impact is None:
                continue
            rows = _patches_first(impact, num_prefix)
            share = coding.row_shares(rows[..., num_prefix:])
            field = getattr(indicator, f"{kind}_field")
            if field is None:
                patches = impact[..., num_prefix:, num_prefix:]
                field = _fields(patches, grid, mass)
            given = coding.row_shares(rows)[..., :num_prefix] if num_prefix else None
            given = np.zeros((*rows.shape[:-1], 0)) if given is None else given
            given = np.rint(65535 * given).astype(np.uint16)
            stacks.append(_Stack(index, kind, share, given, _coded(field)))
    return stacks


def _patches_first(matrices: np.ndarray, num_prefix: int) -> np.ndarray:
    """Returns matrices with the rows of the prefix tokens after those of patches."""
    return np.roll(matrices, -num_prefix, axis=-2) if num_prefix else matrices


def _fields(impact: np.ndarray, grid: Grid, mass: float) -> fields.Field:
    """Returns the responsive fields, measured layer by layer to bound the memory."""
    layers = [
        fields.responsive_field(jnp.asarray(layer), grid, mass=mass) for layer in impact
    ]
    return jax.tree.map(lambda *parts: np.stack(parts), *layers)


def _coded(field: fields.Field) -> Int16[np.ndarray, "3 L *heads P"]:
    arrow = coding.fixed_point(np.moveaxis(field.excess, -1, 0), _LENGTH_STEPS)
    area = np.asarray(field.area)[None] * field.area.shape[-1]
    return np.concatenate([arrow, coding.fixed_point(area, 1)])


def _plans(num_layers: int, with_heads: int) -> Iterator[_Plan]:
    """Yields what could be embedded, the best first."""
    for stride in range(1, num_layers + 1):
        # Counted from the last layer, which is looked at most.
        kept = tuple(range((num_layers - 1) % stride, num_layers, stride))
        for count in range(with_heads, 0, -1):
            for levels in _PRECISIONS:
                yield _Plan(kept, *levels, count)
        for levels in _FUSED_ONLY:
            yield _Plan(kept, levels)


def _stored(stacks: Sequence[_Stack], plan: _Plan) -> list[_Stack]:
    """Returns all fused stacks, and the first per-head ones that the plan admits."""
    heads = [stack for stack in stacks if stack.kind == "heads"][: plan.with_heads]
    return [stack for stack in stacks if stack.kind == "fused" or stack in heads]


def _estimate(stacks: Sequence[_Stack], plan: _Plan) -> float:
    """Returns about how many bytes a plan takes, from a band of rows."""
    total = 0.0
    for stack in stacks:
        rows = stack.share.shape[-2]
        band = slice(rows // 2, rows // 2 + max(rows // 12, 1))
        sample = stack.share[..., band, :][list(plan.kept)]
        packed = coding.pack(coding.encode(sample, stack.levels(plan)).codes)
        total += len(packed) * rows / sample.shape[-2]
    return total


def _payload(
    names: Sequence[str], stacks: Sequence[_Stack], plan: _Plan
) -> tuple[dict[str, str], list[dict]]:
    """Returns packed arrays by id, and what the page says of each indicator."""
    kept = list(plan.kept)
    payload, notes = {}, [{"name": name, "stacks": {}} for name in names]
    for stack in stacks:
        exact = stack.share[kept]
        coded = coding.encode(exact, stack.levels(plan))
        parts = {"codes": coded.codes, "scales": coded.scales}
        parts |= {"given": stack.given[kept], "field": stack.field[:, kept]}
        for part, array in parts.items():
            name = f"{stack.indicator}-{stack.kind}-{part}"
            payload[name] = coding.pack(array)
        notes[stack.indicator]["stacks"][stack.kind] = {
            "levels": coded.levels,
            "heads": 1 if stack.kind == "fused" else exact.shape[1],
            "errorBound": coded.error_bound(),
            "misplaced": float(0.5 * np.abs(coded.decode() - exact).sum(-1).mean()),
        }
        if stack.kind == "fused":
            # One colour scale for all layers and heads, in units of an even row.
            top = np.quantile(stack.share, 0.9995) * stack.share.shape[-1]
            notes[stack.indicator]["top"] = max(10.0, float(f"{top:.1g}"))
    return payload, notes


def _class_payload(of: ClassEffect, plan: _Plan, num_prefix: int) -> dict[str, str]:
    """Returns the packed arrays of signed effects: sizes, with a bit for the sign."""
    effect = _patches_first(of.effect[list(plan.kept)], num_prefix)[..., num_prefix:]
    size = np.abs(effect)
    largest = max(float(np.abs(of.effect).max()), 1e-30)
    coded = coding.encode(size / largest, _SIGNED_LEVELS)
    codes = coded.codes | np.where(effect < 0, 128, 0).astype(np.uint8)
    maps = np.concatenate([of.by_layer[list(plan.kept)], of.class_map[None]])
    steps = np.rint(32767 * maps / max(float(np.abs(maps).max()), 1e-30))
    return {
        "class-codes": coding.pack(codes),
        "class-scales": coding.pack(coded.scales),
        "class-maps": coding.pack(steps.astype(np.int16)),
    }


def _class_note(of: ClassEffect, num_prefix: int) -> dict:
    """Returns what the page says of a class, as the last entry of its menu."""
    patches = of.effect[..., num_prefix:, num_prefix:]

    def top(values: np.ndarray) -> float:
        return float(f"{np.quantile(np.abs(values), 0.99) or 1.0:.1g}")

    maps = np.abs(np.concatenate([of.by_layer, of.class_map[None]]))
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
        "mapLargest": float(maps.max()),
    }


def _data_uri(image: UInt8[np.ndarray, "height width 3"]) -> str:
    """Returns the image as PNG or JPEG, whichever is smaller."""
    files = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 92})):
        file = io.BytesIO()
        Image.fromarray(image).save(file, kind, **options)
        data = base64.b64encode(file.getvalue()).decode("ascii")
        files.append(f"data:image/{kind};base64,{data}")
    return min(files, key=len)


def _table(cmap: Colormap) -> str:
    """Returns 256 colours with their opacity, those of the figures."""
    table = cmap(np.linspace(0, 1, 256), bytes=True)
    return base64.b64encode(table.tobytes()).decode("ascii")


def _assemble(meta: dict, payload: Mapping[str, str], picture: str) -> str:
    """Fills the template; its policy admits this very script and style, no other."""
    files = resources.files("wf_vit.page")
    template, style, script = (
        files.joinpath(name).read_text(encoding="utf-8")
        for name in ("explorer.html", "explorer.css", "explorer.js")
    )
    # A "<" could end the script element that holds the text.
    blocks = {"meta": json.dumps(meta).replace("<", "\\u003c"), **payload}
    return string.Template(template).substitute(
        title=html.escape(meta["title"]),
        style=style,
        style_hash=_sha256(style),
        script=script,
        script_hash=_sha256(script),
        picture=picture,
        data="\n".join(
            f'<script type="text/plain" id="data-{name}">{text}</script>'
            for name, text in blocks.items()
        ),
    )


def _sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return base64.b64encode(digest).decode("ascii")
