"""From a checkpoint's names and shapes to this package's."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping

import numpy as np

from wf_vit.errors import UsageError
from wf_vit.models.pretrained.layouts import LAYOUTS, Layout, Rope

_LOG = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]

# What the names of one network may have in front of them, in the order in which one
# is preferred where a file holds several: averages, then teachers, which are what
# self-distilled models are used by; last what is only there to train the others.
_PREFERRED = (
    r"ema|average",
    r"teacher|target",
    r"",
    r"student|momentum|predictor|decoder|opt|optimizer|mu|nu|grad|exp_avg",
)

# Within a network, what a ViT has no use for: the tokens, heads and decoders of masked
# and self-distilled pretraining, tables that follow from the grid, and the text half
# and the temperature of an image-text model.
IGNORED = re.compile(
    r"(.*[./])?(mask_token|periods|bias_mask|position_ids|relative_position_index)"
    r"|decoder(_\w+)?(\..*|$)|lm_head\..*|local_cls_norm\..*|projectors\..*"
    r"|head\.(mlp\.\d+|last_layer|\d+)\..*|(dino|ibot)_head\..*"
    r"|(.*\.)?rope(_embed)?\.(freqs_cos|freqs_sin|bands|periods|pos_embed\w*)"
    r"|text_model\..*|text_projection(\..*)?|logit_(scale|bias)"
    r"|txt/.*|t|b"
    r"|(optim\w*|opt|opt_state|criterion|(\w+_)?loss|\w*scheduler|ema)[./].*"
)

# Of what is not under the network's own prefix, what belongs to it all the same: its
# heads, and the final norm of BEiT's pretraining.
_BESIDE = re.compile(
    r"(classifier|cls_classifier|distillation_classifier|linear_head|head|fc"
    r"|visual_projection|layernorm)[./].*"
)

# Rows of one matrix that hold several projections, in their order.
FUSED = {
    "qkv": ("query", "key", "value"),
    "kv": ("key", "value"),
    "gate_up": ("gate", "up"),
}


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A checkpoint under this package's names.

    Attributes:
      arrays: ``blocks_0/attention/query/kernel`` and so on; still apart are the
        prefix tokens ``cls``, ``distillation``, ``registers`` and ``positions``.
        Names that no rule knows are left as they were.
      origin: the checkpoint's own name of each.
    """

    arrays: dict[str, np.ndarray]
    origin: dict[str, str]

    @classmethod
    def collect(cls, triples: Iterable[tuple[str, str, np.ndarray]]) -> "Renamed":
        """Collects (name, own name, array); raises UsageError if a name repeats."""
        renamed = cls({}, {})
        for name, own_name, array in triples:
            if name in renamed.origin:
                raise UsageError(
                    f"{renamed.origin[name]} and {own_name} of the checkpoint would "
                    f"both be {name}: remove the one that the model does not use."
                )
            renamed.arrays[name] = array
            renamed.origin[name] = own_name
        return renamed


def choose(arrays: Arrays, wanted: str | None) -> tuple[Layout, dict[str, np.ndarray]]:
    """Returns a checkpoint's layout, and the arrays of its one network.

    Args:
      arrays: by their own names.
      wanted: what stands before the names of the network that is meant; None to
        choose, where there are several, the one that is meant for use.

    Returns:
      The layout, and the arrays without what stands before their names. What is not of
      the network is left out; the log names it.

    Raises:
      UsageError: there is no network of a known layout, or which one is meant cannot
        be told.
    """
    prefixes = _prefixes(arrays)
    if not prefixes:
        some = ", ".join(sorted(arrays)[:8]) or "none"
        raise UsageError(
            "This is no vision transformer of a known layout: none of its "
            f"{len(arrays)} names is a patch embedding's. The first names are: {some}. "
            f"Known are {', '.join(dict.fromkeys(x.name for x in LAYOUTS))}."
        )
    prefix = _pick(prefixes, wanted)
    # Another network may lie deeper under the same name.
    deeper = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    whole = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix) and not (deeper and name.startswith(deeper))
    }
    parent = re.sub(r"[^./]+[./]$", "", prefix)
    beside = {
        name.removeprefix(parent): array
        for name, array in arrays.items()
        if prefix and name.startswith(parent) and _BESIDE.fullmatch(name[len(parent) :])
    }
    own = {
        name: array
        for name, array in (beside | whole).items()
        if array.ndim and not IGNORED.fullmatch(name)
    }
    used = {prefix + n for n in own} | {parent + n for n in own if n in beside}
    unused = [name for name in arrays if name not in used]
    if unused:
        _LOG.info("Left out, as not of the model: %s.", summary(unused))
    marks = [*whole, *(n for n in unused if not n.startswith(tuple(prefixes) or "/"))]
    for layout in LAYOUTS:
        if layout.anchor in own and _fits(layout, [*marks, *beside]):
            return layout, _masked(own, whole)
    raise AssertionError("The last layout of an anchor fits every checkpoint.")


def summary(names: Iterable[str], most: int = 6) -> str:
    """Returns names, those with the same first part as one, with their number."""
    groups = {}
    for name in sorted(names):
        groups.setdefault(re.split(r"[./]", name)[0], []).append(name)
    parts = [
        f"{first} ({len(group)} arrays)" if len(group) > 1 else group[0]
        for first, group in groups.items()
    ]
    rest = len(parts) - most
    return ", ".join(parts[:most]) + (f" and {rest} more" if rest > 0 else "")


