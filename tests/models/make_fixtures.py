"""Makes the fixtures of pretrained/ with the libraries they stand for.

    pip install -e '.[test,peers]'
    python -m tests.models.make_fixtures

Each fixture is a folder: tiny random weights as a published checkpoint has them, the
library's config files, and ``expected.npz`` with what the library computes: for each
image size, the images, the ``tokens`` after the final norm and the ``logits``.
``resize.npz`` holds position tables resized by PyTorch. Takes half a minute.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models.vision_transformer import _load_weights

from benchmarks.checkpoints import as_apple, as_clip, as_meta_dinov3, with_decoder

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 1.5,
}
HF_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
# The weights' own size, and one that shrinks one axis of the 4x4 grid of patches and
# enlarges the other.
SIZES = ((16, 16), (8, 24))


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Gives every parameter a value that matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = any(n in name for n in ("norm", "ln_", "ls", "lambda", "gamma"))
            is_gain = parameter.ndim == 1 and gain and not name.endswith("bias")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.3 * noise)
    return model.eval()


def images(size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size[0] * size[1])
    return torch.randn((1, 3, *size), generator=generator)


def save_expected(folder: Path, outputs: dict[tuple[int, int], dict]) -> None:
    arrays = {}
    for size, output in outputs.items():
        prefix = f"{size[0]}x{size[1]}"
        arrays[f"{prefix}/images"] = images(size).permute(0, 2, 3, 1).numpy()
        for name, tensor in output.items():
            arrays[f"{prefix}/{name}"] = tensor.detach().numpy()
    np.savez(folder / "expected.npz", **arrays)


def fresh(name: str) -> Path:
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def timm_outputs(model, sizes=SIZES) -> dict:
    """Runs a timm model at several sizes, resizing its own position table."""
    table = None if model.pos_embed is None else model.pos_embed.detach().clone()

    own = model.patch_embed.img_size or SMALL["img_size"]

    def set_size(size) -> None:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)

    def restore() -> None:
        set_size(own)
        if table is not None:
            model.pos_embed.data = table

    outputs = {}
    for size in sizes:
        restore()
        set_size(size)
        features = model.forward_features(images(size))
        outputs[size] = {"logits": model.forward_head(features)}
        if isinstance(model.fc_norm, torch.nn.Identity):
            outputs[size]["tokens"] = features
    restore()
    return outputs


def make_timm(
    name: str, architecture: str, seed: int, *, sizes=SIZES, **options
) -> None:
    options = {**SMALL, "num_classes": 5, **options}
    model = randomize(timm.create_model(architecture, **options), seed)
    folder = fresh(name)
    save_expected(folder, timm_outputs(model, sizes))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "model.safetensors",
    )
    config = {
        "architecture": architecture,
        "num_classes": 5,
        "global_pool": model.global_pool,
        "model_args": {k: v for k, v in options.items() if k != "num_classes"},
        "pretrained_cfg": {
            "input_size": [3, 224, 224],
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
            "interpolation": "bilinear",
            "crop_pct": 0.9,
            "crop_mode": "center",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def make_renamed(
    name: str, architecture: str, rename: Callable, seed: int, *, sizes=SIZES, **options
) -> None:
    """Saves timm's weights under another library's names, without a config."""
    options = {**SMALL, "num_classes": 0, **options}
    model = randomize(timm.create_model(architecture, **options), seed)
    if isinstance(model.head, torch.nn.Linear):
        # A projection has none.
        torch.nn.init.zeros_(model.head.bias)
    folder = fresh(name)
    save_expected(folder, timm_outputs(model, sizes))
    state = rename(model.state_dict())
    arrays = {k: v.contiguous() for k, v in state.get("model", state).items()}
    save_file(arrays, folder / "model.safetensors")


def as_moco(state: dict) -> dict:
    """MoCo v3's names: two encoders with their heads, and a predictor."""
    names = {f"module.base_encoder.{k}": v for k, v in state.items()}
    names |= {f"module.momentum_encoder.{k}": 0 * v for k, v in state.items()}
    names["module.base_encoder.head.0.weight"] = torch.ones(8)
    return names | {"module.predictor.0.weight": torch.ones(8)}


