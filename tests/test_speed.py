"""The measurement of speed runs, whatever the machine, and compares what it says."""

import json

import pytest

from benchmarks import speed
from tests.cases import slow
from wf_vit.errors import UsageError


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_steps_are_measured_beside_the_floor(monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(speed, "STEPS", {"mu": ("mu/4", 16, 8, {})})
    options = speed.Options(turns=2, dtype=dtype, images=2, peak_tflops=1)
    speed.measure_parts(options, ["steps"], tmp_path)
    results = json.loads((tmp_path / "steps.json").read_text())["results"]
    assert results["flops_per_second_of_floor"] == 1e12
    rows = results["sizes"]["mu"]
    assert rows["step, ours"]["ratio"] == rows["forward, ours"]["ratio"] == 1
    # A step is about three forward passes; of a model this small, rather more.
    floors = [rows[f"{kind}, Linen"]["floor_ms"] for kind in ("forward", "step")]
    assert 2 < floors[1] / floors[0] < 5
    table = (tmp_path / "steps.md").read_text()
    assert "| mu, 2 images | step, WinfT |" in table


def test_unknown_parts_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"everything.*steps, attention"):
        speed.measure_parts(speed.Options(), ["steps", "everything"], tmp_path)
