"""From a file, folder, Hugging Face repository or module to arrays and hints."""

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wf_vit.errors import UsageError
from wf_vit.models.pretrained import guards
from wf_vit.models.pretrained.containers import arrays_in, bytes_in
from wf_vit.models.pretrained.files import read_npz, read_safetensors
from wf_vit.models.pretrained.hints import (
    Hints,
    hugging_face_hints,
    read_hints,
    read_json,
)
from wf_vit.models.pretrained.timm_config import module_hints, timm_hints

HUB = "hf://"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)
INDEX = "model.safetensors.index.json"
_LFS = b"version https://git-lfs"


def name_of(source: str | Path) -> str:
    """Returns what a checkpoint is called: its last part, without a file's suffix.

    Args:
      source: whatever ``pretrained.load`` opens by its name.
    """
    name = Path(source).name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return name


def read(path: Path, *, which: str | None) -> tuple[dict[str, np.ndarray], Hints]:
    """Reads a checkpoint.

    Args:
      path: a file (``SUFFIXES``), or a folder with one.
      which: see ``containers.arrays_in``.

    Returns:
      The arrays by name, and what the config files beside them say.

    Raises:
      UsageError: there is no such file, it cannot be read, or a package to read it is
        missing.
    """
    if not path.exists():
        raise UsageError(
            f"There is no checkpoint at {path}: give a file ({', '.join(SUFFIXES)}), "
            "a folder with one, or hf://owner/name."
        )
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = _weights_in(path)
    if path.name == INDEX:
        arrays = _read_shards(path)
    elif path.name.endswith(SUFFIXES):
        arrays = arrays_in(read_file(path), which=which)
    else:
        raise UsageError(f"{path} is none of {', '.join(SUFFIXES)}: convert it first.")
    return arrays, read_hints(folder, timm_hints)


def read_module(module: Any) -> tuple[dict[str, np.ndarray], Hints]:
    """Reads the weights and the config of a PyTorch module of timm or Hugging Face.

    Nothing is hooked into the module, and nothing of it is changed.

    Returns:
      As ``read``.
    """
    arrays = arrays_in(module.state_dict(), which=None)
    config = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        return arrays, hugging_face_hints(config.to_dict(), {})
    if isinstance(getattr(module, "pretrained_cfg", None), Mapping):
        return arrays, module_hints(module)
    return arrays, Hints()


def download(source: str) -> Path:
    """Downloads ``hf://owner/name`` or ``hf://owner/name@revision``, once.

    Raises:
      UsageError: huggingface_hub is not installed, or the repository out of reach.
    """
    match = re.fullmatch(HUB + r"([^/@]+/[^/@]+)(?:@(.+))?", source)
    if match is None:
        raise UsageError(f"{source!r} is not of the form hf://owner/name[@revision].")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            f"{source} needs huggingface_hub: pip install 'wf-vit[hub]', or download "
            "the repository by hand and give its folder."
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            match[1],
            revision=match[2],
            allow_patterns=[
                "config.json",
                "preprocessor_config.json",
                "model*",
                "pytorch_model.bin",
            ],
        )
    # The library raises its own, its HTTP client's and the system's exceptions.
    except Exception as error:
        raise UsageError(
            f"{source} could not be downloaded and is not in the cache: check the name "
            "and the network, or download the repository elsewhere and give its "
            f"folder. huggingface_hub says: {error}"
        ) from error
    return Path(folder)


def weights_in(folder: Path) -> list[Path]:
    """Returns the files of weights in a folder."""
    return sorted(f for f in folder.iterdir() if f.name.endswith(SUFFIXES))


def _weights_in(folder: Path) -> Path:
    """Returns the one file of weights in a folder."""
    names = ("model.safetensors", INDEX, "pytorch_model.bin")
    for name in names:
        if (folder / name).exists():
            return folder / name
    found = weights_in(folder)
    if len(found) != 1:
        listing = ", ".join(f.name for f in found) or "none"
        raise UsageError(
            f"{folder} holds no {', '.join(names)}, and not one checkpoint but "
            f"{len(found)} ({listing}): name the file."
        )
    return found[0]


def read_file(path: Path) -> Any:
    """Returns what a file of weights holds.

    Raises:
      UsageError: it is damaged, holds more than its size can, or is no file.
    """
    size = guards.regular_file(path)
    with guards.explained(
        f"{path} ({size:,} bytes)",
        "It is cut short, damaged or something else. Download it again.",
    ):
        with path.open("rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
        if pointer:
            raise UsageError(
                f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in "
                "its repository, or download the file itself."
            )
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        if path.suffix == ".npz":
            return read_npz(path)
        return _read_torch(path)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise UsageError(f"{index} has no weight_map: download it again.")
    guards.check_names([*names, *set(map(_as_name, names.values()))], index)
    files = sorted(set(names.values()))
    outside = [f for f in files if Path(f).name != f or not f.endswith(".safetensors")]
    if outside:
        raise UsageError(
            f"{index} names files outside of its folder, or that are no .safetensors: "
            f"{outside[:8]}. Download it again."
        )
    missing = [f for f in files if not (index.parent / f).exists()]
    if missing:
        raise UsageError(f"{index} names files that are not there: {missing[:8]}.")
    linked = [f for f in files if not guards.within(index.parent / f, index.parent)]
    if linked:
        raise UsageError(
            f"{index} names files that are links to outside of its folder: "
            f"{linked[:8]}. Where you trust them, copy them into the folder."
        )
    arrays = {}
    for file in files:
        part = read_file(index.parent / file)
        twice = sorted(arrays.keys() & part.keys())
        if twice:
            raise UsageError(
                f"{index} has {twice[0]} in two files, one of which is {file}: "
                "download it again."
            )
        arrays.update(part)
    return arrays


def _as_name(value: Any) -> Any:
    """Returns a text as it is, and something that can be shown for what is none."""
    return value if isinstance(value, str) else (repr(value)[:60],)


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"{path} needs PyTorch to be read: pip install torch, or save the state "
            "dict elsewhere with safetensors.torch.save_file."
        ) from error
    size = guards.regular_file(path)
    if zipfile.is_zipfile(path):
        guards.check_zip(path)
    # Training checkpoints hold arguments and counters; nothing of them is run.
    harmless = [
        argparse.Namespace,
        np.dtype,
        np._core.multiarray.scalar,
        *(type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # PyTorch raises pickle's error for what only unpickling could read.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise UsageError(
            f"{path} holds Python objects, not parameters alone, and wf_vit never runs "
            "the code in a file. Where you trust it, save its parameters: torch.save("
            f"model.state_dict(), path). (PyTorch says: {_first_line(error)})"
        ) from error
    # A tensor may repeat one number without end, by a stride of 0.
    guards.check_total(bytes_in(content), size, path)
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
