"""Real runs of the command, in processes that can be stopped and killed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wf_vit.train.reporter import read_jsonl

ROOT = Path(__file__).resolve().parents[2]

# A small model on the digits: a step takes some milliseconds.
SMALL = {
    "model.width": 16,
    "model.depth": 1,
    "model.mlp_dim": 16,
    "model.num_heads": 2,
    "pictures": False,
    "batch_size": 16,
    "eval_batch_size": 120,
    "total_steps": 60,
    "warmup_steps": 5,
    "log_steps": 7,
    "eval_steps": 20,
    "checkpoint_steps": 20,
}

# Of a metric that depends on the clock.
_OF_THE_CLOCK = ("train/images_per_second",)


class Run:
    """A run of one or more processes; as a context manager it leaves none behind."""

    def __init__(
        self, workdir, *, config="digits", processes=1, devices=4, settings=None
    ):
        """Starts it; to those of training, ``settings`` are added to ``SMALL``."""
        small = SMALL if config == "digits" else {}
        settings = {**small, **(settings or {})}
        if processes > 1:
            settings["distributed.num_processes"] = processes
            address = f"localhost:{_free_port()}"
            settings["distributed.coordinator_address"] = address
        self.logs = []
        self.processes = []
        # Elsewhere: the disk of the run may be full.
        folder = Path(tempfile.mkdtemp(prefix="wf_vit_logs_"))
        paths = [f"--config={config}", f"--workdir={workdir}"]
        for index in range(processes):
            if processes > 1:
                settings["distributed.process_id"] = index
            log = folder / f"{index}.log"
            flags = [f"--config.{name}={value}" for name, value in settings.items()]
            with log.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, "main.py", *paths, *flags],
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={
                        **os.environ,
                        "JAX_NUM_CPU_DEVICES": str(devices // processes),
                    },
                )
            self.logs.append(log)
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.logs[0].parent)

    def wait(self, timeout=300):
        """Returns the statuses with which the processes ended."""
        return [process.wait(timeout=timeout) for process in self.processes]

    def text(self, index=0):
        """Returns what a process has printed."""
        return self.logs[index].read_text()

    def wait_for(self, text, *, index=0, timeout=120):
        """Waits until a process has printed a text."""
        end = time.monotonic() + timeout
        while text not in self.text(index):
            assert time.monotonic() < end, self.text(index)
            assert self.processes[index].poll() is None, self.text(index)
            time.sleep(0.01)

    def signal(self, number=signal.SIGTERM, *, index=0):
        """Sends a signal to a process."""
        self.processes[index].send_signal(number)


def whole(workdir, **options):
    """Runs to the end; returns what the processes have printed."""
    with Run(workdir, **options) as run:
        statuses = run.wait()
        texts = [run.text(index) for index in range(len(statuses))]
    assert statuses == [0] * len(statuses), texts
    return texts


def rows(workdir):
    """Returns what a run has reported, but for what the clock decides."""
    return [
        {name: value for name, value in row.items() if name not in _OF_THE_CLOCK}
        for row in read_jsonl(workdir)
    ]


def _free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]