def make_hugging_face(
    name: str,
    model_class,
    config,
    seed: int,
    *,
    dtype=torch.float32,
    in_memory=False,
    sizes=SIZES,
) -> None:
    """Saves a model as published; ``in_memory``, under transformers 5's own names."""
    model = randomize(model_class(config), seed)
    folder = fresh(name)
    model.to(dtype).save_pretrained(folder)
    if in_memory:
        save_file(model.state_dict(), folder / "model.safetensors")
    model.float()
    classifies = "ForImageClassification" in model_class.__name__
    backbone = model
    if classifies and config.model_type not in ("clip", "siglip"):
        backbone = getattr(model, model.base_model_prefix)
    outputs = {}
    for size in sizes:
        resize = {}
        if len(sizes) > 1 and "dinov" not in config.model_type:
            resize = {"interpolate_pos_encoding": True}
        output = backbone(images(size), **resize)
        outputs[size] = {}
        if config.model_type.partition("_")[0] not in ("clip", "beit"):
            # Their final norm is of what the head reads alone.
            outputs[size]["tokens"] = getattr(output, "last_hidden_state", None)
        if classifies:
            outputs[size]["logits"] = model(images(size), **resize).logits
        else:
            pooled = getattr(output, "image_embeds", None)
            outputs[size]["pooled"] = output.pooler_output if pooled is None else pooled
        outputs[size] = {k: v for k, v in outputs[size].items() if v is not None}
    save_expected(folder, outputs)


def make_mae(name: str, seed: int) -> None:
    """Saves a masked autoencoder, decoder included; nothing is masked."""
    config = transformers.ViTMAEConfig(
        **HF_SMALL,
        mask_ratio=0.0,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
    )
    model = randomize(transformers.ViTMAEForPreTraining(config), seed)
    folder = fresh(name)
    model.save_pretrained(folder)
    noise = torch.arange(16.0)[None]
    size = SIZES[0]
    tokens = model.vit(images(size), noise=noise).last_hidden_state
    save_expected(folder, {size: {"tokens": tokens}})


