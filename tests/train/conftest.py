"""A tiny experiment on real digits, shared by the tests of the training code."""

import pytest

from wf_vit.train.config import default_config, set_duration


def tiny_digits():
    """Four steps of batch 16 on digits; a model with fields, everything switched on."""
    config = default_config("windowfree", "mu/4")
    config.model.update(width=16, depth=1, mlp_dim=16, dtype="float32")
    config.data.name = "digits"
    config.data.image_size = 8
    config.data.update(crop="pad", pad=1)
    config.data.augment.flip_probability = 0.5
    config.data.augment.mixup_probability = 0.5
    config.batch_size = 16
    config.eval_batch_size = 100
    config.label_smoothing = 0.1
    config.ema_decay = 0.9
    config.pictures = False  # They take longer than the steps.
    config.optimizer.learning_rate = 1e-2
    config.guidance.weight = 0.5
    config.guidance.indicator = "random"
    set_duration(config, "guidance", steps=3)
    set_duration(config, "total", steps=4)
    set_duration(config, "warmup", steps=1)
    set_duration(config, "log", steps=1)
    set_duration(config, "eval", steps=2)
    set_duration(config, "checkpoint", steps=2)
    return config.lock()


@pytest.fixture
def digits_config():
    """The experiment, of one test."""
    return tiny_digits()
