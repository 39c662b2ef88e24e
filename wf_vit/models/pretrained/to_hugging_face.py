"""A model in the layout of transformers' ViT, DeiT or DINOv2."""

from typing import Any

import numpy as np

from wf_vit.models.pretrained.hints import RESAMPLE
from wf_vit.models.pretrained.preprocess import Preprocess
from wf_vit.models.pretrained.to_torch import (
    PROJECTIONS,
    Arrays,
    dense,
    patches,
    positions,
    refuse,
    stacked,
    tokens,
)
from wf_vit.models.vit import ViT

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "swiglu": "gelu",  # Not looked at.
}
_CLASSES = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassificationWithTeacher"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
}
# Names within a block: ours, those of ViT and DeiT, those of DINOv2.
_LAYERS = (
    ("attention_norm", "layernorm_before", "norm1"),
    ("mlp_norm", "layernorm_after", "norm2"),
    ("attention/out", "attention.output.dense", "attention.output.dense"),
    ("mlp/up", "intermediate.dense", "mlp.fc1"),
    ("mlp/down", "output.dense", "mlp.fc2"),
)


def to_hugging_face(
    model: ViT,
    flat: Arrays,
    preprocess: Preprocess | None,
    class_names: tuple[str, ...],
) -> tuple[Arrays, dict[str, Any]]:
    """Returns the arrays, config.json, and preprocessor_config.json.

    Raises:
      UsageError: transformers has no such model.
    """
    dinov2, gated = model.layer_scale is not None, model.mlp == "swiglu"
    head, wide = model.num_classes > 0, model.representation_size
    refuse(
        "hf",
        model,
        {
            "no CLS token": not model.cls_token,
            f"pool={model.pool!r}": model.pool
            not in (("cls", "cls_mean") if dinov2 else ("cls",)),
            "its final norm after the pooling": model.pool_before_norm,
            "registers without LayerScale": model.num_registers and not dinov2,
            "gated MLPs without LayerScale": gated and not dinov2,
            "a distillation token and LayerScale": model.distillation_token and dinov2,
            "a dense layer before the head": wide and (head or dinov2),
            f"MLPs of {model.mlp_dim}": dinov2 and _mlp_ratio(model) is None,
            "LayerScale and an oblong grid": dinov2 and len(set(model.grid)) > 1,
            "a crop of oblong images (preprocess=None leaves it out)": preprocess
            and len(set(model.image_size)) > 1
            and preprocess.image_format.crop
            and not preprocess.image_format.squash,
        },
    )
    kind = "deit" if model.distillation_token else "vit"
    if dinov2:
        kind = "dinov2_with_registers" if model.num_registers else "dinov2"
    stem = f"{kind}." if head else ""
    names = {
        "cls": "cls_token",
        "distillation": "distillation_token",
        "registers": "register_tokens",
    }
    names = {k: f"{stem}embeddings.{name}" for k, name in names.items()}
    arrays = {
        **tokens(model, flat, names),
        f"{stem}embeddings.position_embeddings": positions(
            model, flat, 1 + model.distillation_token
        ),
        **patches(f"{stem}embeddings.patch_embeddings.projection", flat),
        **dense(f"{stem}layernorm", "norm", flat),
        **dense("pooler.dense", "representation", flat),
    }
    if dinov2:
        zeros = np.zeros((1, model.width), np.float32)
        arrays[f"{stem}embeddings.mask_token"] = zeros
    for layer in range(model.depth):
        ours, theirs = f"blocks_{layer}", f"{stem}encoder.layer.{layer}"
        for own, vit_name, dinov2_name in _LAYERS:
            if not (gated and own in ("mlp/up", "mlp/down")):
                name = dinov2_name if dinov2 else vit_name
                arrays |= dense(f"{theirs}.{name}", f"{ours}/{own}", flat)
        for name in PROJECTIONS:
            scope = f"{theirs}.attention.attention.{name}"
            arrays |= dense(scope, f"{ours}/attention/{name}", flat)
        if gated:
            pair = [f"{ours}/mlp/gate", f"{ours}/mlp/up"]
            arrays |= stacked(f"{theirs}.mlp.weights_in", pair, flat)
            arrays |= dense(f"{theirs}.mlp.weights_out", f"{ours}/mlp/down", flat)
        if dinov2:
            for scale, own in (("1", "attention_scale"), ("2", "mlp_scale")):
                arrays[f"{theirs}.layer_scale{scale}.lambda1"] = flat[f"{ours}/{own}"]
    if head and kind == "deit":
        arrays |= dense("cls_classifier", "head", flat)
        arrays |= dense("distillation_classifier", "head_distillation", flat)
    elif head:
        arrays |= dense("classifier", "head", flat)
        if dinov2 and model.pool == "cls":
            # Its head reads CLS and mean: the mean counts nothing.
            weight = arrays["classifier.weight"]
            arrays["classifier.weight"] = np.pad(weight, ((0, 0), (0, model.width)))
    configs = {"config.json": _config(model, kind, class_names)}
    if preprocess is not None:
        configs["preprocessor_config.json"] = _images(preprocess)
    return arrays, configs


