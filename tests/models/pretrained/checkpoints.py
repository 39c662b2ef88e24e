"""The published checkpoints of ../fixtures, and what their libraries compute."""

import shutil
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from wf_vit.models import pretrained

FIXTURES = Path(__file__).parents[1] / "fixtures"

# One of each kind of model that opens.
KINDS = (
    "timm_dinov2_registers_swiglu",
    "hf_dinov3_gated",
    "timm_eva02_inner_norm",
    "timm_pe_core",
    "hf_clip_projection",
    "hf_siglip",
    "timm_map_of_patches",
    "hf_aimv2",
    "hf_beit",
    "timm_mean_fc_norm",
)


def source_of(name: str) -> Path:
    weights = FIXTURES / name / "weights.npz"
    return weights if weights.exists() else FIXTURES / name


def load(name: str, **options) -> pretrained.Pretrained:
    """Opens a fixture; those without a config have 2 heads, which nothing tells."""
    folder = FIXTURES / name
    if not (folder / "config.json").exists() and not (folder / "weights.npz").exists():
        options = {"num_heads": 2, "image_size": 16, **options}
    return pretrained.load(source_of(name), **options)


def compute(loaded: pretrained.Pretrained, images: np.ndarray):
    forward = jax.jit(loaded.model.apply)
    logits, out = forward({"params": loaded.params}, images)
    return {"logits": logits, **out}


def expected_of(name: str) -> dict[str, dict[str, np.ndarray]]:
    outputs = {}
    with np.load(FIXTURES / name / "expected.npz") as file:
        for key in file.files:
            size, _, kind = key.partition("/")
            outputs.setdefault(size, {})[kind] = file[key]
    return outputs


def copy_with(name: str, folder: Path, change) -> Path:
    """Copies a fixture of safetensors, with changed arrays."""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    return folder
