"""Every config loads, is locked, can be overridden, and describes a model."""

import importlib
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from tests.cases import slow
from wf_vit.models import registry
from wf_vit.models.registry import ModelConfig
from wf_vit.train import loop
from wf_vit.train.config import durations
from wf_vit.train.reporter import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = {
    "digits": ["windowfree", "vit"],
    "cifar10": ["windowfree", "vit"],
    "windowfree": ["", "runlocal", "guided"],
    "vit": ["", "runlocal"],
    "finetune": [
        "caltech_birds2011",
        "cars196",
        "oxford_flowers102",
        "stanford_dogs",
    ],
    # These train nothing; they have a test of their own.
    "explain": [],
    "export": [],
    "verify": [],
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
    steps = durations(config, num_train=64_000)
    assert steps.warmup == 3
    assert steps.steps_per_epoch == 1000
    registry.create_model(
        ModelConfig.of(config.model), num_classes=10, image_size=config.data.image_size
    )
    docstring = importlib.import_module(f"configs.{name}").__doc__
    assert f"configs/{name}.py" in docstring


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("explain", {"image_size": (224,)}),
        ("export", {"layout": "timm"}),
        ("verify", {"seed": 3}),
    ],
)
def test_config_of_an_analysis(name, override):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert config.task == name
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.weigths = "model.npz"
    config.update(weights="model.npz", **override)
    assert f"configs/{name}.py" in module.__doc__


def test_vit_and_windowfree_differ_in_the_model_only():
    vit, windowfree = load("vit", "").to_dict(), load("windowfree", "").to_dict()
    assert vit.pop("model") | {"name": ""} == windowfree.pop("model") | {"name": ""}
    assert vit == windowfree


@pytest.mark.parametrize("name", ["windowfree", slow("vit")])
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


# A published ViT of 16 pixels, patches of 4 and 5 classes.
PUBLISHED = ROOT / "tests" / "models" / "fixtures" / "hf_vit"


def test_guided_imagenet_recipe_runs_on_mock_data(tmp_path):
    config = load("windowfree", "runlocal")
    config.data.image_size = 32
    config.data.augment.randaugment_layers = 0  # The test before has it.
    config.total_steps = config.eval_steps = config.checkpoint_steps = 2
    config.guidance.weight = 1.0
    config.guidance.teacher = str(PUBLISHED)
    with tfds.testing.mock_data(num_examples=40):
        loop.train(config, tmp_path)
    rows = [row for row in read_jsonl(tmp_path) if "train/guidance_loss" in row]
    assert rows[0]["train/guidance_loss"] > 0
    assert rows[0]["train/attention_divergence"] > 0


def test_the_published_teacher_fits_the_student():
    """Its layers, heads and patches are those of facebook/dinov2-small."""
    config = load("windowfree", "guided")
    student = registry.create_model(
        ModelConfig.of(config.model), num_classes=10, image_size=config.data.image_size
    )
    assert (student.depth, student.num_heads) == (12, 6)
    side = config.guidance.image_size // 14
    assert student.grid == (side, side)
    steps = durations(config, num_train=1_024_000)
    assert steps.guidance == round(0.33 * 90 * 1000)


@pytest.mark.parametrize(
    "dataset",
    [
        "caltech_birds2011",
        pytest.param("cars196", marks=pytest.mark.slow),
        pytest.param("oxford_flowers102", marks=pytest.mark.slow),
        pytest.param("stanford_dogs", marks=pytest.mark.slow),
    ],
)
def test_fine_grained_recipe_runs_on_mock_data_from_a_published_vit(dataset, tmp_path):
    """At another resolution, and with fields that the ViT did not have."""
    config = load("finetune", dataset)
    config.init_from = str(PUBLISHED)
    config.model.name = "windowfree"
    config.data.image_size = 24
    config.data.shuffle_buffer = 40
    config.batch_size = config.eval_batch_size = 8
    config.total_steps = config.eval_steps = config.checkpoint_steps = 2
    with tfds.testing.mock_data(num_examples=16):
        metrics = loop.train(config, tmp_path)
    assert set(metrics) == {"test/top1", "test/loss"}
    assert read_jsonl(tmp_path)[-1]["test/loss"] == metrics["test/loss"]
