"""Files, folders and the hub: what is read from them, and what cannot be."""

import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.pretrained.checkpoints import FIXTURES, copy_with, source_of
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained import readers
from wf_vit.models.pretrained.preprocess import HALF, IMAGENET, ImageFormat


def test_training_checkpoints_are_unwrapped():
    state = {"blocks": 1}
    assert readers.unwrap(state) == state
    assert readers.unwrap({"model": state, "epoch": 3}) == state
    both = {"student": {}, "teacher": {"state_dict": state}, "model": {}}
    assert readers.unwrap(both) == state


def test_half_precision_files(tmp_path):
    expected = pretrained.load(source_of("google_augreg")).params
    with np.load(source_of("google_augreg")) as file:
        arrays = {k: v.astype(ml_dtypes.bfloat16) for k, v in file.items()}
    np.savez(tmp_path / "weights.npz", **arrays)  # NumPy forgets the type
    got = pretrained.load(tmp_path / "weights.npz").params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), got, expected
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}


def test_shards_are_joined(tmp_path):
    arrays = load_file(FIXTURES / "hf_vit/model.safetensors")
    names = sorted(arrays)
    files = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: arrays[n] for n in names if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    shutil.copy(FIXTURES / "hf_vit/config.json", tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal,
        pretrained.load(tmp_path).params,
        pretrained.load(FIXTURES / "hf_vit").params,
    )
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model-1\.safetensors"):
        pretrained.load(tmp_path)


def test_what_cannot_be_read_is_explained(tmp_path):
    with pytest.raises(UsageError, match="There is no checkpoint at"):
        pretrained.load(tmp_path / "nowhere.npz")
    with pytest.raises(UsageError, match=r"not one checkpoint but 0 \(none\)"):
        pretrained.load(tmp_path)
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, conv_root=np.zeros(1))
    with pytest.raises(UsageError, match=r"2 \(a\.npz, b\.npz\): name the file"):
        pretrained.load(tmp_path)
    with pytest.raises(UsageError, match="first names are: conv_root"):
        pretrained.load(tmp_path / "a.npz")
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(UsageError, match="convert it first"):
        pretrained.load(tmp_path / "a.ckpt")


def test_a_pth_without_torch_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").touch()
    with pytest.raises(UsageError, match="pip install torch"):
        pretrained.load(tmp_path / "a.pth")


def test_the_hub(monkeypatch):
    def download(repository, revision, allow_patterns):
        assert (repository, revision) == ("owner/hf_vit", "v1")
        assert "config.json" in allow_patterns
        return str(FIXTURES / repository.partition("/")[2])

    hub = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert pretrained.load("hf://owner/hf_vit@v1").model.num_classes == 5

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    hub.snapshot_download = fail
    with pytest.raises(UsageError, match=r"owner/hf_vit .*no route to host"):
        pretrained.load("hf://owner/hf_vit")
    with pytest.raises(UsageError, match="not of the form"):
        pretrained.load("hf://hf_vit")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"wf-vit\[hub\]"):
        pretrained.load("hf://owner/hf_vit")


def test_unknown_activations_are_refused(tmp_path):
    folder = copy_with("hf_vit", tmp_path, lambda arrays: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UsageError, match="hidden_act='relu'"):
        pretrained.load(folder)


def test_recipes_come_from_the_files_beside_the_weights(tmp_path):
    timm = pretrained.load(FIXTURES / "timm_vit").preprocess.image_format
    assert timm == ImageFormat((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.9)
    folder = copy_with("hf_vit", tmp_path, lambda arrays: None)
    assert pretrained.load(folder).preprocess.image_format == ImageFormat(
        *HALF, "bilinear", None
    )
    dinov2 = {
        "image_mean": IMAGENET[0],
        "image_std": IMAGENET[1],
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(dinov2))
    recipe = pretrained.load(folder).preprocess.image_format
    assert recipe == ImageFormat(*IMAGENET, "bicubic", 0.875)
    for size, crop in (({"height": 224, "width": 224}, None), (224, None)):
        preprocessor = {**dinov2, "size": size, "do_center_crop": False}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        assert pretrained.load(folder).preprocess.image_format.crop == crop
