"""The measurement of speed runs, whatever the machine, and compares what it says."""

import json

import pytest
from absl import flags

from benchmarks import speed
from wf_vit.errors import UsageError


@pytest.fixture
def given(tmp_path):
    def set_flags(**options):
        saved = flags.FLAGS.flag_values_dict()
        names = [f"--output={tmp_path}", "--turns=2"]
        names += [f"--{name}={value}" for name, value in options.items()]
        flags.FLAGS(["speed", *names])
        return saved

    yield set_flags
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_measured_beside_the_floor(monkeypatch, tmp_path, given, dtype):
    given(only="steps", dtype=dtype, images=2, peak_tflops=1)
    monkeypatch.setattr(speed, "STEPS", {"mu": ("mu/4", 16, 8, {})})
    speed.main([])
    results = json.loads((tmp_path / "steps.json").read_text())["results"]
    assert results["flops_per_second_of_floor"] == 1e12
    rows = results["sizes"]["mu"]
    assert rows["step, ours"]["ratio"] == rows["forward, ours"]["ratio"] == 1
    # A step is about three forward passes; of a model this small, rather more.
    floors = [rows[f"{kind}, Linen"]["floor_ms"] for kind in ("forward", "step")]
    assert 2 < floors[1] / floors[0] < 5
    table = (tmp_path / "steps.md").read_text()
    assert "| mu, 2 images | step, WinfT |" in table


def test_unknown_parts_are_refused(given):
    given(only="steps,everything")
    with pytest.raises(UsageError, match=r"everything.*steps, attention"):
        speed.main([])
