"""The tasks that do not train: stopped, they keep what was finished."""

import time

import numpy as np
import pytest
from PIL import Image

from tests.reliability.processes import Run, whole
from wf_vit import stops

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model that was trained for a moment."""
    workdir = tmp_path_factory.mktemp("model") / "run"
    whole(workdir, settings={"total_steps": 10})
    return workdir


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{seed}.png")
    return folder


def stop_once_there_is(workdir, pattern, **options):
    """Starts a task, and stops it when a file appears."""
    with Run(workdir, **options) as run:
        while not list(workdir.glob(pattern)):
            assert run.processes[0].poll() is None, run.text()
            time.sleep(0.01)
        run.signal()
        assert run.wait() == [stops.STATUS], run.text()
        assert "Stopped by SIGTERM. What was finished is kept" in run.text()
        assert "Traceback" not in run.text()
    return {path: path.stat().st_mtime for path in workdir.glob(pattern)}


def test_explain_goes_on_with_the_next_image(model, photographs, tmp_path):
    options = {
        "config": "explain",
        "settings": {"weights": model, "images": photographs, "batch_size": 1},
    }
    done = stop_once_there_is(tmp_path / "run", "images/*/data.npz", **options)
    assert len(done) < 4
    whole(tmp_path / "run", **options)
    whole(tmp_path / "whole", **options)
    for path, time_of_writing in done.items():
        assert path.stat().st_mtime == time_of_writing
    for name in ("table.csv", "statistics.json"):
        got, expected = (tmp_path / run / name for run in ("run", "whole"))
        assert got.read_bytes() == expected.read_bytes()


def test_verify_goes_on_with_the_next_batch(model, tmp_path):
    options = {
        "config": "verify",
        "settings": {
            "weights": model,
            "data.name": "digits",
            "protocols": "('removal',)",
            "num_images.removal": 40,
            "batch_size": 8,
            "bootstrap_samples": 100,
        },
    }
    done = stop_once_there_is(tmp_path / "run", "outcomes/*.npz", **options)
    assert len(done) < 5
    whole(tmp_path / "run", **options)
    for path, time_of_writing in done.items():
        assert path.stat().st_mtime == time_of_writing
    assert len(list((tmp_path / "run" / "outcomes").glob("*.npz"))) == 5
