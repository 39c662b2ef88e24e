"""Modules of PyTorch and state dicts: read as their files would be."""

import json
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.models.pretrained.checkpoints import FIXTURES
from tests.models.pretrained.test_peers import assert_close
from wf_vit.errors import UsageError
from wf_vit.models import pretrained

# Without the keys in a preprocessor_config.json, which a module does not hold.
HUGGING_FACE = "hf_vit_new_names"


def arrays_of(name):
    return load_file(FIXTURES / name / "model.safetensors")


def config_of(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


def module(name, **attributes):
    """What stands in for a module of PyTorch, which is not always there."""
    attributes = {"state_dict": lambda: arrays_of(name)} | attributes
    return types.SimpleNamespace(**attributes)


def timm_module(name):
    config = config_of(name)
    arguments = config["model_args"]
    attention = types.SimpleNamespace(num_heads=arguments["num_heads"])
    mlp = types.SimpleNamespace(act=type("GELU", (), {})())
    block = type("Block", (types.SimpleNamespace,), {})(attn=attention, mlp=mlp)
    size = (arguments["img_size"], arguments["img_size"])
    return module(
        name,
        pretrained_cfg=config["pretrained_cfg"],
        global_pool=config["global_pool"],
        blocks=[block],
        patch_embed=types.SimpleNamespace(img_size=size),
    )


def hugging_face_module(name):
    config = types.SimpleNamespace(to_dict=lambda: config_of(name))
    return module(name, config=config)


@pytest.mark.parametrize("make", [timm_module, hugging_face_module])
def test_a_module_is_read_as_its_file(make):
    name = "timm_vit" if make is timm_module else HUGGING_FACE
    loaded, expected = pretrained.load(make(name)), pretrained.load(FIXTURES / name)
    assert loaded.model == expected.model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)
    if make is timm_module:
        assert loaded.preprocess == expected.preprocess
    resized = pretrained.load(make(name), image_size=(32, 48), num_classes=0)
    assert resized.model.image_size == (32, 48)


def test_a_state_dict_is_read_as_a_file_without_a_config():
    arrays = arrays_of("timm_vit")
    loaded = pretrained.load(arrays, num_heads=2)
    assert loaded.model == pretrained.load(FIXTURES / "timm_vit").model
    wrapped = pretrained.load({"model": arrays, "epoch": 3}, num_heads=2)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, wrapped.params)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "The checkpoint is a int, expected a path"),
        ({"epoch": 3}, r"no array by name in \['epoch'\]"),
        (module("timm_vit", state_dict=lambda: {}), "no array by name"),
        ({"layer.weight": np.zeros((3, 3))}, "layer.weight"),
    ],
)
def test_what_is_no_model_is_an_error(source, message):
    with pytest.raises(UsageError, match=message):
        pretrained.load(source)


def test_a_loaded_model_fits_on_a_screen():
    text = repr(pretrained.load(FIXTURES / "timm_vit"))
    assert text.startswith("Pretrained(ViT of ")
    assert "2 layers, 2 heads, width 16, 4 x 4 patches of 16 x 16 pixels" in text
    assert len(text) < 250


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules_of_timm(dtype):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=10).eval()
    model = model.to(getattr(torch, dtype))
    loaded = pretrained.load(model)
    images = torch.randn((2, 3, 224, 224))
    with torch.no_grad():
        logits = model.float()(images)
    assert_close(loaded, images.permute(0, 2, 3, 1).numpy(), logits=logits)


@pytest.mark.slow
def test_modules_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=140
    )
    model = transformers.Dinov2Model(config).eval()
    loaded = pretrained.load(model)
    assert loaded.model.num_heads == 3
    images = torch.randn((2, 3, 140, 140))
    with torch.no_grad():
        tokens = model(images).last_hidden_state
    assert_close(loaded, images.permute(0, 2, 3, 1).numpy(), tokens=tokens)
