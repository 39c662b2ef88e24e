"""The patch embedding, the tokens before the patches, and the positions."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wf_vit.errors import UsageError
from wf_vit.grid import Grid
from wf_vit.models.pretrained.positions import split_positions
from wf_vit.models.pretrained.rename import Arrays

# In the order of the model's prefix.
PREFIX_TOKENS = ("cls", "distillation", "registers")

# By flat name, such as blocks_0/attention/query/kernel.
Parameters = dict[str, np.ndarray | jax.Array]


def patch_kernel(arrays: Arrays, name: str) -> np.ndarray:
    """Returns the kernel of the patch embedding; raises UsageError if it is linear."""
    kernel = arrays[name]
    if kernel.ndim != 4:
        raise UsageError(
            f"The patch embedding has the shape {kernel.shape}, expected that of a "
            "convolution over square or oblong patches. A linear one belongs to a "
            "model for images of any size (NaFlex): load the variant for one size."
        )
    return kernel


def join_embedding(
    arrays: Arrays,
    attributes: Mapping[str, Any],
    *,
    wanted: tuple[int, int] | None,
    given: Mapping[str, Any],
) -> tuple[Parameters, dict[str, Any]]:
    """Joins tokens and positions to ``prefix`` and ``position_table``.

    Args:
      arrays: renamed.
      attributes: by convention and config.
      wanted: the caller's image size.
      given: what a config says.

    Returns:
      The parameters, and the attributes of the model that they imply.
    """
    parameters = dict(arrays)
    kernel = patch_kernel(arrays, "patches/kernel").shape
    patch_size, width = kernel[:2], kernel[-1]

    def take(name: str) -> np.ndarray:
        array = parameters.pop(name)
        if array.shape[-1] != width:
            raise UsageError(
                f"The checkpoint's {name} have the shape {array.shape}; expected are "
                f"vectors of the patch embedding's width, {width}."
            )
        return array.reshape(-1, width).astype(np.float32)

    def grid_of(size: tuple[int, int] | None) -> Grid | None:
        return size and (size[0] // patch_size[0], size[1] // patch_size[1])

    tokens = {name: take(name) for name in PREFIX_TOKENS if name in parameters}
    # A distillation token that no head reads is a register.
    headless = "head/kernel" not in parameters
    distills = "distillation" in tokens and (
        headless or "head_distillation/kernel" in parameters
    )
    prefix = np.concatenate([np.zeros((0, width), np.float32), *tokens.values()])
    own_grid, wanted_grid = grid_of(given.get("image_size")), grid_of(wanted)
    found = {
        "patch_size": patch_size,
        "width": width,
        "cls_token": "cls" in tokens,
        "distillation_token": distills,
        "num_registers": len(prefix) - ("cls" in tokens) - distills,
        "positions": attributes.get("positions"),
        "relative_positions": False,
    }
    grid = None
    if "positions" in parameters:
        added, table = split_positions(
            take("positions"),
            num_prefix_tokens=len(prefix),
            grid=own_grid,
            wanted=wanted_grid,
        )
        prefix[: len(added)] += added
        parameters["position_table"] = table
        found["positions"] = "learned"
        grid = table.shape[:2]
    if any("relative_positions" in name for name in parameters):
        grid = _relative(parameters, own_grid or wanted_grid)
        found["relative_positions"] = True
    if found["positions"] is None:
        if not found["relative_positions"] and not attributes.get("rotary"):
            raise UsageError(
                "The checkpoint has no positions, and nothing says how its model knows "
                "them: put its config.json beside it."
            )
        found["positions"] = "none"
    if grid is None:
        size = given.get("image_size") or wanted or attributes.get("image_size")
        if size is None:
            raise UsageError(
                "The checkpoint has no position table, so its image size is unknown: "
                "pass image_size."
            )
        grid = (size[0] // patch_size[0], size[1] // patch_size[1])
    found["image_size"] = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    # SigLIP at 384 pixels: a convolution skips what is no whole patch.
    claimed = given.get("image_size") if grid == own_grid else None
    sizes = zip(claimed or found["image_size"], found["image_size"], strict=True)
    found["leftover"] = tuple(claim - own for claim, own in sizes)
    if tokens:
        parameters["prefix"] = prefix
    return parameters, found


def _relative(parameters: Parameters, grid: Grid | None) -> Grid:
    """Turns tables of displacements into ours, in place, and returns their grid."""
    shared = parameters.pop("relative_positions", None)
    if shared is not None:
        blocks = {name.partition("/")[0] for name in parameters}
        for block in (b for b in blocks if re.fullmatch(r"blocks_\d+", b)):
            parameters[f"{block}/relative_positions"] = shared
    for name in [n for n in parameters if n.endswith("/relative_positions")]:
        table = parameters.pop(name).astype(np.float32)
        if grid is None:
            side = (math.isqrt(len(table) - 3) + 1) // 2
            grid = (side, side)
        rows, columns = 2 * grid[0] - 1, 2 * grid[1] - 1
        if rows * columns + 3 != len(table):
            raise UsageError(
                f"The table of displacements has {len(table)} entries, but "
                f"{grid[0]} x {grid[1]} patches need {rows * columns + 3}: put the "
                "config.json with the checkpoint's own image_size beside it. The table "
                "cannot be resized."
            )
        scope = f"{name.partition('/')[0]}/attention/relative_positions"
        parameters[f"{scope}/table"] = table[:-3].reshape(rows, columns, -1)
        parameters[f"{scope}/prefix"] = table[-3:]
    return grid
