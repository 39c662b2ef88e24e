"""Runs of our own, loaded as published checkpoints are."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from tests.models.pretrained.checkpoints import FIXTURES, compute
from tests.networks import random_params
from tests.runs import DATA, small_winft, write_run
from wf_vit import settings
from wf_vit.data.config import View
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained.preprocess import (
    ImageFormat,
    Preprocess,
    tensorflow_name,
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two checkpoints, the second with a moving average."""
    folder = tmp_path_factory.mktemp("run")
    model = small_winft(num_classes=5, image_size=16, positions="learned")
    params = random_params(model)
    average = jax.tree.map(lambda x: x + 1, params)
    data = {
        "augment": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        "resize_method": "bicubic",
        "eval_resize": 0.875,
    }
    write_run(folder, model, params, step=1, data=data)
    write_run(folder, model, params, step=12, average=average, data=data)
    return folder, model, params


def test_a_run_gives_what_it_would_be_evaluated_with(run_folder):
    folder, model, params = run_folder
    last = pretrained.load(folder)
    assert last.model == model
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b + 1), last.params, params
    )
    first = pretrained.load(str(folder / "checkpoints/1"))
    jax.tree.map(np.testing.assert_array_equal, first.params, params)
    recipe = ImageFormat((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 0.875)
    assert last.preprocess == Preprocess((16, 16), recipe)


def test_every_way_of_resizing_can_be_opened(run_folder, tmp_path, caplog):
    _, model, params = run_folder
    near = {"lanczos5": "lanczos", "gaussian": "bilinear", "mitchellcubic": "bicubic"}
    names = {"lanczos3": "lanczos", "area": "box", **near}
    for method in settings.of(View)["resize_method"].choices:
        write_run(
            tmp_path / method, model, params, data={**DATA, "resize_method": method}
        )
        caplog.clear()
        form = pretrained.load(tmp_path / method).preprocess.image_format
        assert form.interpolation == names.get(method, method)
        assert ("Pillow does not have" in caplog.text) == (method in near)
        if method not in near:
            assert tensorflow_name(form.interpolation) == method


def test_a_run_can_be_resized_and_get_a_new_head(run_folder):
    folder, _, _ = run_folder
    loaded = pretrained.load(folder, image_size=(8, 24), num_classes=3)
    assert loaded.params["position_table"].shape == (2, 6, 32)
    logits = compute(loaded, np.zeros((1, 8, 24, 3), np.float32))["logits"]
    assert logits.shape == (1, 3)


def test_a_loaded_model_is_resized_as_the_file_would_be(run_folder):
    folder, _, _ = run_folder
    resized = pretrained.load(folder).resized((8, 24))
    expected = pretrained.load(folder, image_size=(8, 24))
    assert resized.model == expected.model
    assert resized.preprocess == expected.preprocess
    jax.tree.map(np.testing.assert_array_equal, resized.params, expected.params)
    assert resized.resized((8, 24)) is resized
    with pytest.raises(UsageError, match=r"do not divide an image height of 9"):
        resized.resized((9, 24))


def test_a_run_without_checkpoints_or_config_is_explained(tmp_path, run_folder):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="train first"):
        pretrained.load(tmp_path)
    shutil.copytree(run_folder[0] / "checkpoints", tmp_path / "b/checkpoints")
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        pretrained.load(tmp_path / "b")


def test_a_folder_called_checkpoints_is_not_a_run_for_its_name(tmp_path, run_folder):
    expected = pretrained.load(FIXTURES / "timm_vit").params

    def assert_opens(source):
        got = pretrained.load(source, num_heads=2).params
        jax.tree.map(np.testing.assert_array_equal, got, expected)

    foreign = tmp_path / "checkpoints"
    shutil.copytree(FIXTURES / "timm_vit", foreign)
    (foreign / "config.json").unlink()
    assert_opens(foreign / "model.safetensors")
    assert_opens(foreign)
    # Somebody's numbered folder, and an empty one beside the weights.
    shutil.copytree(foreign, tmp_path / "other/checkpoints/12")
    assert_opens(tmp_path / "other/checkpoints/12")
    assert_opens(tmp_path / "other/checkpoints/12/model.safetensors")
    (foreign / "checkpoints").mkdir()
    assert_opens(foreign)
    # A run, though its folder is that of another program.
    shutil.copytree(run_folder[0], tmp_path / "c")
    for config in ('{"train": {"lr": 0.1}}', '{"data": 3}', "[]"):
        (tmp_path / "c/config.json").write_text(config)
        with pytest.raises(UsageError, match=r"config\.json"):
            pretrained.load(tmp_path / "c")


