"""From a checkpoint's arrays to the model they belong to."""

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from wf_vit.errors import UsageError
from wf_vit.models.pretrained import guards
from wf_vit.models.pretrained.embedding import (
    Parameters,
    join_embedding,
    patch_kernel,
)
from wf_vit.models.pretrained.hints import Hints
from wf_vit.models.pretrained.layouts import EVA02_ROPE, Layout
from wf_vit.models.pretrained.positions import Resampling
from wf_vit.models.pretrained.preprocess import ImageFormat
from wf_vit.models.pretrained.rename import (
    Arrays,
    choose,
    from_torch,
    rename,
    reorder_points,
    summary,
)
from wf_vit.models.vit import ViT

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in this package's terms.

    Attributes:
      model: as the checkpoint's names, shapes and hints say; its ``image_size`` is
        that of the position table.
      parameters: by flat name, before any change of size or head.
      origin: the checkpoint's own name of each, where there is one.
      resampling: how its library resizes the position table.
      image_format: how its images are prepared.
      leftover: see ``Preprocess``.
      class_names: of its head, where they are known.
    """

    model: ViT
    parameters: Parameters
    origin: dict[str, str]
    resampling: Resampling
    image_format: ImageFormat
    class_names: tuple[str, ...] = ()
    leftover: tuple[int, int] = (0, 0)


def infer(
    arrays: Arrays,
    hints: Hints,
    *,
    image_size: tuple[int, int] | None,
    num_heads: int | None,
    prefix: str | None = None,
) -> Checkpoint:
    """Renames a checkpoint's arrays and infers the model from them.

    Args:
      arrays: by the checkpoint's own names.
      hints: what the files beside it say; the tensors have precedence.
      image_size: that is wanted. Where no config says one, it may be the checkpoint's
        own; without a position table, it is.
      num_heads: has precedence over the hints.
      prefix: of the network that is meant, where there are several.

    Returns:
      The checkpoint. Whether its parameters fit the model is yet to be checked.

    Raises:
      UsageError: no known layout, or something that cannot be inferred.
    """
    layout, own = choose(arrays, prefix)
    guards.check_weights(own)
    renamed = rename(own, layout)
    # Convention, then what the config says, then what the tensors say.
    attributes = {**layout.model, **hints.model}
    if num_heads is not None:
        attributes["num_heads"] = num_heads
    if layout.torch:
        width = patch_kernel(renamed.arrays, "patches.weight").shape[0]
        heads = _head_count(width, layout, attributes.get("num_heads"))
        pool_heads = attributes.get("pool_heads") or heads
        renamed = from_torch(renamed, heads, pool_heads)
    parameters, embedding = join_embedding(
        renamed.arrays, attributes, wanted=image_size, given=hints.model
    )
    _fill_biases(parameters)
    attributes |= embedding | _blocks(parameters)
    check_depth(attributes["depth"], hints.model.get("depth"))
    attributes["rotary"] = _rotate(parameters, attributes, hints)
    attributes |= _readout(parameters, renamed.origin, attributes, layout)
    _announce(layout, hints, attributes, num_heads)
    leftover = attributes.pop("leftover")
    return Checkpoint(
        model=ViT(**attributes).validate(),
        parameters=parameters,
        origin=renamed.origin,
        resampling=layout.resampling,
        image_format=dataclasses.replace(layout.image_format, **hints.image_format),
        class_names=hints.class_names,
        leftover=leftover,
    )


def _announce(
    layout: Layout, hints: Hints, attributes: Mapping[str, Any], num_heads: int | None
) -> None:
    """Logs what was taken from convention, and how to replace it."""
    assumed = []
    if not hints.known:
        if layout.torch and num_heads is None:
            assumed.append(f"num_heads={attributes['num_heads']} (pass num_heads)")
        names = ["mlp", "norm_epsilon", "rotary"]
        names += ["pool"] if "pool" in layout.model else []
        if attributes["mlp"] == "swiglu":
            names = [name for name in names if name != "mlp"]
        assumed += [f"{name}={attributes[name]}" for name in names]
    if assumed:
        _LOG.warning(
            "Neither the tensors nor a config say it, so by the convention of the "
            "layout %r are taken: %s. Put the config.json beside the file, or change "
            "the model by clone, where they are others.",
            layout.name,
            ", ".join(assumed),
        )


def _head_count(width: int, layout: Layout, given: int | None) -> int:
    """Returns the number of heads: as given, or by convention for the width."""
    usual = layout.heads.get(width, max(width // layout.head_width, 1))
    heads = given or usual
    if width % heads:
        raise UsageError(
            f"{heads} heads do not divide the checkpoint's width of {width}: pass "
            "num_heads."
        )
    return heads


def _fill_biases(parameters: Parameters) -> None:
    """Adds biases of 0 where a model has none at all, in place.

    CLIP's patch embedding, the keys of BEiT and DINOv3, all of AIMv2. A bias that some
    blocks have and others lack stays missing.
    """
    kinds = {re.sub(r"^blocks_\d+", "blocks", name) for name in parameters}
    for name in list(parameters):
        if not re.search(
            r"(^|/)(patches|head|representation|query|key|value|out|up"
            r"|gate|down)/kernel$",
            name,
        ):
            continue
        bias = name.removesuffix("kernel") + "bias"
        kind = re.sub(r"^blocks_\d+", "blocks", bias)
        projections = [f"blocks/attention/{n}/bias" for n in ("query", "key", "value")]
        if kind in kinds or (kind in projections and not kinds & set(projections)):
            continue
        shape = parameters[name].shape
        per_head = name.split("/")[-2] in ("query", "key", "value")
        parameters[bias] = np.zeros(shape[1:] if per_head else shape[-1:], np.float32)


def _rotate(parameters: Parameters, attributes: Mapping[str, Any], hints: Hints) -> Any:
    """Returns the rotary positions, and orders channels of the parameters for them."""
    rope = attributes.get("rotary")
    first = rope is EVA02_ROPE and "rotary" not in hints.model
    if rope is None or (first and attributes["mlp"] != "swiglu"):
        # The first EVA has the names of EVA-02, but neither gates nor rotations.
        return None
    reorder_points(parameters, rope)
    if not rope.spans_table:
        return rope.rotary
    sides = zip(attributes["image_size"], attributes["patch_size"], strict=True)
    span = tuple(float(size // patch) for size, patch in sides)
    # Without a CLS token (PE-G) the first row is at 0.
    offset = rope.rotary.offset if attributes["cls_token"] else 0.0
    return dataclasses.replace(rope.rotary, span=span, offset=offset)


def _blocks(parameters: Parameters) -> dict[str, Any]:
    """Returns the attributes that the blocks imply."""
    in_blocks = [re.match(r"blocks_(\d+)/(.*)", name) for name in parameters]
    found = {match[2] for match in in_blocks if match}
    attributes = {
        "depth": count_blocks(parameters),
        "mlp_dim": _common_shape(parameters, "mlp/up/kernel")[-1],
        "num_heads": _common_shape(parameters, "attention/query/kernel")[1],
        "qkv_bias": any(f"attention/{x}/bias" in found for x in ("query", "value")),
    }
    if "mlp/gate/kernel" in found:
        attributes["mlp"] = "swiglu"
    attributes["mlp_inner_norm"] = "mlp/norm/scale" in found
    if not {"attention_norm/bias", "mlp_norm/bias"} & found:
        attributes["norm_kind"] = "rms"
    if found & {"attention_scale", "mlp_scale"}:
        attributes["layer_scale"] = 1.0
    return attributes


def check_depth(found: int, said: int | None) -> None:
    """Raises UsageError if the config says another depth than there is."""
    if said not in (None, found):
        raise UsageError(
            f"The config says that there are {said} layers, but the checkpoint has "
            f"{found} blocks: it is incomplete, or its last blocks are not used. "
            "Complete it, take these blocks out, or correct the config."
        )


def count_blocks(names: Iterable[str]) -> int:
    """Returns how many blocks there are, by the names of their parameters.

    Raises:
      UsageError: they are not numbered from 0 on without a gap.
    """
    matches = [re.match(r"blocks_(\d+)/", name) for name in names]
    numbers = {int(match[1]) for match in matches if match}
    odd = sorted(numbers - set(range(len(numbers))))
    if odd:
        missing = next(n for n in range(len(numbers)) if n not in numbers)
        raise UsageError(
            f"The checkpoint has parameters of blocks_{odd[-1]}, but none of "
            f"blocks_{missing}: expected are numbers from 0 on without a gap. It is "
            "incomplete, or damaged."
        )
    return len(numbers)


def _common_shape(parameters: Parameters, name: str) -> tuple[int, ...]:
    """Returns the shape that most blocks have: a single odd one is then found out."""
    shapes = Counter(
        array.shape
        for full_name, array in parameters.items()
        if re.fullmatch(rf"blocks_\d+/{name}", full_name)
    )
    if not shapes:
        raise UsageError(
            f"The checkpoint has no parameter that would be blocks_*/{name}: it is no "
            "vision transformer of a known form, or is incomplete."
        )
    return shapes.most_common(1)[0][0]


def _readout(
    parameters: Parameters,
    origin: Mapping[str, str],
    attributes: Mapping[str, Any],
    layout: Layout,
) -> dict[str, Any]:
    """Returns the attributes that the norms, the pooling and the head imply.

    What a classifier of the layout does without is taken out of the parameters.
    """
    readout = {"num_classes": 0, "normed_embedding": "none"}
    if "embedding_norm/scale" in parameters:
        # AIMv2 normalises its patches, CLIP all tokens.
        patches = re.search(r"rms_norm|patch", origin["embedding_norm/scale"])
        readout["normed_embedding"] = "patches" if patches else "tokens"
    pool = attributes.get("pool", "cls")
    if re.search(r"fc_norm|pooler\.layernorm", origin.get("norm/scale", "")):
        pool = attributes.get("pool", "mean")
        readout["pool_before_norm"] = True
    if not attributes["cls_token"]:
        pool = "mean"
    if "attention_pool/probe" in parameters:
        pool = "map"
    if "head/kernel" in parameters and layout.classifier:
        pool = layout.classifier["pool"]
        _leave(parameters, "attention_pool/")
        if not layout.classifier.get("final_norm", True):
            _leave(parameters, "norm/")
            readout["final_norm"] = False
    if pool == "map":
        _complete_query(parameters, attributes)
        up = parameters.get("attention_pool/mlp/up/kernel")
        hidden = 0 if up is None else up.shape[-1]
        readout["pool_mlp_dim"] = None if hidden == attributes["mlp_dim"] else hidden
    else:
        readout |= {"pool_heads": None, "pool_mlp_dim": None}
    if "representation/kernel" in parameters:
        readout["representation_size"] = parameters["representation/kernel"].shape[-1]
    if "head/kernel" in parameters:
        shape = parameters["head/kernel"].shape
        if len(shape) != 2:
            raise UsageError(
                f"The head, {origin.get('head/kernel')}, has the shape {shape}, "
                "expected two axes: load the checkpoint without it."
            )
        inputs, readout["num_classes"] = parameters["head/kernel"].shape
        if inputs == 2 * attributes["width"]:
            pool = "cls_mean"
    return {**readout, "pool": pool}


def _leave(parameters: Parameters, start: str) -> None:
    """Takes what the classifier does without out of the parameters."""
    names = [name for name in parameters if name.startswith(start)]
    for name in names:
        del parameters[name]
    if names:
        _LOG.info("Left out, as the classifier does not read it: %s.", summary(names))


def _complete_query(parameters: Parameters, attributes: Mapping[str, Any]) -> None:
    """Adds the query's projection where the probe itself is the query (AIMv2)."""
    name, width = "attention_pool/attention/query", attributes["width"]
    if f"{name}/kernel" not in parameters:
        heads = attributes.get("pool_heads") or attributes["num_heads"]
        eye = np.eye(width, dtype=np.float32).reshape(width, heads, -1)
        parameters[f"{name}/kernel"] = eye
        parameters[f"{name}/bias"] = np.zeros(eye.shape[1:], np.float32)
