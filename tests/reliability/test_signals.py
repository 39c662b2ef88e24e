"""SIGTERM and SIGINT at any step: saved, said, and the run goes on to the bit."""

import random
import signal
import time

import numpy as np
import pytest

from tests.reliability.processes import Run, rows, whole
from wf_vit import stops
from wf_vit.models.pretrained import stored

pytestmark = pytest.mark.reliability


def newest(workdir):
    return stored.read_step(stored.step_folders(workdir / "checkpoints")[-1])


def assert_same_end(workdir, other):
    """The same parameters to the bit, and the same reports."""
    got, expected = newest(workdir), newest(other)
    assert got.arrays.keys() == expected.arrays.keys()
    for path, array in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[path], array, err_msg=path)
    assert rows(workdir) == rows(other)


@pytest.fixture(scope="module", params=[1, 2], ids=["one_process", "two_processes"])
def reference(request, tmp_path_factory):
    """A run that nobody stops, and how many processes it has."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    whole(workdir, processes=request.param)
    return workdir, request.param


@pytest.mark.parametrize("seed", range(5))
def test_a_stop_at_a_random_step_loses_nothing(reference, tmp_path, seed):
    """Ten times over both parameters: five of one process and five of two."""
    expected, processes = reference
    draw = random.Random(seed)
    workdir = tmp_path / "run"
    number = draw.choice([signal.SIGTERM, signal.SIGINT])
    with Run(workdir, processes=processes) as run:
        run.wait_for(f"step {draw.choice([7, 14, 21, 28])}/60")
        time.sleep(draw.uniform(0, 0.3))
        run.signal(number, index=draw.randrange(processes))
        statuses = run.wait()
        assert statuses == [stops.STATUS] * processes, run.text()
        saved = int(newest(workdir).arrays["step"])
        for index in range(processes):
            assert f"Saved step {saved}." in run.text(index)
            assert "Traceback" not in run.text(index)
    reported = max(row["step"] for row in rows(workdir))
    assert saved >= reported  # Nothing that was done is lost.
    texts = whole(workdir, processes=processes)
    assert f"Resuming after step {saved}" in texts[0]
    assert_same_end(workdir, expected)


def test_a_stop_during_an_evaluation_makes_it_again(tmp_path):
    """The step is saved at once; its evaluation is the first thing of the next call."""
    settings = {"eval_batch_size": 4, "eval_steps": 10, "total_steps": 20}
    whole(tmp_path / "whole", settings=settings)
    with Run(tmp_path / "run", settings=settings) as run:
        run.wait_for("step 7/20")
        while not any(row["step"] == 7 for row in rows(tmp_path / "run")):
            time.sleep(0.01)
        time.sleep(0.5)
        run.signal()
        assert run.wait() == [stops.STATUS]
    whole(tmp_path / "run", settings=settings)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_second_signal_leaves_at_once(tmp_path):
    """Also while the main thread waits for XLA, here for the compilation."""
    with Run(tmp_path / "run", settings={"model.depth": 8}) as run:
        run.wait_for("compiles first")
        run.signal()
        run.wait_for("a second signal leaves at once")
        run.signal()
        start = time.monotonic()
        assert run.wait() == [128 + signal.SIGTERM]
        assert time.monotonic() - start < 1
        assert "Left at once" in run.text()


@pytest.mark.parametrize("seconds", [0.7, 1.5, 2.5, 3.5, 5.0])
def test_ctrl_c_at_the_start_is_a_message(tmp_path, seconds):
    with Run(tmp_path / "run") as run:
        time.sleep(seconds)
        run.signal(signal.SIGINT)
        assert run.wait() == [stops.STATUS], run.text()
        assert "Stopped by SIGINT" in run.text()
        assert "Traceback" not in run.text()


def test_twenty_kills_change_nothing(tmp_path):
    """SIGKILL at random moments, in saving too; the run goes on until it is done."""
    settings = {"total_steps": 200, "checkpoint_steps": 3, "eval_steps": 50}
    whole(tmp_path / "whole", settings=settings)
    draw = random.Random(0)
    for _ in range(20):
        with Run(tmp_path / "run", settings=settings) as run:
            time.sleep(draw.uniform(2, 9))
            run.signal(signal.SIGKILL)
            run.wait()
            assert "Traceback" not in run.text()
    whole(tmp_path / "run", settings=settings)
    got, expected = newest(tmp_path / "run"), newest(tmp_path / "whole")
    for path, array in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[path], array, err_msg=path)
    steps = [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert steps == sorted(set(steps))
