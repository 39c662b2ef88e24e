"""The task: interruptions that cost nothing, and settings it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.explanation.example import DATA_ONLY, NAMES, arrays_of, make_config
from wf_vit.errors import UsageError
from wf_vit.explanation import draw, explain, task
from wf_vit.explanation.explanation import Explanation


class Killed(BaseException):
    """What nothing catches."""


def kill(*_, **__):
    raise Killed


def test_a_killed_run_continues_to_the_same_numbers(
    run, photographs, tmp_path, monkeypatch
):
    config = make_config(images=str(photographs), batch_size=2, **DATA_ONLY)
    save, batches = Explanation.save, []

    def save_or_die(self, folder):
        # The second image of the first batch is lost.
        if folder.name == "a.png" and not batches:
            raise Killed
        save(self, folder)

    monkeypatch.setattr(Explanation, "save", save_or_die)
    with pytest.raises(Killed):
        explain(config, tmp_path)
    done = tmp_path / "images/a.jpg/data.npz"
    before = done.stat().st_mtime_ns
    assert not (tmp_path / "images/a.png").exists()
    assert not (tmp_path / "table.csv").exists()

    explain_batch = task.explain_batch

    def counted(loaded, photographs, **options):
        batches.append(photographs.any((1, 2, 3)).tolist())
        return explain_batch(loaded, photographs, **options)

    monkeypatch.setattr(task, "explain_batch", counted)
    with pytest.raises(UsageError, match="1 of 5"):
        explain(config, tmp_path)
    assert batches == [[False, True], [True, False], [True, False]]
    assert done.stat().st_mtime_ns == before
    for name in ("table.csv", "statistics.json"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    for name in NAMES:
        expected = arrays_of(run, name)
        for key, array in arrays_of(tmp_path, name).items():
            np.testing.assert_array_equal(array, expected[key])

    with pytest.raises(UsageError, match="1 of 5"):
        explain(config, tmp_path)
    assert len(batches) == 3
    monkeypatch.setattr(Explanation, "save", save)


def test_drawings_can_be_had_later_and_are_whole(photographs, tmp_path, monkeypatch):
    one = {"images": str(photographs / "b.png"), "indicators": ("mean",)}
    config = make_config(**one, **DATA_ONLY)
    explain(config, tmp_path)
    folder = tmp_path / "images/b.png"
    assert [path.name for path in folder.iterdir()] == ["data.npz"]
    config.figures = config.page = True
    with monkeypatch.context() as patch:
        patch.setattr(draw, "depth_drawings", lambda *_, **__: {"x": kill})
        with pytest.raises(Killed):
            explain(config, tmp_path)
    assert not (folder / "figures").exists()
    monkeypatch.setattr(task, "explain_batch", kill)
    explain(config, tmp_path)
    files = list((folder / "figures").iterdir())
    assert {file.name for file in files} == {
        f"{name}.{suffix}"
        for name in (
            "interactions",
            "fields",
            "tendency",
            "indiscriminative",
            "field_area",
            "attention_distance",
        )
        for suffix in ("pdf", "png")
    }
    for file in files:
        start = {".pdf": b"%PDF", ".png": b"\x89PNG"}[file.suffix]
        assert file.read_bytes().startswith(start)
    assert (folder / "page.html").stat().st_size > 10_000


def test_results_of_other_settings_are_not_mixed(photographs, tmp_path, windowfree_run):
    one = {"images": str(photographs / "b.png"), "indicators": ("mean",)}
    config = make_config(**one, **DATA_ONLY)
    workdir = tmp_path / "run"
    with pytest.raises(UsageError, match=r"mass is 1\.5"):
        explain(make_config(**one, **DATA_ONLY, mass=1.5), workdir)
    # Nothing was measured yet, so the settings may still change.
    explain(config, workdir)
    config.batch_size = 3
    explain(config, workdir)
    with pytest.raises(UsageError, match=r"mass was 0\.5 and is now 0\.9"):
        explain(make_config(**one, **DATA_ONLY, mass=0.9), workdir)
    assert json.loads((workdir / "config.json").read_text())["mass"] == 0.5
    other = make_config(windowfree_run, **one, **DATA_ONLY)
    with pytest.raises(UsageError, match="parameters_sha256"):
        explain(other, workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ""}, "pass a checkpoint and a photograph"),
        ({"weights": ""}, "pass a checkpoint and a photograph"),
        ({"indicators": ("mean", "atention")}, "rollout"),
        ({"indicators": ("rollout",), "layers": (1,)}, "needs all layers"),
        ({"layers": (2,)}, "layers 0 to 1"),
        ({"target": "logit"}, "tokens, cls, pooled"),
        ({"patch": 24}, "expected 0 to 23"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work(photographs, tmp_path, changes, message):
    changes = {"images": str(photographs / "a.png")} | changes
    with pytest.raises(UsageError, match=message):
        explain(make_config(**changes), tmp_path)
    assert not (tmp_path / "images").exists()


def test_the_task_needs_no_tensorflow():
    code = "import sys, wf_vit.explanation; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "wf_vit.explanation" in modules
    assert not {"tensorflow", "clu", "tensorflow_datasets"} & set(modules)
