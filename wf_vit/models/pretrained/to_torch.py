"""What timm's and Hugging Face's layouts have in common: PyTorch's shapes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from wf_vit.errors import UsageError
from wf_vit.models.positions import sincos_positions
from wf_vit.models.vit import ViT

Arrays = dict[str, np.ndarray]

PROJECTIONS = ("query", "key", "value")


def refuse(layout: str, model: ViT, problems: Mapping[str, Any]) -> None:
    """Raises UsageError if a model has properties that a layout cannot hold.

    Args:
      layout: its name.
      model: the module.
      problems: more properties beside those that no library's ViT has, and whether
        the model has them.
    """
    problems = {
        f"fields ({type(model).__name__})": type(model) is not ViT,
        "rotary positions": model.rotary,
        "relative positions": model.relative_positions,
        "RMS norms": model.norm_kind != "layer",
        "a normalised embedding": model.normed_embedding != "none",
        "normalised hidden layers": model.mlp_inner_norm,
        "no final norm": not model.final_norm,
        **problems,
    }
    found = [name for name, problem in problems.items() if problem]
    if found:
        raise UsageError(
            f"The layout {layout!r} holds ViT, DeiT and DINOv2, but this model has "
            f"{', '.join(found)}: save it with layout='wf_vit', or change the model."
        )


def dense(theirs: str, ours: str, flat: Arrays) -> Arrays:
    """Returns one layer's arrays under PyTorch's names and in its shapes."""
    found = {}
    leaf = ours.rpartition("/")[2]
    for kind, name in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        array = flat.get(f"{ours}/{kind}")
        if array is None:
            continue
        if leaf in PROJECTIONS:
            array = array.reshape(*array.shape[:-2], -1)
        elif leaf == "out" and kind == "kernel":
            array = array.reshape(-1, array.shape[-1])
        found[f"{theirs}.{name}"] = array.T if kind == "kernel" else array
    return found


def stacked(theirs: str, ours: list[str], flat: Arrays) -> Arrays:
    """Returns several layers' arrays as one layer, one over the other."""
    parts = [dense("x", name, flat) for name in ours]
    return {
        f"{theirs}.{kind.removeprefix('x.')}": np.concatenate([p[kind] for p in parts])
        for kind in parts[0]
    }


def patches(theirs: str, flat: Arrays) -> Arrays:
    """Returns the patch embedding."""
    kernel = flat["patches/kernel"].transpose(3, 2, 0, 1)
    return {f"{theirs}.weight": kernel, f"{theirs}.bias": flat["patches/bias"]}


def positions(model: ViT, flat: Arrays, before: int) -> np.ndarray:
    """Returns the position table [1, before + P, D], of 0 for ``before`` tokens.

    The positions of our prefix tokens are part of the tokens.
    """
    rows = np.zeros((model.grid[0] * model.grid[1], model.width), np.float32)
    if model.positions == "learned":
        rows = flat["position_table"].reshape(rows.shape)
    elif model.positions != "none":
        rows = sincos_positions(model.grid, model.width, model.positions)
    zeros = np.zeros((before, model.width), np.float32)
    return np.concatenate([zeros, rows])[None]


def tokens(model: ViT, flat: Arrays, names: Mapping[str, str]) -> Arrays:
    """Returns the prefix tokens [1, count, D] under a library's names of each kind."""
    counts = {
        "cls": int(model.cls_token),
        "distillation": int(model.distillation_token),
        "registers": model.num_registers,
    }
    found, start = {}, 0
    for kind, count in counts.items():
        if count:
            found[names[kind]] = flat["prefix"][None, start : start + count]
            start += count
    return found
