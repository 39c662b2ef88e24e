"""Odd inputs, drawn at random, against what timm and transformers compute from them."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models.pretrained.checkpoints import compute
from wf_vit.errors import UsageError
from wf_vit.models import pretrained

SEEDS = range(40)
PATCH, WIDTH = 4, 16


def randomize(torch, model, generator):
    with torch.no_grad():
        for parameter in model.parameters():
            noise = generator.normal(size=tuple(parameter.shape)) * 0.3
            parameter.copy_(torch.from_numpy(noise))
    return model.eval()


def in_a_container(torch, state, folder, generator):
    """Saves a state dict as some training program would, and returns the file."""

    def pick(*choices):
        return choices[generator.integers(len(choices))]

    stem = pick("", "module.", "model.", "backbone.", "net.encoder.", "visual.trunk.")
    named = {stem + name: value.contiguous() for name, value in state.items()}
    worse = {name: 0 * value for name, value in named.items()}
    suffix = pick(".safetensors", ".npz", ".pth", ".pt", ".ckpt", ".pth.tar", ".bin")
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({k: v.numpy() for k, v in named.items()}, path)
    elif suffix == ".npz":
        beside = pick({}, {"step": 3}, {"opt/mu": np.ones(3)})
        np.savez(path, **{k: v.numpy() for k, v in named.items()}, **beside)
    else:
        extras = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
        content = pick(
            named,
            {"model": named},
            {"state_dict": named, **extras},
            {"state_dict": worse, "state_dict_ema": named, **extras},
            {"model": worse, "model_ema": named},
            {"student": worse, "teacher": named, **extras},
            {"net": named, "best": torch.tensor(0.5)},
        )
        torch.save(content, path)
    return path


def beside(path, config, generator, size):
    """Writes a config or leaves it out; returns what the caller then has to say."""
    if generator.random() < 0.5:
        (path.parent / "config.json").write_text(json.dumps(config))
        return {}
    return {"image_size": size, "num_heads": 2}


def assert_equal(loaded, images, expected):
    got = compute(loaded, images.permute(0, 2, 3, 1).numpy())["logits"]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=1e-4 * scale, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_timm(tmp_path, seed):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    generator = np.random.default_rng(seed)
    grid = tuple(int(n) for n in generator.integers(1, 7, size=2))
    size = (grid[0] * PATCH, grid[1] * PATCH)
    kind = generator.integers(4)
    options = {
        "img_size": size,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    architecture = "vit_small_patch16_224"
    if kind == 0:
        architecture = "deit_small_distilled_patch16_224"
    elif kind == 1:
        registers = int(generator.integers(0, 4))
        options |= {"reg_tokens": registers, "no_embed_class": registers > 1}
        options["init_values"] = 0.1
    elif kind == 2:
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    model = randomize(torch, timm.create_model(architecture, **options), generator)
    path = in_a_container(torch, model.state_dict(), tmp_path, generator)
    config = {
        "architecture": architecture,
        "global_pool": model.global_pool,
        "model_args": {k: v for k, v in options.items() if k != "num_classes"},
    }
    said = beside(path, config, generator, size)
    images = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(images).numpy()
    side = math.isqrt(grid[0] * grid[1])
    if said and side * side == grid[0] * grid[1] and grid[0] != grid[1]:
        # Without a config it is as likely a square grid, and is not guessed.
        with pytest.raises(UsageError, match="as is wanted"):
            pretrained.load(path, **said)
        return
    assert_equal(pretrained.load(path, **said), images, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_transformers(tmp_path, seed):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    generator = np.random.default_rng(1000 + seed)

    def pick(*choices):
        return choices[generator.integers(len(choices))]

    grid = tuple(int(n) for n in generator.integers(1, 7, size=2))
    family = pick("ViT", "Dinov2", "DINOv3ViT", "Siglip", "CLIP")
    if family in ("Siglip", "CLIP", "Dinov2"):
        grid = (grid[0], grid[0])  # They know square tables only.
    size = (grid[0] * PATCH, grid[1] * PATCH)
    options = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": size if size[0] != size[1] else size[0],
        "patch_size": PATCH,
        "layer_norm_eps": pick(1e-12, 1e-6, 1e-5, 1e-3),
        "hidden_act": pick("gelu", "gelu_pytorch_tanh", "quick_gelu"),
    }
    name = {"Siglip": "SiglipVision", "CLIP": "CLIPVision"}.get(family, family)
    if family == "Dinov2":
        options["mlp_ratio"] = pick(1, 2)
        options["use_swiglu_ffn"] = pick(True, False)
        del options["intermediate_size"]
    if family == "DINOv3ViT":
        options |= {
            "num_register_tokens": pick(0, 1, 4),
            "rope_theta": pick(50.0, 100.0),
        }
        options |= {"key_bias": pick(True, False), "proj_bias": pick(True, False)}
    if family == "ViT":
        options["qkv_bias"] = pick(True, False)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config)
    randomize(torch, model, generator)
    source = pick("folder", "module")
    model.save_pretrained(tmp_path)
    images = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = model(images)
    loaded = pretrained.load(tmp_path if source == "folder" else model)
    got = compute(loaded, images.permute(0, 2, 3, 1).numpy())
    pooled = expected.pooler_output.numpy()
    scale = np.abs(pooled).max()
    np.testing.assert_allclose(got["logits"], pooled, atol=1e-4 * scale, rtol=0)
    if family != "CLIP":
        tokens = expected.last_hidden_state.numpy()
        scale = np.abs(tokens).max()
        np.testing.assert_allclose(got["tokens"], tokens, atol=1e-4 * scale, rtol=0)
