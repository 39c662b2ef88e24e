"""The benchmark that trains several seeds does to each what a run of its own would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sweep
from tests.networks import apply
from wf_vit.errors import UsageError
from wf_vit.train.config import default_config


def tiny_config():
    """A window-free transformer, guided at random, for two epochs of three steps."""
    config = default_config("windowfree", "mu/4")
    config.model.update(width=16, depth=1, mlp_dim=16, dtype="float32")
    config.data.update(image_size=8, crop="pad", pad=1)
    config.data.augment.flip_probability = 0.5
    config.guidance.weight = 0.5
    config.guidance.indicator = "random"
    config.batch_size = 8
    config.eval_batch_size = 5
    config.total_epochs = 2.0
    config.eval_epochs = 1.0
    config.optimizer.learning_rate = 1e-2
    return config


def random_split(seed, count):
    rng = np.random.default_rng(seed)
    return sweep.OnDevice(
        jnp.asarray(rng.integers(0, 256, (count, 8, 8, 3), np.uint8)),
        jnp.asarray(rng.integers(0, 3, (count,), np.int32)),
    )


TEST, CLASSES = random_split(1, 10), ("a", "b", "c")


def run(seeds):
    runs = sweep.Sweep(tiny_config(), seeds, random_split(0, 30), TEST, CLASSES)
    return runs, [row for _, row in runs.run()]


def test_seeds_at_once_are_what_they_are_in_turn(monkeypatch):
    monkeypatch.setattr(sweep, "in_turn", lambda: False)
    at_once, rows = run([3, 5])
    monkeypatch.setattr(sweep, "in_turn", lambda: True)
    in_turn, other_rows = run([5, 3])
    assert at_once.states.step.shape == ()
    assert in_turn.states.step.shape == (2,)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row, other in zip(rows, other_rows, strict=True):
        for name in ("train/loss", "train/guidance_loss", "test/loss", "test/top1"):
            assert row[name] == pytest.approx(other[name][::-1], rel=1e-3), name
        assert row["train/loss"][0] != pytest.approx(row["train/loss"][1], rel=1e-4)
    # The test images are counted once each.
    first = in_turn.first_state()
    assert int(first.step) == 6
    images = (TEST.images / jnp.float32(255) - 0.5) / 0.5
    logits, _ = apply(in_turn.training.model, first.params, images)
    top1 = (logits.argmax(-1) == TEST.labels).mean()
    assert other_rows[-1]["test/top1"][0] == pytest.approx(float(top1))
    hard = in_turn.hard(0.25)
    assert all(1 / 4 <= kept <= 1 for kept in hard["kept"])
    assert len(hard["kept"]) == len(hard["test/top1"]) == 2


def test_crops_are_windows_of_the_padded_image():
    images = jnp.asarray(
        np.arange(1, 1 + 50 * 16).reshape(50, 4, 4, 1) % 251, jnp.uint8
    )
    images = images.repeat(3, axis=-1)
    cropped = sweep.pad_and_crop(jax.random.key(0), images, pad=2, mode="constant")
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = set()
    for image, whole in zip(np.asarray(cropped), padded, strict=True):
        found = [
            (y, x)
            for y, x in np.ndindex(5, 5)
            if np.array_equal(whole[y : y + 4, x : x + 4], image)
        ]
        assert len(found) == 1
        corners |= set(found)
    assert len(corners) > 15


def test_test_images_that_do_not_fill_batches_are_named():
    with pytest.raises(UsageError, match="12 test images do not fill batches of 5"):
        sweep.Sweep(
            tiny_config(), [0], random_split(0, 16), random_split(1, 12), CLASSES
        )
