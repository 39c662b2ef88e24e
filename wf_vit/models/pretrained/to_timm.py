"""A model in the layout of timm's ``VisionTransformer``."""

from typing import Any

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

_POOLINGS = {"cls": "token", "mean": "avg", "map": "map"}
# Names within a block, ours and theirs.
_LAYERS = {
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "attention/out": "attn.proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
_POOL = {
    "attention/query": "q",
    "attention/out": "proj",
    "norm": "norm",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


def to_timm(
    model: ViT,
    flat: Arrays,
    preprocess: Preprocess | None,
    class_names: tuple[str, ...],
) -> tuple[Arrays, dict[str, Any]]:
    """Returns the arrays, and config.json.

    Raises:
      UsageError: timm has no such model.
    """
    distills, gated = model.distillation_token, model.mlp == "swiglu"
    epsilon = model.norm_epsilon
    refuse(
        "timm",
        model,
        {
            f"norms with an epsilon of {epsilon}, not 1e-6": epsilon != 1e-6,
            "a dense layer before the head": model.representation_size,
            "a head that reads CLS and mean": model.pool not in _POOLINGS,
            "a distillation token and registers": distills and model.num_registers,
            "a distillation token and gated MLPs": distills and gated,
            "attention pooling of its own size": model.pool == "map"
            and (model.pool_heads or model.num_heads, model.pool_mlp_dim)
            not in ((model.num_heads, None), (model.num_heads, model.mlp_dim)),
        },
    )
    names = {"cls": "cls_token", "distillation": "dist_token", "registers": "reg_token"}
    # With registers timm's models give no prefix token a position.
    bare = model.num_registers > 0
    arrays = {
        **tokens(model, flat, names),
        "pos_embed": positions(model, flat, 0 if bare else model.num_prefix_tokens),
        **patches("patch_embed.proj", flat),
        **dense("fc_norm" if model.pool_before_norm else "norm", "norm", flat),
    }
    for layer in range(model.depth):
        ours, theirs = f"blocks_{layer}", f"blocks.{layer}"
        for own, name in _LAYERS.items():
            arrays |= dense(f"{theirs}.{name}", f"{ours}/{own}", flat)
        projections = [f"{ours}/attention/{name}" for name in PROJECTIONS]
        arrays |= stacked(f"{theirs}.attn.qkv", projections, flat)
        if gated:
            pair = [f"{ours}/mlp/gate", f"{ours}/mlp/up"]
            arrays |= stacked(f"{theirs}.mlp.fc1", pair, flat)
        if model.layer_scale is not None:
            arrays[f"{theirs}.ls1.gamma"] = flat[f"{ours}/attention_scale"]
            arrays[f"{theirs}.ls2.gamma"] = flat[f"{ours}/mlp_scale"]
    if model.pool == "map":
        arrays["attn_pool.latent"] = flat["attention_pool/probe"]
        for own, name in _POOL.items():
            arrays |= dense(f"attn_pool.{name}", f"attention_pool/{own}", flat)
        pair = [f"attention_pool/attention/{name}" for name in ("key", "value")]
        arrays |= stacked("attn_pool.kv", pair, flat)
    if model.num_classes:
        arrays |= dense("head", "head", flat)
        if distills:
            arrays |= dense("head_dist", "head_distillation", flat)
    config = _config(model, preprocess, bare)
    if class_names:
        config["label_names"] = list(class_names)
    return arrays, {"config.json": config}


def _config(model: ViT, preprocess: Preprocess | None, bare: bool) -> dict[str, Any]:
    gated, distills = model.mlp == "swiglu", model.distillation_token
    pool = _POOLINGS[model.pool]
    arguments = {
        "img_size": list(model.image_size),
        "patch_size": list(model.patch_size),
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
        # timm rounds the product down; its gated MLPs count both halves.
        "mlp_ratio": ((2 if gated else 1) * model.mlp_dim + 0.5) / model.width,
        "qkv_bias": model.qkv_bias,
        "init_values": None if model.layer_scale is None else 1e-5,
        "global_pool": pool,
        "fc_norm": model.pool_before_norm,
    }
    architecture = "vit_base_patch16_224"
    if distills:
        architecture = "deit_base_distilled_patch16_224"
    else:
        arguments["class_token"] = model.cls_token
        arguments["reg_tokens"] = model.num_registers
        arguments["no_embed_class"] = bare
        all_tokens = model.pool == "map" and model.pool_tokens == "all"
        arguments["pool_include_prefix"] = all_tokens
    if gated:
        # Its MLPs are gated, which no argument says.
        architecture = "vit_giant_patch14_reg4_dinov2"
    else:
        arguments["act_layer"] = model.mlp
    images = {}
    if preprocess is not None:
        form = preprocess.image_format
        squash = form.crop is None or form.squash
        images = {
            "mean": list(form.mean),
            "std": list(form.std),
            "interpolation": form.interpolation,
            "crop_pct": form.crop or 1.0,
            "crop_mode": "squash" if squash else "center",
        }
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [3, *model.image_size],
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if distills else "head",
            **images,
        },
    }
