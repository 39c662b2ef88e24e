"""The architecture that names, shapes and configs imply."""

import json

import numpy as np
import pytest

from tests.models.pretrained.checkpoints import (
    FIXTURES,
    compute,
    copy_with,
    expected_of,
    source_of,
)
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.positions import sincos_positions


def test_num_heads_is_the_configs_the_callers_or_conventional(tmp_path):
    assert pretrained.load(FIXTURES / "timm_vit").model.num_heads == 2
    assert pretrained.load(FIXTURES / "timm_vit", num_heads=4).model.num_heads == 4
    with pytest.raises(UsageError, match="3 heads do not divide"):
        pretrained.load(FIXTURES / "timm_vit", num_heads=3)

    def widen(arrays):
        for name, array in arrays.items():
            arrays[name] = np.kron(
                array, np.ones([8 if n in (16, 48) else 1 for n in array.shape])
            ).astype(np.float32)

    folder = copy_with("timm_vit", tmp_path, widen)
    (folder / "config.json").unlink()
    assert pretrained.load(folder).model.num_heads == 2  # 128 / 64


def test_a_grid_that_is_not_square_comes_from_the_config(tmp_path):
    def three_by_four(arrays):
        arrays["pos_embed"] = arrays["pos_embed"][:, :13]

    folder = copy_with("timm_vit", tmp_path, three_by_four)
    with pytest.raises(UsageError, match=r"13 entries.*4x4.*config\.json"):
        pretrained.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["img_size"] = [12, 16]
    (folder / "config.json").write_text(json.dumps(config))
    assert pretrained.load(folder).model.grid == (3, 4)


def test_a_size_in_the_config_does_not_outvote_the_table(tmp_path):
    folder = copy_with("hf_vit", tmp_path, lambda arrays: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_size": 224}))
    assert pretrained.load(folder).model.image_size == (16, 16)


def test_fixed_positions_need_no_table(tmp_path):
    with np.load(source_of("big_vision_mean")) as file:
        arrays = dict(file)
    table = sincos_positions((4, 4), 16)
    arrays["params/pos_embedding"] = table[None]
    np.savez(tmp_path / "learned.npz", **arrays)
    del arrays["params/pos_embedding"]
    np.savez(tmp_path / "fixed.npz", **arrays)
    with pytest.raises(UsageError, match="image_size"):
        pretrained.load(tmp_path / "fixed.npz")
    fixed = pretrained.load(tmp_path / "fixed.npz", image_size=16)
    learned = pretrained.load(tmp_path / "learned.npz")
    assert fixed.model.positions == "sincos"
    images = expected_of("big_vision_mean")["16x16"]["images"]
    np.testing.assert_allclose(
        compute(fixed, images)["logits"], compute(learned, images)["logits"], atol=1e-6
    )


def test_pre_logits_come_before_the_head_and_go_with_it(tmp_path):
    with np.load(source_of("google_augreg")) as file:
        arrays = dict(file)
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(16, 12)), generator.normal(size=12)
    arrays["pre_logits/kernel"], arrays["pre_logits/bias"] = weight, bias
    arrays["head/kernel"] = generator.normal(size=(12, 5))
    np.savez(tmp_path / "weights.npz", **arrays)
    images = expected_of("google_augreg")["16x16"]["images"]
    got = compute(pretrained.load(tmp_path / "weights.npz"), images)
    pooled = np.tanh(np.asarray(got["tokens"][:, 0]) @ weight + bias)
    logits = pooled @ arrays["head/kernel"] + arrays["head/bias"]
    np.testing.assert_allclose(got["logits"], logits, atol=1e-5)
    new = pretrained.load(tmp_path / "weights.npz", num_classes=3)
    assert new.model.representation_size is None
    assert new.params["head"]["kernel"].shape == (16, 3)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("fc_norm.weight", np.ones(16), r"fc_norm\.weight and norm\.weight"),
        ("pos_embed", np.ones((1, 17, 15)), "positions have the shape"),
        ("patch_embed.proj.weight", np.ones((16, 48)), "of a convolution"),
    ],
)
def test_contradictions_are_named(tmp_path, name, array, message):
    def change(arrays):
        arrays[name] = array.astype(np.float32)

    with pytest.raises(UsageError, match=message):
        pretrained.load(copy_with("timm_vit", tmp_path, change))
