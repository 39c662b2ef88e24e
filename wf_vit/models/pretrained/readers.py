"""From a file, folder or Hugging Face repository to arrays and hints."""

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from wf_vit.arrays import as_array
from wf_vit.errors import UsageError
from wf_vit.models.pretrained.preprocess import INTERPOLATIONS

HUB = "hf://"
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)
INDEX = "model.safetensors.index.json"

# The parameters of a training checkpoint lie under one of these; the teacher is what
# DINO and DINOv2 are evaluated with.
WRAPPERS = ("teacher", "state_dict", "model")

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
POOLINGS = {"token": "cls", "avg": "mean", "map": "map"}
# Pillow's numbers, which Hugging Face's files use.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the files beside the tensors say.

    Attributes:
      model: attributes of ``ViT``.
      image_format: arguments of ``preprocess.ImageFormat``.
      class_names: of the head.
    """

    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_format: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()


def read(path: Path) -> tuple[dict[str, np.ndarray], Hints]:
    """Reads a checkpoint.

    Args:
      path: a file (``SUFFIXES``), or a folder with one.

    Returns:
      The arrays by name, and what the config files beside them say.

    Raises:
      UsageError: there is no such file, or a package to read it is missing.
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
    elif path.suffix == ".safetensors":
        arrays = _read_safetensors(path)
    elif path.suffix == ".npz":
        arrays = _read_npz(path)
    elif path.suffix in TORCH_SUFFIXES:
        arrays = _read_torch(path)
    else:
        raise UsageError(f"{path} is none of {', '.join(SUFFIXES)}: convert it first.")
    return arrays, read_hints(folder)


def read_module(module: Any) -> tuple[dict[str, np.ndarray], Hints]:
    """Reads the weights and the config of a PyTorch module of timm or Hugging Face.

    Nothing is hooked into the module, and nothing of it is changed.

    Returns:
      As ``read``.
    """
    arrays = read_state(module.state_dict())
    config = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        return arrays, hugging_face_hints(config.to_dict(), {})
    images = getattr(module, "pretrained_cfg", None)
    if not isinstance(images, Mapping):
        return arrays, Hints()
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    heads = {
        block.attn.num_heads
        for block in getattr(module, "blocks", ())
        if hasattr(getattr(block, "attn", None), "num_heads")
    }
    arguments = {"num_heads": heads.pop()} if len(heads) == 1 else {}
    return arrays, timm_hints(
        {
            "pretrained_cfg": images,
            "model_args": arguments | ({"img_size": tuple(size)} if size else {}),
            "global_pool": getattr(module, "global_pool", None),
        }
    )


