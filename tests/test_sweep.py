"""The benchmark that trains several seeds at once does to each what one run would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sweep
from wf_vit.errors import UsageError
from wf_vit.train import recipe


def tiny_config():
    """A window-free transformer, guided at random, for two epochs of three steps."""
    config = recipe.default_config("windowfree", "mu/4")
    config.model.update(width=16, depth=1, mlp_dim=16, dtype="float32")
    config.data.update(image_size=8, crop="pad", pad=1)
    config.data.augment.flip_probability = 0.5
    config.guidance.weight = 0.5
    config.guidance.indicator = "random"
    config.batch_size = 8
    config.eval_batch_size = 5
    config.total_epochs = 2.0
    config.total_steps = 6
    config.eval_epochs = 1.0
    config.optimizer.learning_rate = 1e-2
    return config


def random_split(seed, count):
    rng = np.random.default_rng(seed)
    return sweep.OnDevice(
        jnp.asarray(rng.integers(0, 256, (count, 8, 8, 3), np.uint8)),
        jnp.asarray(rng.integers(0, 3, (count,), np.int32)),
    )


def run(seeds):
    runs = sweep.Sweep(
        tiny_config(), seeds, random_split(0, 30), random_split(1, 10), 3
    )
    return runs, list(runs.run())


@pytest.mark.parametrize("in_turn", [True, False])
def test_seeds_together_are_what_they_are_alone(in_turn, monkeypatch):
    monkeypatch.setattr(sweep, "in_turn", lambda: in_turn)
    together, rows = run([3, 5])
    alone, own_rows = run([5])
    assert [row["epoch"] for row in rows] == [1, 2]
    assert together.states.step.shape == ((2,) if in_turn else ())
    assert int(together.first_state().step) == 6
    for row, own in zip(rows, own_rows, strict=True):
        for name in ("train/loss", "train/guidance_loss", "test/loss", "test/top1"):
            assert row[name][1] == pytest.approx(own[name][0], rel=1e-3), name
            assert len(row[name]) == 2
        assert row["train/loss"][0] != pytest.approx(row["train/loss"][1], rel=1e-4)
    # The test images are counted once each.
    first = jax.tree.map(lambda p: p[0], alone.states.params)
    images = (alone.test.images / jnp.float32(255) - 0.5) / 0.5
    logits, _ = alone.model.apply({"params": first}, images)
    top1 = (logits.argmax(-1) == alone.test.labels).mean()
    assert own_rows[-1]["test/top1"][0] == pytest.approx(float(top1))
    hard = alone.hard(0.25)
    assert 1 / 4 <= hard["kept"][0] <= 1
    assert len(hard["test/top1"]) == 1


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
        sweep.Sweep(tiny_config(), [0], random_split(0, 16), random_split(1, 12), 3)
