"""A process of a run that is gone does not leave the others waiting."""

import signal
import time

import pytest

from tests.reliability.processes import Run

pytestmark = pytest.mark.reliability


@pytest.mark.parametrize("gone", [0, 1])
def test_the_others_end_within_the_configured_time(tmp_path, gone):
    settings = {"total_steps": 100_000, "distributed.peer_timeout_seconds": 6}
    with Run(tmp_path / "run", processes=2, settings=settings) as run:
        for index in range(2):
            run.wait_for("Watching", index=index)
        run.wait_for("step 7/")
        time.sleep(3)
        start = time.monotonic()
        run.signal(signal.SIGKILL, index=gone)
        other = 1 - gone
        assert run.processes[other].wait(timeout=60) == 1, run.text(other)
        assert time.monotonic() - start < 20
        # JAX sees at once that process 0, its coordinator, is gone.
        reason = ("JAX ended the run", "Process 1 of the run")[gone]
        assert reason in run.text(other)
        assert "last checkpoint is kept" in run.text(other)


def test_a_process_that_hangs_counts_as_gone(tmp_path):
    settings = {"total_steps": 100_000, "distributed.peer_timeout_seconds": 6}
    with Run(tmp_path / "run", processes=2, settings=settings) as run:
        run.wait_for("step 7/")
        time.sleep(3)
        run.signal(signal.SIGSTOP, index=1)
        assert run.processes[0].wait(timeout=60) == 1
        assert "no sign of life" in run.text(0)
