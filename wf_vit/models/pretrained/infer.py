"""From a checkpoint's arrays to the model they belong to."""

import dataclasses
import re
from collections import Counter
from typing import Any

import jax
import numpy as np

from wf_vit.errors import UsageError
from wf_vit.models.pretrained import layouts
from wf_vit.models.pretrained.positions import Resampling, split_positions
from wf_vit.models.pretrained.preprocess import ImageFormat
from wf_vit.models.pretrained.readers import Hints
from wf_vit.models.vit import ViT

# Published widths whose heads are not 64 wide, and their number of heads: ViT-H, the
# giant ViTs of Google, OpenCLIP and timm, and the shape-optimised 400M model.
HEADS_OF_WIDTH = {1152: 16, 1280: 16, 1408: 16, 1664: 16}

# In the order of the model's prefix.
PREFIX_TOKENS = ("cls", "distillation", "registers")

# By flat name, such as blocks_0/attention/query/kernel.
Parameters = dict[str, np.ndarray | jax.Array]


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
      class_names: of its head, where they are known.
    """

    model: ViT
    parameters: Parameters
    origin: dict[str, str]
    resampling: Resampling
    image_format: ImageFormat
    class_names: tuple[str, ...] = ()


def infer(
    arrays: layouts.Arrays,
    hints: Hints,
    *,
    image_size: tuple[int, int] | None,
    num_heads: int | None,
) -> Checkpoint:
    """Renames a checkpoint's arrays and infers the model from them.

    Args:
      arrays: by the checkpoint's own names.
      hints: what the files beside it say; the tensors have precedence.
      image_size: only used for a checkpoint without a position table.
      num_heads: has precedence over the hints.

    Returns:
      The checkpoint. Whether its parameters fit the model is yet to be checked.

    Raises:
      UsageError: no known layout, or something that cannot be inferred.
    """
    layout, prefix = layouts.detect(arrays)
    renamed = layouts.rename(arrays, layout, prefix)
    if layout.torch:
        width = renamed.arrays["patches.weight"].shape[0]
        heads = _head_count(width, num_heads or hints.model.get("num_heads"))
        renamed = layouts.from_torch(renamed, heads)
    parameters, embedding = _embedding(renamed.arrays, hints.model.get("image_size"))
    # Convention, then what the config says, then what the tensors say.
    attributes = {
        "mlp": layout.mlp,
        "norm_epsilon": layout.norm_epsilon,
        "image_size": image_size,
        **hints.model,
        **embedding,
        **_blocks(parameters),
    }
    attributes |= _readout(parameters, renamed.origin, attributes)
    if attributes["image_size"] is None:
        raise UsageError(
            "The checkpoint has no position table, so its image size is unknown: pass "
            "image_size."
        )
    return Checkpoint(
        model=ViT(**attributes).validate(),
        parameters=parameters,
        origin=renamed.origin,
        resampling=layout.resampling,
        image_format=dataclasses.replace(layout.image_format, **hints.image_format),
        class_names=hints.class_names,
    )


def _head_count(width: int, given: int | None) -> int:
    """Returns the number of heads: as given, or by convention for the width."""
    heads = given or HEADS_OF_WIDTH.get(width, max(width // 64, 1))
    if width % heads:
        raise UsageError(
            f"{heads} heads do not divide the checkpoint's width of {width}: pass "
            "num_heads."
        )
    return heads


def _embedding(
    arrays: layouts.Arrays, image_size: tuple[int, int] | None
) -> tuple[Parameters, dict[str, Any]]:
    """Joins tokens and positions to ``prefix`` and ``position_table``.

    Args:
      arrays: renamed.
      image_size: of the position table, if a config says so.

    Returns:
      The parameters, and the attributes of the model that they imply.
    """
    parameters = dict(arrays)
    kernel = parameters["patches/kernel"].shape
    if len(kernel) != 4:
        raise UsageError(
            f"The patch embedding's kernel has the shape {kernel}; expected is that of "
            "a convolution, (height, width, 3, D)."
        )
    patch_size, width = kernel[:2], kernel[-1]

    def take(name: str) -> np.ndarray:
        array = parameters.pop(name)
        if array.shape[-1] != width:
            raise UsageError(
                f"The checkpoint's {name} have the shape {array.shape}; expected are "
                f"vectors of the patch embedding's width, {width}."
            )
        return array.reshape(-1, width).astype(np.float32)

    tokens = {name: take(name) for name in PREFIX_TOKENS if name in parameters}
    # A distillation token that no head reads is a register.
    headless = "head/kernel" not in parameters
    distills = "distillation" in tokens and (
        headless or "head_distillation/kernel" in parameters
    )
    prefix = np.concatenate([np.zeros((0, width), np.float32), *tokens.values()])
    attributes = {
        "patch_size": patch_size,
        "width": width,
        "cls_token": "cls" in tokens,
        "distillation_token": distills,
        "num_registers": len(prefix) - ("cls" in tokens) - distills,
        "positions": "sincos",
    }
    if "positions" in parameters:
        added, table = split_positions(
            take("positions"),
            num_prefix_tokens=len(prefix),
            grid=image_size
            and (image_size[0] // patch_size[0], image_size[1] // patch_size[1]),
        )
        prefix[: len(added)] += added
        parameters["position_table"] = table
        attributes["positions"] = "learned"
        attributes["image_size"] = (
            table.shape[0] * patch_size[0],
            table.shape[1] * patch_size[1],
        )
    if tokens:
        parameters["prefix"] = prefix
    return parameters, attributes


def _blocks(parameters: Parameters) -> dict[str, Any]:
    """Returns the attributes that the blocks imply."""
    in_blocks = [re.match(r"blocks_(\d+)/(.*)", name) for name in parameters]
    found = {match[2] for match in in_blocks if match}
    attributes = {
        "depth": 1 + max((int(match[1]) for match in in_blocks if match), default=-1),
        "mlp_dim": _common_shape(parameters, "mlp/up/kernel")[-1],
        "num_heads": _common_shape(parameters, "attention/query/kernel")[1],
        "qkv_bias": any(f"attention/{x}/bias" in found for x in ("query", "value")),
    }
    if "mlp/gate/kernel" in found:
        attributes["mlp"] = "swiglu"
    if found & {"attention_scale", "mlp_scale"}:
        attributes["layer_scale"] = 1.0
    return attributes


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
    parameters: Parameters, origin: dict[str, str], attributes: dict[str, Any]
) -> dict[str, Any]:
    """Returns the attributes that the final norm, the pooling and the head imply."""
    readout = {"num_classes": 0}
    pool = attributes.get("pool", "cls")
    if "fc_norm" in origin.get("norm/scale", ""):
        pool = attributes.get("pool", "mean")
        readout["pool_before_norm"] = True
    if not attributes["cls_token"]:
        pool = "mean"
    if "attention_pool/probe" in parameters:
        pool = "map"
    if "representation/kernel" in parameters:
        readout["representation_size"] = parameters["representation/kernel"].shape[-1]
    if "head/kernel" in parameters:
        inputs, readout["num_classes"] = parameters["head/kernel"].shape
        if inputs == 2 * attributes["width"]:
            pool = "cls_mean"
    return {**readout, "pool": pool}