def read_state(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of a state dict, which may be wrapped as in a file.

    Raises:
      UsageError: there is no array in it.
    """
    arrays = {
        name: np.asarray(as_array(value, name))
        for name, value in unwrap(state).items()
        if hasattr(value, "shape")
    }
    if not arrays:
        raise UsageError(
            f"The state dict has no array but {sorted(map(str, state))[:5]}: pass the "
            "parameters of a model by name."
        )
    return arrays


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
            allow_patterns=["config.json", "preprocessor_config.json", "model*"],
        )
    # The library raises its own, its HTTP client's and the system's exceptions.
    except Exception as error:
        raise UsageError(
            f"{source} could not be downloaded and is not in the cache: check the name "
            "and the network, or download the repository elsewhere and give its "
            f"folder. huggingface_hub says: {error}"
        ) from error
    return Path(folder)


def _weights_in(folder: Path) -> Path:
    """Returns the one file of weights in a folder."""
    names = ("model.safetensors", INDEX, "pytorch_model.bin")
    for name in names:
        if (folder / name).exists():
            return folder / name
    found = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES)
    if len(found) != 1:
        listing = ", ".join(f.name for f in found) or "none"
        raise UsageError(
            f"{folder} holds no {', '.join(names)}, and not one checkpoint but "
            f"{len(found)} ({listing}): name the file."
        )
    return found[0]


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # NumPy finds bfloat16 because ml_dtypes is imported.
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    files = set(json.loads(index.read_text())["weight_map"].values())
    missing = sorted(f for f in files if not (index.parent / f).exists())
    if missing:
        raise UsageError(f"{index} names files that are not there: {missing}.")
    arrays = {}
    for file in sorted(files):
        arrays.update(_read_safetensors(index.parent / file))
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    # NumPy stores bfloat16 as two bytes without a type.
    return {
        name: a.view(ml_dtypes.bfloat16) if a.dtype == np.dtype("V2") else a
        for name, a in arrays.items()
    }


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"{path} needs PyTorch to be read: pip install torch, or save the state "
            "dict elsewhere with safetensors.torch.save_file."
        ) from error
    # DINO's training checkpoints hold their command-line arguments.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    return read_state(content)


def unwrap(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state dict in a (training) checkpoint; see ``WRAPPERS``."""
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return unwrap(content[wrapper])
    return dict(content)


def read_hints(folder: Path) -> Hints:
    """Reads ``config.json`` and ``preprocessor_config.json``, where they exist."""

    def content(name: str) -> dict[str, Any]:
        path = folder / name
        return json.loads(path.read_text()) if path.exists() else {}

    config = content("config.json")
    if "architecture" in config:
        return timm_hints(config)
    return hugging_face_hints(config, content("preprocessor_config.json"))


def timm_hints(config: Mapping[str, Any]) -> Hints:
    """Understands timm's ``config.json``."""
    images = config.get("pretrained_cfg", {})
    arguments = config.get("model_args", {})
    size = arguments.get("img_size", images.get("input_size", (None,))[1:])
    image_format = {key: tuple(images[key]) for key in ("mean", "std") if key in images}
    if images.get("interpolation") in INTERPOLATIONS:
        image_format["interpolation"] = images["interpolation"]
    if images.get("crop_mode") == "squash":
        image_format["crop"] = None
    elif "crop_pct" in images:
        image_format["crop"] = images["crop_pct"]
    model = {
        "num_heads": arguments.get("num_heads"),
        "pool": POOLINGS.get(config.get("global_pool")),
        "image_size": _pair(size),
    }
    return Hints(_said(model), image_format, tuple(config.get("label_names", ())))


def hugging_face_hints(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> Hints:
    """Understands Hugging Face's ``config.json`` and ``preprocessor_config.json``."""
    activation = config.get("hidden_act")
    if activation is not None and activation not in ACTIVATIONS:
        raise UsageError(
            f"config.json says hidden_act={activation!r}; a ViT of this package has "
            f"one of {', '.join(ACTIVATIONS)}."
        )
    image_format = {
        ours: tuple(preprocessor[theirs])
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if theirs in preprocessor
    }
    if preprocessor.get("resample") in RESAMPLE:
        image_format["interpolation"] = RESAMPLE[preprocessor["resample"]]
    if "size" in preprocessor:
        image_format["crop"] = _crop(preprocessor)
    model = {
        "num_heads": config.get("num_attention_heads"),
        "mlp": ACTIVATIONS.get(activation),
        "norm_epsilon": config.get("layer_norm_eps"),
        "image_size": _pair(config.get("image_size")),
    }
    return Hints(_said(model), image_format, _labels(config.get("id2label", {})))


def _labels(by_index: Mapping[Any, str]) -> tuple[str, ...]:
    """Returns Hugging Face's class names, unless they are its placeholders."""
    names = tuple(by_index[key] for key in sorted(by_index, key=int))
    placeholders = all(name == f"LABEL_{k}" for k, name in enumerate(names))
    return () if placeholders else names


def _said(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes that are known."""
    return {name: value for name, value in attributes.items() if value is not None}


def _crop(preprocessor: Mapping[str, Any]) -> float | None:
    """Returns the share that the central crop keeps, None where all is squashed."""

    def side(key: str) -> int:
        size = preprocessor[key]
        if isinstance(size, Mapping):
            return size.get("shortest_edge") or size["height"]
        return size

    if preprocessor.get("do_center_crop") and "crop_size" in preprocessor:
        return side("crop_size") / side("size")
    size = preprocessor["size"]
    keeps_aspect = isinstance(size, Mapping) and "shortest_edge" in size
    return 1.0 if keeps_aspect else None


def _pair(size) -> tuple[int, int] | None:
    """Returns a height and a width from one number, from two, or from nothing."""
    if not size:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