def google_arrays(*, big_vision: bool, seed: int, pool: str, stacked: bool) -> dict:
    """Makes random arrays under the names of vision_transformer or big_vision."""
    generator = np.random.default_rng(seed)
    d, heads, hidden, depth = 16, 2, 24, 2

    def normal(*shape: int) -> np.ndarray:
        return (0.3 * generator.normal(size=shape)).astype(np.float32)

    def norm(name: str) -> dict:
        return {f"{name}/scale": 1 + normal(d), f"{name}/bias": normal(d)}

    def attention(name: str) -> dict:
        arrays = {f"{name}/out/kernel": normal(heads, d // heads, d)}
        arrays[f"{name}/out/bias"] = normal(d)
        for part in ("query", "key", "value"):
            arrays[f"{name}/{part}/kernel"] = normal(d, heads, d // heads)
            arrays[f"{name}/{part}/bias"] = normal(heads, d // heads)
        return arrays

    def dense(name: str, inputs: int, outputs: int) -> dict:
        return {
            f"{name}/kernel": normal(inputs, outputs),
            f"{name}/bias": normal(outputs),
        }

    def mlp(name: str) -> dict:
        return dense(f"{name}/Dense_0", d, hidden) | dense(f"{name}/Dense_1", hidden, d)

    a, m, n = (0, 0, 1) if big_vision else (1, 3, 2)
    arrays = {"embedding/kernel": normal(4, 4, 3, d), "embedding/bias": normal(d)}
    arrays |= norm("Transformer/encoder_norm") | dense("head", d, 5)
    blocks = [
        norm("LayerNorm_0")
        | attention(f"MultiHeadDotProductAttention_{a}")
        | norm(f"LayerNorm_{n}")
        | mlp(f"MlpBlock_{m}")
        for _ in range(depth)
    ]
    if stacked:
        for key in blocks[0]:
            arrays[f"Transformer/encoderblock/{key}"] = np.stack(
                [block[key] for block in blocks]
            )
    else:
        for layer, block in enumerate(blocks):
            for key, array in block.items():
                arrays[f"Transformer/encoderblock_{layer}/{key}"] = array
    if big_vision:
        arrays["pos_embedding"] = normal(1, 16, d)
    else:
        arrays["Transformer/posembed_input/pos_embedding"] = normal(1, 17, d)
    if pool == "cls":
        arrays["cls"] = normal(1, 1, d)
    if pool == "map":
        arrays["MAPHead_0/probe"] = normal(1, 1, d)
        arrays |= attention("MAPHead_0/MultiHeadDotProductAttention_0")
        arrays |= norm("MAPHead_0/LayerNorm_0") | mlp("MAPHead_0/MlpBlock_0")
    prefix = "params/" if big_vision else ""
    return {prefix + name: array for name, array in arrays.items()}


def make_google(name: str, *, big_vision: bool, pool: str, stacked: bool, seed: int):
    """Lets timm, whose reader of these files is its own, compute what is expected."""
    folder = fresh(name)
    arrays = google_arrays(big_vision=big_vision, seed=seed, pool=pool, stacked=stacked)
    np.savez(folder / "weights.npz", **arrays)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **SMALL,
        num_classes=5,
        act_layer="gelu_tanh",
        class_token=pool == "cls",
        global_pool={"cls": "token", "map": "map", "mean": "avg"}[pool],
        fc_norm=False,
    )
    _load_weights(model, str(folder / "weights.npz"))
    save_expected(folder, timm_outputs(model.eval(), sizes=SIZES[:1]))


def make_resize() -> None:
    table = torch.randn((1, 3, 7, 7), generator=torch.Generator().manual_seed(0))
    arrays = {"table": table[0].permute(1, 2, 0).numpy()}
    resize = torch.nn.functional.interpolate
    for grid in ((3, 3), (5, 12), (7, 4), (16, 16)):
        scale = tuple((g + 0.1) / 7 for g in grid)
        for rule, out in {
            "plain": resize(table, grid, mode="bicubic"),
            "antialias": resize(table, grid, mode="bicubic", antialias=True),
            "offset": resize(table, scale_factor=scale, mode="bicubic"),
        }.items():
            key = f"{rule}/{grid[0]}x{grid[1]}"
            arrays[key] = out[0].permute(1, 2, 0).numpy()
    np.savez(FIXTURES / "resize.npz", **arrays)


def main() -> None:
    make_resize()
    make_timm("timm_vit", "vit_tiny_patch16_224", 1)
    make_timm("timm_deit_distilled", "deit_tiny_distilled_patch16_224", 2)
    make_timm(
        "timm_dinov2_registers_swiglu", "vit_giant_patch14_reg4_dinov2", 3, mlp_ratio=3
    )
    make_timm("timm_mean_fc_norm", "vit_tiny_patch16_224", 4, global_pool="avg")
    make_timm("timm_map_no_bias", "vit_base_patch16_siglip_224", 5, qkv_bias=False)
    dinov2 = {**HF_SMALL, "mlp_ratio": 2}
    make_hugging_face(
        "hf_vit",
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**HF_SMALL),
        6,
    )
    make_hugging_face(
        "hf_vit_new_names",
        transformers.ViTModel,
        transformers.ViTConfig(**HF_SMALL, hidden_act="gelu_pytorch_tanh"),
        7,
        in_memory=True,
    )
    make_hugging_face(
        "hf_deit_distilled",
        transformers.DeiTForImageClassificationWithTeacher,
        transformers.DeiTConfig(**HF_SMALL),
        8,
    )
    make_hugging_face(
        "hf_deit_one_head",
        transformers.DeiTForImageClassification,
        transformers.DeiTConfig(**HF_SMALL),
        9,
    )
    make_hugging_face(
        "hf_dinov2_bfloat16",
        transformers.Dinov2ForImageClassification,
        transformers.Dinov2Config(**dinov2),
        10,
        dtype=torch.bfloat16,
    )
    make_hugging_face(
        "hf_dinov2_registers_swiglu",
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig(**dinov2, use_swiglu_ffn=True),
        11,
    )
    google = {"big_vision": False, "stacked": False}
    make_google("google_augreg", pool="cls", seed=12, **google)
    make_google("big_vision_map", big_vision=True, pool="map", stacked=True, seed=13)
    make_google("big_vision_mean", big_vision=True, pool="mean", stacked=False, seed=14)
    make_families()


def make_families() -> None:
    """The families of 2021 to 2026 in the layouts that they are published in."""
    own = SIZES[:1]
    rotary = {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"}
    make_hugging_face(
        "hf_dinov3_gated",
        transformers.DINOv3ViTModel,
        transformers.DINOv3ViTConfig(**HF_SMALL, **rotary),
        15,
    )
    make_timm("timm_dinov3", "vit_small_patch16_dinov3_qkvb", 16)
    make_renamed(
        "meta_dinov3",
        "vit_small_plus_patch16_dinov3_qkvb",
        as_meta_dinov3,
        17,
        global_pool="token",
    )
    make_timm("timm_eva02_packed", "eva02_tiny_patch14_336", 18)
    make_timm("timm_eva02_inner_norm", "eva02_base_patch14_448", 19)
    make_timm("timm_eva", "eva_giant_patch14_224", 20)
    pooling = {"attn_pool_num_heads": 4, "attn_pool_mlp_ratio": 1.0}
    core = "vit_pe_core_tiny_patch16_384"
    make_timm("timm_pe_core", core, 21, **pooling)
    make_renamed(
        "meta_pe_spatial",
        "vit_pe_spatial_small_patch16_512",
        as_clip,
        22,
        ref_feat_shape=(4, 4),
    )
    vision = {k: v for k, v in HF_SMALL.items() if k != "num_labels"}
    make_hugging_face(
        "hf_clip_projection",
        transformers.CLIPVisionModelWithProjection,
        transformers.CLIPVisionConfig(**vision, projection_dim=12),
        23,
    )
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 8, "vocab_size": 100}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    both = {"vision_config": vision, "text_config": text, "num_labels": 5}
    make_hugging_face(
        "hf_clip_classifier",
        transformers.CLIPForImageClassification,
        transformers.CLIPConfig(**both),
        24,
        sizes=own,
    )
    make_renamed(
        "openai_clip",
        "vit_base_patch32_clip_quickgelu_224",
        as_clip,
        25,
        num_classes=12,
    )
    make_hugging_face(
        "hf_siglip",
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig(**vision),
        26,
    )
    make_hugging_face(
        "hf_siglip_classifier",
        transformers.SiglipForImageClassification,
        transformers.SiglipConfig(**both),
        27,
        sizes=own,
    )
    make_timm("timm_siglip2", "vit_base_patch32_siglip_256", 28)
    make_timm(
        "timm_map_of_patches",
        "vit_base_patch32_siglip_256",
        29,
        class_token=True,
        reg_tokens=2,
    )
    make_hugging_face(
        "hf_aimv2",
        transformers.Aimv2VisionModel,
        transformers.Aimv2VisionConfig(**vision),
        30,
        sizes=own,
    )
    make_renamed("apple_aimv2", "aimv2_large_patch14_224", as_apple, 31)
    make_mae("hf_mae", 32)
    make_renamed("meta_mae", "vit_tiny_patch16_224", with_decoder, 33)
    make_renamed("moco_v3", "vit_tiny_patch16_224", as_moco, 34)
    make_hugging_face(
        "hf_beit",
        transformers.BeitForImageClassification,
        transformers.BeitConfig(**HF_SMALL, use_relative_position_bias=True),
        35,
        sizes=own,
    )
    make_timm("timm_beit", "beitv2_base_patch16_224", 36, sizes=own)
    # n x (n + 2) patches and CLS are as many as (n + 1)^2 patches.
    oblong = {"sizes": ((12, 20),)}
    make_timm("timm_oblong", "vit_tiny_patch16_224", 38, img_size=(12, 20), **oblong)
    make_hugging_face(
        "hf_oblong",
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**HF_SMALL | {"image_size": (12, 20)}),
        39,
        **oblong,
    )
    make_timm("timm_rope_vit", "vit_small_patch16_rope_ape_224", 37)


if __name__ == "__main__":
    main()
