"""Models as files: in the layout of timm or of Hugging Face, or in our own.

What a library's model computes otherwise is refused, so that the file opens there with
equal outputs. Our own layout holds every model: its parameters by our names, and its
attributes in config.json.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from wf_vit import settings
from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.checks import MOST_PIXELS
from wf_vit.models.pretrained import guards
from wf_vit.models.pretrained.hints import read_json
from wf_vit.models.pretrained.infer import Checkpoint
from wf_vit.models.pretrained.positions import TORCH_CUBIC_ANTIALIAS, Resampling
from wf_vit.models.pretrained.preprocess import HALF, ImageFormat, Preprocess
from wf_vit.models.pretrained.readers import read_file
from wf_vit.models.pretrained.to_hugging_face import to_hugging_face
from wf_vit.models.pretrained.to_timm import to_timm
from wf_vit.models.vit import ViT
from wf_vit.settings import Setting
from wf_vit.shapes import Params

# The key of config.json that marks our own layout, and its version.
OWN, VERSION = "wf_vit", 1
WEIGHTS = "model.safetensors"
LAYOUTS = ("timm", "hf", OWN)

_LEFTOVER = {
    "leftover": Setting((0, 0), "pixels", items=int, length=2, low=0, high=MOST_PIXELS)
}


def save(
    model: ViT,
    params: Params,
    path: str | Path,
    *,
    layout: str = OWN,
    preprocess: Preprocess | None = None,
    class_names: tuple[str, ...] = (),
    resampling: Resampling = TORCH_CUBIC_ANTIALIAS,
) -> Path:
    """Saves a model as a folder of ``model.safetensors`` and its configs.

    Args:
      model: the module.
      params: its parameters.
      path: the folder; what it holds of these names is replaced.
      layout: "timm", which ``timm.create_model("local-dir:PATH", pretrained=True)``
        opens; "hf", for ``from_pretrained`` of transformers; or "wf_vit", for
        ``pretrained.load`` alone. ViT, DeiT and DINOv2, with or without registers,
        have the first two; every model has the last.
      preprocess: of its images; None leaves the image format out ("timm", "hf"), or
        says that images lie in [-1, 1] and are not cropped ("wf_vit").
      class_names: C names, or none.
      resampling: how position tables are resized, for "wf_vit".

    Returns:
      The folder.

    Raises:
      UsageError: an unknown layout, or a model that the layout cannot hold.
    """
    if layout not in LAYOUTS:
        raise UsageError(
            f"The layout is {layout!r}: choose one of {', '.join(LAYOUTS)}."
        )
    flat = {
        name: np.asarray(array, np.float32)
        for name, array in traverse_util.flatten_dict(params, sep="/").items()
    }
    if layout == "timm":
        arrays, configs = to_timm(model, flat, preprocess, class_names)
    elif layout == "hf":
        arrays, configs = to_hugging_face(model, flat, preprocess, class_names)
    else:
        images = ImageFormat(*HALF, "bilinear", None)
        arrays = flat
        config = {
            OWN: VERSION,
            "model": registry.to_json(model),
            "images": dataclasses.asdict(
                preprocess.image_format if preprocess else images
            ),
            "leftover": preprocess.leftover if preprocess else (0, 0),
            "resampling": dataclasses.asdict(resampling),
            "class_names": list(class_names),
        }
        configs = {"config.json": config}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    return folder


def is_own(path: Path) -> bool:
    """Whether a folder, or the file of weights in it, is of our own layout."""
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name != WEIGHTS:
        return False
    return (folder / WEIGHTS).exists() and OWN in read_json(folder / "config.json")


def read_own(path: Path) -> Checkpoint:
    """Reads a folder of our own layout, or the file of weights in it.

    Raises:
      UsageError: its files are damaged, or of another version.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json")
    if config[OWN] != VERSION:
        raise UsageError(
            f"{folder} has version {config[OWN]!r} of the layout wf_vit, expected "
            f"{VERSION}: open it with the version of this package that wrote it."
        )
    with guards.explained(folder, "It is not as it was saved: save it again."):
        images = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config["images"].items()
        }
        leftover = {"leftover": tuple(config["leftover"])}
        settings.check(_LEFTOVER, leftover, "images")
        return Checkpoint(
            model=registry.from_json(config["model"]),
            parameters=read_file(folder / WEIGHTS),
            origin={},
            resampling=Resampling(**config["resampling"]),
            image_format=ImageFormat(**images),
            class_names=guards.class_names(config["class_names"]),
            **leftover,
        )
