"""Durations against hand-computed values, and what a config becomes."""

import pytest

from wf_vit.data.config import DataConfig
from wf_vit.errors import UsageError
from wf_vit.train.config import Progress, default_config, durations


def config_with(**overrides):
    config = default_config("vit", "mu/16")
    config.batch_size = 100
    config.update(overrides)
    return config


def test_durations_are_resolved_from_steps_epochs_and_percent():
    config = config_with(total_epochs=20.0, warmup_percent=5.0, eval_epochs=0.5)
    steps = durations(config, num_train=1050)
    assert steps.steps_per_epoch == 10.5
    assert steps.total == 210
    assert steps.warmup == round(10.5)
    assert steps.eval == 5
    assert steps.log == 50


def test_the_finest_unit_wins_and_overrides_are_seen():
    config = config_with(total_epochs=20.0)
    config.total_steps = 7
    config.batch_size = 10
    assert durations(config, num_train=1000).total == 7
    config.total_steps = None
    assert durations(config, num_train=1000).total == 2000


def test_epochs_are_examples_whatever_the_batch_size_was():
    config = config_with(total_epochs=20.0, warmup_epochs=2.0, eval_epochs=1.0)
    # 300 steps of 10 are 3 of 20 epochs; the other 17 take 170 steps of 100.
    steps = durations(config, 1000, Progress(step=300, examples=3000))
    assert steps.total == 470
    assert steps.warmup <= 300  # It is over.
    assert steps.eval == 10
    # After 1 epoch the warm-up has another one to go.
    assert durations(config, 1000, Progress(100, 1000)).warmup == 110
    # In the same batches nothing changes, and steps are steps.
    for step in (1, 7, 199):
        assert durations(config, 1000, Progress(step, 100 * step)) == durations(
            config, 1000
        )
    config.total_steps = 500
    assert durations(config, 1000, Progress(300, 3000)).total == 500


def test_an_evaluation_is_not_called_as_training_is():
    config = config_with()
    config.data.eval = {"train": "train[:10%]"}
    with pytest.raises(UsageError, match=r"an evaluation 'train'.*'train_part'"):
        DataConfig.of(config.data)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"total_epochs": None}, "set one of total_steps, total_epochs"),
        ({"total_steps": 10, "warmup_steps": 11}, "warm-up takes 11 steps"),
        ({"total_epochs": 2e9}, "expected at most 2,147,483,647"),
    ],
)
def test_impossible_durations_are_named(overrides, message):
    with pytest.raises(UsageError, match=message):
        durations(config_with(**overrides), num_train=1000)
