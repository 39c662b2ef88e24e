"""Every config loads, is locked, can be overridden, and describes a model."""

import importlib
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from wf_vit.models import registry
from wf_vit.train import loop, schedule

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = {
    "digits": ["windowfree", "vit"],
    "cifar10": ["windowfree", "vit"],
    "windowfree": ["", "runlocal"],
    "vit": ["", "runlocal"],
    "finetune": ["caltech_birds2011", "stanford_dogs"],
}


def load(name, argument):
    return importlib.import_module(f"configs.{name}").get_config(argument)


def test_every_config_is_listed_here():
    files = {path.stem for path in (ROOT / "configs").glob("[!_]*.py")}
    assert files == set(ARGUMENTS)


@pytest.mark.parametrize(
    ("name", "argument"), [(n, a) for n, args in ARGUMENTS.items() for a in args]
)
def test_config(name, argument):
    config = load(name, argument)
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.batchsize = 3
    config.batch_size = 64
    config.warmup_steps = 3
    steps = schedule.durations(config, num_train=64_000)
    assert steps.warmup == 3
    assert steps.steps_per_epoch == 1000
    registry.create_model(
        config.model, num_classes=10, image_size=config.data.image_size
    )
    docstring = importlib.import_module(f"configs.{name}").__doc__
    assert f"configs/{name}.py" in docstring


def test_vit_and_windowfree_differ_in_the_model_only():
    vit, windowfree = load("vit", "").to_dict(), load("windowfree", "").to_dict()
    assert vit.pop("model") | {"name": ""} == windowfree.pop("model") | {"name": ""}
    assert vit == windowfree


@pytest.mark.parametrize("name", ["windowfree", "vit"])
def test_imagenet_recipe_runs_on_mock_data(name, tmp_path):
    config = load(name, "runlocal")
    with tfds.testing.mock_data(num_examples=40):
        metrics = loop.train(config, tmp_path)
    assert set(metrics) == {
        f"{split}/{metric}"
        for split in ("minival", "validation")
        for metric in ("top1", "loss")
    }
    assert (tmp_path / "checkpoints" / "10").is_dir()