def _mlp_ratio(model: ViT) -> int | None:
    """Returns DINOv2's whole ratio of hidden width to width, None if there is none."""
    if model.mlp != "swiglu":
        ratio, rest = divmod(model.mlp_dim, model.width)
        return None if rest else ratio
    for ratio in range(1, 17):
        # Two thirds, up to a multiple of 8.
        if (int(model.width * ratio * 2 / 3) + 7) // 8 * 8 == model.mlp_dim:
            return ratio
    return None


def _config(model: ViT, kind: str, class_names: tuple[str, ...]) -> dict[str, Any]:
    head = model.num_classes > 0
    config = {
        "architectures": [_CLASSES[kind][head]],
        "model_type": kind,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "hidden_act": _ACTIVATIONS[model.mlp],
        "layer_norm_eps": model.norm_epsilon,
        "image_size": _one_or_two(model.image_size),
        "patch_size": _one_or_two(model.patch_size),
        "qkv_bias": model.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if model.layer_scale is None:
        config["intermediate_size"] = model.mlp_dim
    else:
        config["mlp_ratio"] = _mlp_ratio(model)
        config["use_swiglu_ffn"] = model.mlp == "swiglu"
        if model.num_registers:
            config["num_register_tokens"] = model.num_registers
    if model.representation_size:
        config["pooler_output_size"] = model.representation_size
        config["pooler_act"] = "tanh"
    if head:
        labels = class_names or [f"LABEL_{k}" for k in range(model.num_classes)]
        config["id2label"] = {str(k): name for k, name in enumerate(labels)}
        config["label2id"] = {name: k for k, name in enumerate(labels)}
    return config


def _one_or_two(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _images(preprocess: Preprocess) -> dict[str, Any]:
    """Returns the preprocessor_config.json of how a model's images are prepared."""
    form = preprocess.image_format
    shown = [s + more for s, more in zip(
        preprocess.image_size, preprocess.leftover, strict=True
    )]  # fmt: skip
    both = dict(zip(("height", "width"), shown, strict=True))
    config = {
        "do_resize": True,
        "resample": RESAMPLE.index(form.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(form.mean),
        "image_std": list(form.std),
        "image_processor_type": "ViTImageProcessor",
        "size": both,
    }
    if form.crop is None:
        return config
    before = [int(side / form.crop + 1e-6) for side in shown]
    size = dict(zip(("height", "width"), before, strict=True))
    if not form.squash:
        size = {"shortest_edge": min(before)}
    kind = "DeiTImageProcessor" if form.squash else "BitImageProcessor"
    crop = {"do_center_crop": True, "crop_size": both, "image_processor_type": kind}
    return config | crop | {"size": size}
