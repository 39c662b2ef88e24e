"""Pictures of a model in training, and what happens when they cannot be drawn."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.networks import random_params
from tests.runs import small_winft
from wf_vit.models.vit import ViT
from wf_vit.train import loop, run
from wf_vit.train.pictures import draw_pictures
from wf_vit.train.reporter import read_jsonl

RNG = np.random.default_rng(0)


def drawn(model):
    images = RNG.integers(0, 256, (3, *model.image_size, 3), np.uint8)
    params = random_params(model)
    return draw_pictures(model, params, images, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_each_kind_of_model_has_its_pictures():
    pictures = drawn(small_winft(num_classes=5, image_size=16))
    fields = {"tendency/0", "tendency/1", "learned_fields"}
    assert fields <= set(pictures)
    vit = ViT(
        num_classes=3,
        image_size=(16, 24),
        patch_size=(4, 4),
        width=16,
        depth=2,
        mlp_dim=16,
        num_heads=2,
        num_registers=1,
    )
    pictures = drawn(vit)
    assert set(pictures) == {
        f"{kind}/{image}" for kind in ("tendency", "class_attention") for image in "01"
    }
    for picture in pictures.values():
        assert picture.dtype == np.uint8
        assert picture.shape[0] == 1
        assert picture.shape[2] > 300
        assert picture.std() > 10


def test_a_run_shows_pictures_at_each_evaluation(digits_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "save_figures", lambda *_, **__: None)
    with digits_config.unlocked():
        digits_config.pictures = True
    loop.train(digits_config, tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = {*events.Tags()["images"], *events.Tags()["tensors"]}
    assert {"tendency/0", "learned_fields"} <= {
        tag.removesuffix("/image").removesuffix("/0") if "learned" in tag else tag
        for tag in tags
    }
    scalars = {name for row in read_jsonl(tmp_path) for name in row}
    assert {"train/top1", "test/top1", "train/loss", "test/loss"} <= scalars


def test_a_picture_that_fails_does_not_stop_a_run(
    digits_config, tmp_path, monkeypatch, caplog
):
    def fail(*_, **__):
        raise ValueError("no canvas")

    monkeypatch.setattr(loop, "save_figures", lambda *_, **__: None)
    monkeypatch.setattr(run, "draw_pictures", fail)
    with digits_config.unlocked():
        digits_config.pictures = True
    loop.train(digits_config, tmp_path)
    said = [r.getMessage() for r in caplog.records if "Pictures" in r.getMessage()]
    assert len(said) == 1  # Of two evaluations.
    assert "no canvas" in said[0]
    assert read_jsonl(tmp_path)[-1]["step"] == 4


def test_rows_of_earlier_versions_have_the_names_of_today(tmp_path):
    row = {"step": 1, "train/accuracy": 0.5, "test/top1": 0.4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert read_jsonl(tmp_path) == [{"step": 1, "train/top1": 0.5, "test/top1": 0.4}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_any_dtype_are_drawn(dtype):
    model = small_winft(num_classes=5, image_size=16).clone(dtype=jnp.dtype(dtype))
    assert "tendency/0" in drawn(model)
