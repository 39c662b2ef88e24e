"""Loaded models: they compute what the libraries do; misfits are listed; new heads."""

import logging
import re

import jax
import numpy as np
import pytest

from tests.models.pretrained.checkpoints import (
    FIXTURES,
    compute,
    copy_with,
    expected_of,
    load,
)
from wf_vit.errors import UsageError
from wf_vit.models import pretrained

NAMES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_computes_what_the_source_library_does(name):
    outputs = expected_of(name)
    assert outputs
    for size, expected in outputs.items():
        images = expected.pop("images")
        loaded = load(name, image_size=images.shape[1:3])
        assert loaded.model.image_size == loaded.preprocess.image_size
        got = compute(loaded, images)
        assert expected
        for kind, array in expected.items():
            np.testing.assert_allclose(
                got[kind], array, atol=1e-5, err_msg=f"{kind} at {size}"
            )


@pytest.mark.parametrize("name", ["timm_oblong", "hf_oblong"])
def test_an_oblong_grid_is_the_configs_or_the_callers(tmp_path, name):
    """3 x 5 patches and CLS have as many positions as 4 x 4 patches."""
    ((_, expected),) = expected_of(name).items()
    loaded = pretrained.load(FIXTURES / name)
    assert loaded.model.image_size == (12, 20)
    folder = copy_with(name, tmp_path, lambda arrays: None)
    (folder / "config.json").unlink()
    bare = pretrained.load(folder, image_size=(12, 20), num_heads=2)
    for opened in (loaded, bare):
        got = compute(opened, expected["images"])
        np.testing.assert_allclose(got["logits"], expected["logits"], atol=1e-5)


def test_the_real_dinov2_within_the_stated_bounds(shared):
    loaded = pretrained.load(shared / "weights/dinov2_s14.safetensors", image_size=224)
    with np.load(shared / "reference/dinov2_s14_reference.npz") as file:
        reference = dict(file)
    images = loaded.preprocess.normalize(reference["images"])
    forward = jax.jit(
        lambda params, x: loaded.model.apply({"params": params}, x, record=(0, 11))[1]
    )
    out = forward(loaded.params, images)
    np.testing.assert_allclose(
        out["tokens"], reference["last_hidden_state"], atol=2e-4, rtol=0
    )
    for layer in (0, 11):
        np.testing.assert_allclose(
            out["records"][layer]["attention"][:, :, :8],
            reference[f"attention_layer{layer}"],
            atol=1e-5,
            rtol=0,
        )


def test_every_mismatch_is_listed_by_name(tmp_path):
    def damage(arrays):
        del arrays["blocks.0.mlp.fc2.bias"]
        arrays["blocks.1.mlp.fc1.weight"] = np.zeros((25, 16), np.float32)
        arrays["blocks.0.attn.qkv.weight"] = np.zeros((47, 16), np.float32)
        arrays["blocks.0.attn.q_norm.weight"] = np.zeros(8, np.float32)
        arrays["norm_pre.weight"] = np.zeros(16, np.float32)

    with pytest.raises(UsageError) as error:
        pretrained.load(copy_with("timm_vit", tmp_path, damage))
    listing = str(error.value).splitlines()[1:]
    assert sorted(line.strip() for line in listing) == sorted(
        [
            "missing: blocks_0/mlp/down/bias",
            "missing: blocks_0/attention/query/kernel",
            "missing: blocks_0/attention/key/kernel",
            "missing: blocks_0/attention/value/kernel",
            "unknown: blocks.0.attn.qkv.weight (here blocks_0/attention/qkv/kernel)",
            "unknown: blocks.0.attn.q_norm.weight (here blocks_0/attn.q_norm/scale)",
            "missing: embedding_norm/bias",
            "misshapen: blocks.1.mlp.fc1.weight (here blocks_1/mlp/up/kernel) is "
            "(16, 25), expected (16, 24)",
        ]
    )


def test_a_missing_block_is_noticed(tmp_path):
    def remove(arrays):
        for name in [n for n in arrays if n.startswith("blocks.0.")]:
            del arrays[name]

    with pytest.raises(UsageError, match="of blocks_1, but none of blocks_0"):
        pretrained.load(copy_with("timm_vit", tmp_path, remove))


def test_the_head_is_kept_replaced_or_removed(caplog):
    source = FIXTURES / "timm_deit_distilled"
    kept = pretrained.load(source)
    same = pretrained.load(source, num_classes=5)
    assert kept.model.num_classes == same.model.num_classes == 5
    jax.tree.map(np.testing.assert_array_equal, kept.params, same.params)
    with caplog.at_level(logging.INFO):
        new = pretrained.load(source, num_classes=7)
    assert "for 5 classes, makes way for a new one for 7" in caplog.text
    for head in ("head", "head_distillation"):
        assert new.params[head]["kernel"].shape == (16, 7)
        assert not new.params[head]["kernel"].any()
    none = pretrained.load(source, num_classes=0)
    assert not {"head", "head_distillation"} & none.params.keys()
    images = expected_of("timm_deit_distilled")["16x16"]["images"]
    np.testing.assert_array_equal(
        compute(none, images)["tokens"], compute(kept, images)["tokens"]
    )


@pytest.mark.parametrize("name", ["timm_vit", "hf_vit", "timm_pe_core", "hf_siglip"])
@pytest.mark.parametrize(
    "pattern", [r"(^|\.)(norm|(post_)?layernorm)\.", r"(norm1|layernorm_before)\.bias"]
)
def test_what_a_whole_model_lacks_is_missing_and_not_an_option(tmp_path, name, pattern):
    def damage(arrays):
        for array in [n for n in arrays if re.search(pattern, n) and "head" not in n]:
            del arrays[array]

    with pytest.raises(UsageError, match=r"missing: (norm|blocks_0/attention_norm)/"):
        pretrained.load(copy_with(name, tmp_path, damage))
