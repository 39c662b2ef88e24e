"""Files, folders and the hub: what is read from them, and what cannot be."""

import argparse
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

from tests.models.pretrained.checkpoints import FIXTURES, source_of
from wf_vit.errors import UsageError
from wf_vit.models import pretrained


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
    (tmp_path / "a.h5").touch()
    with pytest.raises(UsageError, match="convert it first"):
        pretrained.load(tmp_path / "a.h5")


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


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_damaged_files_are_named_with_what_to_do(tmp_path, suffix):
    arrays = load_file(FIXTURES / "timm_vit/model.safetensors")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"\0" * 64, whole[9:]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=rf"weights\{suffix} .*Download it again"):
            pretrained.load(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    with pytest.raises(UsageError, match="git lfs pull"):
        pretrained.load(path)


def test_an_npz_of_python_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.asarray([{"a": 1}], object))
    with pytest.raises(UsageError, match=r"a\.npz .* cannot be read"):
        pretrained.load(tmp_path / "a.npz")


def test_a_broken_index_of_shards_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(UsageError, match="no weight_map"):
        pretrained.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(UsageError, match="outside of its folder"):
        pretrained.load(tmp_path)


@pytest.mark.slow
def test_torch_files_are_read_or_explained_and_never_unpickled(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = load_file(FIXTURES / "timm_vit/model.safetensors")
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    expected = pretrained.load(arrays, num_heads=2).params
    extras = {
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "step": np.int64(3),
        "epoch": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
    }
    for suffix in (".pth", ".pt", ".bin", ".ckpt", ".pth.tar"):
        path = tmp_path / f"weights{suffix}"
        torch.save({"state_dict": state, **extras}, path)
        got = pretrained.load(path, num_heads=2).params
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    module = torch.nn.Linear(2, 2)
    for content, message in (
        (module, "never runs the code"),
        ({"model": module}, "never runs the code"),
        ([state], "holds a list"),
        ({"epoch": 3}, "no array by name"),
    ):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(UsageError, match=message):
            pretrained.load(tmp_path / "odd.pth")
    whole = (tmp_path / "weights.pth").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\0" * 64, whole[9:]):
        (tmp_path / "cut.pth").write_bytes(content)
        with pytest.raises(UsageError, match=r"cut\.pth"):
            pretrained.load(tmp_path / "cut.pth")