META = "checkpoints/1/meta/metadata"


def _set(*keys, to):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (META, lambda meta: meta.pop("model")),
        (META, _set("model", to=None)),
        (META, _set("model", to={})),
        (META, lambda meta: meta["model"].pop("dtype")),
        (META, _set("model", "depth", to=10**9)),
        (META, _set("model", "depth", to=1000)),
        (META, _set("model", "depth", to="2")),
        (META, _set("model", "depth", to=-1)),
        (META, _set("model", "width", to=10**9)),
        (META, _set("model", "num_heads", to=0)),
        (META, _set("model", "image_size", to=10**9)),
        (META, _set("model", "name", to=["vit"])),
        (META, _set("model", "fields", to=3)),
        (META, _set("model", "fields", "softness", to=float("nan"))),
        (META, _set("class_names", to=3)),
        (META, _set("class_names", to=[1])),
        ("config.json", _set("data", "augment", "mean", to="abc")),
        ("config.json", _set("data", "augment", "mean", to=[0.5])),
        ("config.json", _set("data", "augment", "std", to=[0, 0, 0])),
        ("config.json", _set("data", "augment", "std", to=None)),
        ("config.json", _set("data", "augment", "std", to=[float("nan")] * 3)),
        ("config.json", lambda config: config["data"].pop("eval_resize")),
        ("config.json", _set("data", "eval_resize", to=-1)),
        ("config.json", _set("data", "resize_method", to=["bilinear"])),
    ],
)
def test_a_tampered_run_is_named(tmp_path, run_folder, file, change):
    folder = tmp_path / "run"
    shutil.copytree(run_folder[0], folder)
    shutil.rmtree(folder / "checkpoints/12")
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"run|has 2 blocks"):
        pretrained.load(folder)


def test_half_a_run_is_named(tmp_path, run_folder):
    """Each of its files is taken away, emptied, cut, or made a pipe."""
    whole = run_folder[0] / "checkpoints/1"
    # These are of the write alone; Orbax reads without them.
    idle = ("_CHECKPOINT_METADATA", "metrics/metadata", "_sharding")
    files = [
        path.relative_to(run_folder[0])
        for path in sorted(whole.rglob("*"))
        if path.is_file() and not str(path).endswith(idle)
    ]
    assert len(files) > 4
    for number, file in enumerate(files):
        for kind in ("gone", "empty", "half", "pipe"):
            folder = tmp_path / f"{number}_{kind}"
            shutil.copytree(run_folder[0], folder)
            shutil.rmtree(folder / "checkpoints/12")
            path = folder / file
            content = path.read_bytes()
            path.unlink()
            if kind == "pipe":
                os.mkfifo(path)
            elif kind != "gone":
                path.write_bytes(content[: len(content) // 2 if kind == "half" else 0])
            message = ""
            try:
                pretrained.load(folder)
            except UsageError as error:
                message = str(error)
            # Of some files Orbax has another copy.
            assert str(folder) in message or (not message and kind != "pipe"), path
    shutil.copytree(run_folder[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/12/state")
    with pytest.raises(UsageError, match=r"checkpoints/12 is damaged"):
        pretrained.load(tmp_path / "run")


def test_weights_of_a_run_are_finite(tmp_path, run_folder):
    _, model, params = run_folder
    params = jax.tree.map(lambda x: x, params)
    params["head"]["bias"] = params["head"]["bias"].at[0].set(np.nan)
    write_run(tmp_path, model, params)
    with pytest.raises(UsageError, match="head/bias has NaN"):
        pretrained.load(tmp_path)
