"""Models written for other libraries and for this one, and read again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.models.pretrained.checkpoints import (
    FIXTURES,
    KINDS,
    compute,
    expected_of,
    load,
)
from tests.networks import random_params
from wf_vit import command
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained.preprocess import IMAGENET, ImageFormat, Preprocess
from wf_vit.models.registry import from_json, to_json
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import WindowFreeViT

SMALL = {
    "num_classes": 7,
    "image_size": (32, 48),
    "patch_size": (8, 8),
    "width": 32,
    "depth": 2,
    "mlp_dim": 64,
    "num_heads": 2,
    "mlp": "gelu",
}
SQUARE = {"image_size": (32, 32), "layer_scale": 1.0}
REGISTERS = {**SQUARE, "num_registers": 4}
# What each layout holds of what ViT can be.
TIMM = {
    "plain": {},
    "mean of patches": {"pool": "mean", "cls_token": False, "positions": "sincos"},
    "norm after": {"pool": "mean", "pool_before_norm": True},
    "registers": {"num_registers": 3, "layer_scale": 1.0},
    "gated": {"mlp": "swiglu", "layer_scale": 1.0, "mlp_dim": 48},
    "distilled": {"distillation_token": True},
    "map of all": {"pool": "map", "cls_token": False, "mlp": "gelu_tanh"},
    "map of patches": {"pool": "map", "pool_tokens": "patches", "mlp": "quick_gelu"},
    "backbone": {"num_classes": 0, "qkv_bias": False},
    "only registers": {"num_registers": 2, "cls_token": False, "pool": "mean"},
}
HUGGING_FACE = {
    "plain": {"norm_epsilon": 1e-12},
    "pooler": {"num_classes": 0, "representation_size": 32},
    "distilled": {"distillation_token": True, "mlp": "gelu_tanh"},
    "dinov2": SQUARE,
    "dinov2, both": {**SQUARE, "pool": "cls_mean"},
    "registers, gated": {**REGISTERS, "mlp": "swiglu", "mlp_dim": 88},
    "registers": {**REGISTERS, "num_classes": 0},
    "oblong patches": {"patch_size": (8, 16)},
}
CASES = [("timm", name) for name in TIMM] + [("hf", name) for name in HUGGING_FACE]


def make(layout, name):
    options = (TIMM if layout == "timm" else HUGGING_FACE)[name]
    model = ViT(**{**SMALL, **options}).validate()
    return model, random_params(model)


def images_of(model):
    generator = np.random.default_rng(0)
    images = generator.normal(size=(2, *model.image_size, 3))
    return jnp.asarray(images, jnp.float32)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_what_was_saved_is_read_again(tmp_path, layout, name):
    model, params = make(layout, name)
    names = tuple(f"class {k}" for k in range(model.num_classes))
    pretrained.save(model, params, tmp_path, layout=layout, class_names=names)
    loaded = pretrained.load(tmp_path)
    assert loaded.class_names == names
    expected = model.apply({"params": params}, images_of(model))
    got = compute(loaded, images_of(model))
    np.testing.assert_allclose(got["logits"], expected[0], atol=2e-6)
    np.testing.assert_allclose(got["tokens"], expected[1]["tokens"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_libraries_open_it_with_equal_outputs(tmp_path, layout, name):
    torch = pytest.importorskip("torch")
    model, params = make(layout, name)
    pretrained.save(model, params, tmp_path, layout=layout)
    logits, out = model.apply({"params": params}, images_of(model))
    images = torch.from_numpy(np.array(images_of(model))).permute(0, 3, 1, 2)
    if layout == "timm":
        timm = pytest.importorskip("timm")
        peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        with torch.no_grad():
            got, expected = peer(images), logits
    else:
        transformers = pytest.importorskip("transformers")
        config = json.loads((tmp_path / "config.json").read_text())
        kind = getattr(transformers, config["architectures"][0])
        peer, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        unset = {n for n in report["missing_keys"] if not n.startswith("pooler.")}
        assert not unset | set(report["unexpected_keys"])
        with torch.no_grad():
            output = peer.eval()(images)
        if model.num_classes:
            got, expected = output.logits, logits
        elif model.representation_size:
            got, expected = output.pooler_output, logits
        else:
            got, expected = output.last_hidden_state, out["tokens"]
    error = np.abs(got.numpy() - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize("crop", [None, 0.875])
@pytest.mark.parametrize("layout", ["timm", "hf", "wf_vit"])
def test_images_are_prepared_as_before(tmp_path, layout, crop):
    model = ViT(**{**SMALL, "image_size": (32, 32)})
    form = ImageFormat(*IMAGENET, "bicubic", crop)
    loaded = pretrained.Pretrained(
        model, random_params(model), Preprocess((32, 32), form)
    )
    loaded.save(tmp_path, layout=layout)
    picture = np.random.default_rng(0).integers(0, 256, (50, 61, 3)).astype(np.uint8)
    # Where a library rounds half a pixel the other way.
    got, expected = (
        x.preprocess([picture]) for x in (pretrained.load(tmp_path), loaded)
    )
    assert got.shape == expected.shape
    shifted = [got[:, :, 1:] - expected[:, :, :-1], got - expected]
    assert min(np.abs(x).max() for x in shifted) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_our_own_layout_holds_every_kind(tmp_path, name):
    loaded = load(name)
    assert from_json(to_json(loaded.model)) == loaded.model
    loaded.save(tmp_path)
    again = pretrained.load(tmp_path)
    assert again.model == loaded.model
    assert again.preprocess == loaded.preprocess
    assert again.resampling == loaded.resampling
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_a_winft_is_saved_in_our_own_layout_alone(tmp_path):
    model = WindowFreeViT(**SMALL)
    params = random_params(model)
    for layout in ("timm", "hf"):
        with pytest.raises(UsageError, match=r"fields \(WindowFreeViT\).*'wf_vit'"):
            pretrained.save(model, params, tmp_path, layout=layout)
    pretrained.save(model, params, tmp_path)
    loaded = pretrained.load(tmp_path / "model.safetensors")
    assert loaded.model == model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        ("timm", "hf_vit", "an epsilon of 1e-12"),
        ("timm", "hf_dinov3_gated", "rotary positions"),
        ("timm", "hf_beit", "relative positions"),
        ("timm", "apple_aimv2", "RMS norms, a normalised embedding"),
        ("hf", "timm_mean_fc_norm", "pool='mean', its final norm after"),
        ("hf", "timm_siglip2", "no CLS token, pool='map'"),
        ("hf", "timm_eva02_inner_norm", "normalised hidden layers"),
        ("onnx", "timm_vit", "choose one of timm, hf, wf_vit"),
    ],
)
def test_what_a_layout_cannot_hold_is_named(tmp_path, layout, name, message):
    with pytest.raises(UsageError, match=message):
        load(name).save(tmp_path, layout=layout)
    assert not list(tmp_path.iterdir())


def test_a_damaged_folder_of_ours_is_named(tmp_path):
    load("timm_vit").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"wf_vit": 2}, {"images": 3}, {"model": {"name": "vit"}}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UsageError, match=str(tmp_path)):
            pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UsageError, match="Download it again"):
        pretrained.load(tmp_path)


def test_a_checkpoint_of_timm_survives_the_way_there_and_back(tmp_path):
    for name in ("timm_vit", "timm_deit_distilled", "timm_dinov2_registers_swiglu"):
        load(name).save(tmp_path / name, layout="timm")
        arrays = load_file(FIXTURES / name / "model.safetensors")
        again = load_file(tmp_path / name / "model.safetensors")
        assert {k: v.shape for k, v in again.items()} == {
            k: v.shape for k, v in arrays.items()
        }
        expected = expected_of(name)["16x16"]
        got = compute(pretrained.load(tmp_path / name), expected["images"])
        np.testing.assert_allclose(got["logits"], expected["logits"], atol=1e-5)


def test_a_checkpoint_is_exported_in_one_command(tmp_path):
    arguments = ["--config=export", f"--workdir={tmp_path}", "--config.layout=timm"]
    with pytest.raises(UsageError, match=r"config\.weights is empty"):
        command.run(arguments)
    weights = FIXTURES / "timm_dinov2_registers_swiglu"
    command.run([*arguments, f"--config.weights={weights}"])
    got, expected = pretrained.load(tmp_path).params, pretrained.load(weights).params
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    # Into the folder of a run, its settings would be lost.
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name, message in {"run": "config.json would", "file": "be written"}.items():
        elsewhere = ["--config=export", f"--workdir={tmp_path / name}"]
        with pytest.raises(UsageError, match=message):
            command.run([*elsewhere, f"--config.weights={weights}"])
