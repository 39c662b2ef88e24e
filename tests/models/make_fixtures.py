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
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models.vision_transformer import _load_weights

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
            gain = any(n in name for n in ("norm", "ls", "lambda1"))
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
    table = model.pos_embed.detach().clone()
    outputs = {}
    for size in sizes:
        model.set_input_size(img_size=SMALL["img_size"])
        model.pos_embed.data = table
        model.set_input_size(img_size=size)
        features = model.forward_features(images(size))
        outputs[size] = {"logits": model.forward_head(features)}
        if isinstance(model.fc_norm, torch.nn.Identity):
            outputs[size]["tokens"] = features
    model.set_input_size(img_size=SMALL["img_size"])
    model.pos_embed.data = table
    return outputs


def make_timm(name: str, architecture: str, seed: int, **options) -> None:
    options = {**SMALL, "num_classes": 5, **options}
    model = randomize(timm.create_model(architecture, **options), seed)
    folder = fresh(name)
    save_expected(folder, timm_outputs(model))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "model.safetensors",
    )
    config = {
        "architecture": architecture,
        "num_classes": 5,
        "global_pool": model.global_pool,
        "model_args": {key: options[key] for key in SMALL},
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


def make_hugging_face(
    name: str, model_class, config, seed: int, *, dtype=torch.float32, in_memory=False
) -> None:
    """Saves a model as published; ``in_memory``, under transformers 5's own names."""
    model = randomize(model_class(config), seed)
    folder = fresh(name)
    model.to(dtype).save_pretrained(folder)
    if in_memory:
        save_file(model.state_dict(), folder / "model.safetensors")
    model.float()
    backbone = getattr(model, model.base_model_prefix, model)
    outputs = {}
    for size in SIZES:
        resize = {}
        if "dinov2" not in config.model_type:
            resize = {"interpolate_pos_encoding": True}
        output = backbone(images(size), **resize)
        outputs[size] = {"tokens": output.last_hidden_state}
        if backbone is model:
            outputs[size]["pooled"] = output.pooler_output
        else:
            outputs[size]["logits"] = model(images(size), **resize).logits
    save_expected(folder, outputs)


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


if __name__ == "__main__":
    main()
