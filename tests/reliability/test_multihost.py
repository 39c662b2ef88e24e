"""Several processes of several devices: what a pod does, on one machine."""

import numpy as np
import pytest

from configs import digits
from tests.reliability.processes import SMALL, whole
from wf_vit.train import loop
from wf_vit.train.reporter import read_jsonl

pytestmark = pytest.mark.reliability


def test_one_process_evaluates_what_two_have_trained(tmp_path):
    settings = {"total_steps": 4, "warmup_steps": 1, "log_steps": 1, "eval_steps": 2}
    whole(tmp_path / "run", processes=2, settings=settings)
    rows = read_jsonl(tmp_path / "run")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    config = digits.get_config()
    config.update_from_flattened_dict({**SMALL, **settings})
    config.evaluate_checkpoint = "last"
    metrics = loop.evaluate(config, tmp_path / "run")
    assert metrics["test/top1"] == pytest.approx(rows[-1]["test/top1"])
    assert metrics["test/loss"] == pytest.approx(rows[-1]["test/loss"], rel=1e-4)


def test_any_processes_and_devices_have_the_same_losses(tmp_path):
    """With flips and mixup, over 60 steps that straddle the ends of five epochs."""
    settings = {
        "batch_size": 128,
        "log_steps": 1,
        "eval_steps": 30,
        "checkpoint_steps": 60,
        "data.augment.flip_probability": 0.5,
        "data.augment.mixup_probability": 0.5,
    }
    found = {}
    for processes, devices in ((1, 1), (1, 4), (2, 2), (2, 4), (4, 4)):
        workdir = tmp_path / f"{processes}_{devices}"
        whole(workdir, processes=processes, devices=devices, settings=settings)
        rows = read_jsonl(workdir)
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        top1 = np.array([row["test/top1"] for row in rows if "test/top1" in row])
        assert (len(losses), len(top1)) == (60, 2)
        # A fraction of all test examples: none is counted twice or left out.
        np.testing.assert_allclose(top1 * 364, np.rint(top1 * 364), atol=1e-6)
        found[processes, devices] = losses
    gaps = {k: np.abs(np.subtract(v, found[1, 1])).max() for k, v in found.items()}
    print("largest gaps by (processes, devices):", gaps)
    assert max(gaps.values()) < 1e-5
