"""Two processes of two devices each: what a pod does, on one machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    port = free_port()
    settings = [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "main.py",
                f"--workdir={tmp_path}",
                f"--config.distributed.coordinator_address=localhost:{port}",
                "--config.distributed.num_processes=2",
                f"--config.distributed.process_id={index}",
                *settings,
            ],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        )
        for index in range(2)
    ]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    rows = read_jsonl(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    # One process with four devices finds what two found together.
    config = digits.get_config()
    config.update(OVERRIDES)
    config.evaluate_checkpoint = "last"
    metrics = loop.evaluate(config, tmp_path)
    assert metrics["test/top1"] == pytest.approx(rows[-1]["test/top1"])
    assert metrics["test/loss"] == pytest.approx(rows[-1]["test/loss"], rel=1e-4)
