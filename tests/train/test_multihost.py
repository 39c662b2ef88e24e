"""Several processes of several devices: what a pod does, on one machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import digits
from wf_vit.train import loop
from wf_vit.train.reporter import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = {
    "total_steps": 4,
    "warmup_steps": 1,
    "log_steps": 1,
    "eval_steps": 2,
    "checkpoint_steps": 2,
}
LEARNING_RATE = 2e-3  # of the config


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def train(workdir, count, devices, **overrides):
    """Trains on so many processes, each of which has so many devices."""
    port = free_port()
    settings = [f"--config.{name}={value}" for name, value in overrides.items()]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "main.py",
                f"--workdir={workdir}",
                *settings,
                *(
                    [
                        f"--config.distributed.coordinator_address=localhost:{port}",
                        f"--config.distributed.num_processes={count}",
                        f"--config.distributed.process_id={index}",
                    ]
                    if count > 1
                    else []
                ),
            ],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
        )
        for index in range(count)
    ]
    assert [process.wait(timeout=600) for process in processes] == [0] * count
    return read_jsonl(workdir)


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    rows = train(tmp_path, 2, 2, **OVERRIDES)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    # One process with four devices finds what two found together.
    config = digits.get_config()
    config.update(OVERRIDES)
    config.evaluate_checkpoint = "last"
    metrics = loop.evaluate(config, tmp_path)
    assert metrics["test/top1"] == pytest.approx(rows[-1]["test/top1"])
    assert metrics["test/loss"] == pytest.approx(rows[-1]["test/loss"], rel=1e-4)


@pytest.mark.slow
def test_any_processes_and_devices_have_the_same_losses(tmp_path):
    """With flips and mixup, over 60 steps that straddle the ends of five epochs."""
    overrides = {
        **OVERRIDES,
        "total_steps": 60,
        "eval_steps": 30,
        "checkpoint_steps": 60,
        "data.augment.flip_probability": 0.5,
        "data.augment.mixup_probability": 0.5,
        "pictures": False,
        # Sums in another order differ in the last bit. With large steps that grows.
        "optimizer.learning_rate": LEARNING_RATE,
    }
    found = {}
    for count, devices in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)):
        rows = train(tmp_path / f"{count}_{devices}", count, devices, **overrides)
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        top1 = [row["test/top1"] for row in rows if "test/top1" in row]
        assert (len(losses), len(top1)) == (60, 2)
        # A fraction of all test examples: none is counted twice or left out.
        assert np.allclose(np.array(top1) * 364, np.rint(np.array(top1) * 364))
        found[count, devices] = losses
    gaps = {k: np.abs(np.subtract(v, found[1, 1])).max() for k, v in found.items()}
    print({k: float(gap) for k, gap in gaps.items()})
    assert max(gaps.values()) < 1e-5