def _prefixes(arrays: Arrays) -> list[str]:
    """Returns what stands before the patch embeddings in a checkpoint."""
    anchors = {layout.anchor for layout in LAYOUTS}
    found = {
        name.removesuffix(anchor)
        for name in arrays
        for anchor in anchors
        if name.endswith(anchor)
    }
    # A longer anchor may end in a shorter one.
    return sorted(p for p in found if not p or p[-1] in "./")


def _fits(layout: Layout, names: Iterable[str]) -> bool:
    def some(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    return all(map(some, layout.has)) and not any(map(some, layout.lacks))


def _pick(prefixes: list[str], wanted: str | None) -> str:
    """Returns the prefix of the network that is meant."""
    listing = ", ".join(repr(p) for p in prefixes)
    if wanted is not None:
        given = [p for p in prefixes if p.rstrip("./") == wanted.rstrip("./")]
        if not given:
            raise UsageError(
                f"prefix is {wanted!r}, but the networks of the checkpoint are under "
                f"{listing}: name one of those."
            )
        return given[0]

    def rank(prefix: str) -> int:
        parts = re.split(r"[./_]", prefix)
        for place, pattern in enumerate(_PREFERRED):
            if pattern and any(re.fullmatch(pattern, part) for part in parts):
                return place
        return _PREFERRED.index("")

    best = min(map(rank, prefixes))
    chosen = [p for p in prefixes if rank(p) == best]
    if len(chosen) > 1:
        raise UsageError(
            f"The checkpoint holds several networks, under {listing}: pass prefix= to "
            "name the one that is meant."
        )
    if len(prefixes) > 1:
        _LOG.warning(
            "The checkpoint holds networks under %s: %r is taken; pass prefix= for "
            "another.",
            listing,
            chosen[0],
        )
    return chosen[0]


def _masked(own: Arrays, whole: Arrays) -> dict[str, np.ndarray]:
    """Applies DINOv3's masks of biases: what is not 1 there (0, NaN) counts as 0."""
    masks = {name: whole.get(f"{name}_mask") for name in own}
    return {
        name: array if masks[name] is None else np.where(masks[name] == 1, array, 0)
        for name, array in own.items()
    }


def rename(arrays: Arrays, layout: Layout) -> Renamed:
    """Renames, unstacks and splits the arrays of one network; nothing is dropped."""

    def rename_one(name: str) -> str:
        for pattern, replacement in layout.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def triples():
        for own_name, array in arrays.items():
            if "/encoderblock/" in own_name:
                # Stacked layers, as big_vision's scan makes them.
                for layer, part in enumerate(array):
                    block = f"/encoderblock_{layer}/"
                    name = rename_one(own_name.replace("/encoderblock/", block))
                    yield name, own_name, part
            elif layout.torch:
                for name, part in _split(rename_one(own_name), array, arrays, own_name):
                    yield name, own_name, part
            else:
                yield rename_one(own_name), own_name, array

    return Renamed.collect(triples())


def _split(name: str, array: np.ndarray, arrays: Arrays, own_name: str):
    """Yields the projections that one PyTorch array holds, and their names."""
    module, _, kind = name.rpartition(".")
    scope, _, leaf = module.rpartition("/")
    # timm's packed SwiGLU: fc1 is twice as tall as fc2 is wide.
    if leaf == "up" and ".fc1." in own_name:
        down = arrays.get(re.sub(r"\.fc1\.\w+$", ".fc2.weight", own_name))
        if down is not None and array.shape[0] == 2 * down.shape[1]:
            leaf = "gate_up"
    parts = FUSED.get(leaf, ())
    if not parts or array.shape[0] % len(parts):
        yield name, array
        return
    for part_name, part in zip(parts, np.split(array, len(parts)), strict=True):
        yield f"{scope}/{part_name}.{kind}", part


def from_torch(renamed: Renamed, num_heads: int, pool_heads: int) -> Renamed:
    """Transposes PyTorch's arrays to Flax's, and splits projections into heads.

    Arrays whose shape does not allow it stay as they are: the comparison with the
    model lists them.

    Args:
      renamed: under this package's names.
      num_heads: of the blocks.
      pool_heads: of attention pooling.
    """

    def convert(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition("/")[2]
        heads = pool_heads if name.startswith("attention_pool") else num_heads
        per_head = leaf in ("query", "key", "value")
        if kind == "weight":
            kind = "scale" if array.ndim == 1 else "kernel"
            if array.ndim == 2:
                array = array.T
            elif array.ndim == 4:
                array = array.transpose(2, 3, 1, 0)
        if per_head and array.shape[-1] % heads == 0:
            array = array.reshape(*array.shape[:-1], heads, -1)
        elif leaf == "out" and kind == "kernel" and array.shape[0] % heads == 0:
            array = array.reshape(heads, -1, *array.shape[1:])
        return f"{module}/{kind}" if module else kind, array

    return Renamed.collect(
        (new_name, renamed.origin[name], new_array)
        for name, array in renamed.arrays.items()
        for new_name, new_array in [convert(name, array)]
    )


def reorder_points(arrays: dict[str, np.ndarray], rope: Rope) -> None:
    """Puts the channels of queries and keys in the order of ``Rotary``, in place."""
    for name, array in arrays.items():
        if re.fullmatch(r"blocks_\d+/attention/(query|key)/(kernel|bias)", name):
            order = np.arange(array.shape[-1])
            if rope.interleaved:
                order = np.concatenate([order[::2], order[1::2]])
            if rope.columns_first:
                # Quarters: first coordinates of columns, of rows, then the second.
                order = order.reshape(2, 2, -1)[:, ::-1].reshape(-1)
            arrays[name] = array[..., order]
