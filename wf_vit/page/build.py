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

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.colors import Colormap
from PIL import Image

from wf_vit.errors import UsageError
from wf_vit.figures.scales import AMOUNTS, SIGNED
from wf_vit.grid import Grid
from wf_vit.page import coding, content
from wf_vit.page.content import LENGTH_STEPS, ClassEffect, Indicator, Stack

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

    def levels(self, stack: Stack) -> int:
        return self.fused_levels if stack.kind == "fused" else self.heads_levels


def explorer(
    image: UInt8[np.ndarray, "height width 3"],
    indicators: Mapping[str, Indicator],
    grid: Grid,
    *,
    prefix: Sequence[str] = (),
    class_effect: ClassEffect | None = None,
    learned: Float[np.ndarray, "L H P 4"] | None = None,
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
      learned: a window-free transformer's learned fields, in patches: centre (x, y)
        relative to each patch, and widths in x and y.
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
    num_layers = content.check(indicators, class_effect, grid, prefix, learned)
    names = list(range(num_layers) if layers is None else layers)
    stacks = content.stacks_of(indicators, grid, mass, len(prefix))
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
            "lengthSteps": LENGTH_STEPS,
            "arrowSteps": content.arrow_steps(grid),
            "colors": {"amounts": _table(AMOUNTS), "signed": _table(SIGNED)},
            "indicators": notes,
        }
        if class_effect is not None:
            payload |= content.class_payload(class_effect, plan.kept, len(prefix))
            notes.append(content.class_note(class_effect, len(prefix)))
        if learned is not None:
            meta["learnedHeads"] = learned.shape[1]
            kept = coding.fixed_point(learned[list(plan.kept)], LENGTH_STEPS)
            payload["learned"] = coding.pack(kept)
        text = _assemble(meta, payload, picture)
        if len(text.encode()) <= max_bytes:
            return text
    raise UsageError(
        f"Not even one layer of {grid[0]} x {grid[1]} patches and "
        f"{len(indicators)} indicators fits into max_bytes={max_bytes}: raise "
        "max_bytes or pass fewer indicators."
    )


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


def _stored(stacks: Sequence[Stack], plan: _Plan) -> list[Stack]:
    """Returns all fused stacks, and the first per-head ones that the plan admits."""
    heads = [stack for stack in stacks if stack.kind == "heads"][: plan.with_heads]
    return [stack for stack in stacks if stack.kind == "fused" or stack in heads]


def _estimate(stacks: Sequence[Stack], plan: _Plan) -> float:
    """Returns about how many bytes a plan takes, from a band of rows."""
    total = 0.0
    for stack in stacks:
        rows = stack.share.shape[-2]
        band = slice(rows // 2, rows // 2 + max(rows // 12, 1))
        sample = stack.share[..., band, :][list(plan.kept)]
        packed = coding.pack(coding.encode(sample, plan.levels(stack)).codes)
        total += len(packed) * rows / sample.shape[-2]
    return total


def _payload(
    names: Sequence[str], stacks: Sequence[Stack], plan: _Plan
) -> tuple[dict[str, str], list[dict]]:
    """Returns packed arrays by id, and what the page says of each indicator."""
    kept = list(plan.kept)
    payload, notes = {}, [{"name": name, "stacks": {}} for name in names]
    for stack in stacks:
        exact = stack.share[kept]
        coded = coding.encode(exact, plan.levels(stack))
        parts = {"codes": coded.codes, "scales": coded.scales}
        parts |= {"given": stack.given[kept], "field": stack.field[:, kept]}
        parts["mask"] = stack.mask[kept]
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
            top = np.quantile(stack.share, 0.998) * stack.share.shape[-1]
            notes[stack.indicator]["top"] = max(10.0, float(f"{top:.1g}"))
    return payload, notes


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
