"""What a run reports survives crashes, and what it is asked to change is checked."""

import json
import math

import pytest

from wf_vit.errors import UsageError
from wf_vit.train.reporter import (
    JSONL,
    Reporter,
    check_changes,
    read_config,
    read_jsonl,
    save_config,
)


def write(workdir, step, *reports):
    reporter = Reporter(workdir, step=step, total=9, batch_size=1, active=True)
    with reporter:
        for at, scalars in reports:
            reporter.write(at, scalars)


def test_lines_that_are_no_rows_are_left_out_and_named(tmp_path, caplog):
    rows = [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/accuracy": 0.25}]
    lines = [json.dumps(row).encode() for row in rows]
    (tmp_path / JSONL).write_bytes(
        lines[0]
        + b"\n\0\0\0\0"
        + lines[1]
        + b'\n{"step": 3, "train/l\nnull\n{"loss": 1}\n\xff\n{"step": 4, "a": "b"}'
    )
    assert read_jsonl(tmp_path) == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/top1": 0.25},
    ]
    assert "5 lines are damaged and are left out, the first is line 3" in caplog.text


def test_an_evaluation_that_is_done_again_is_reported_once(tmp_path):
    write(tmp_path, 0, (2, {"train/loss": 1.0}), (2, {"test/top1": 0.5}))
    options = {"total": 9, "batch_size": 1, "active": True, "evaluation_pending": True}
    with Reporter(tmp_path, step=2, **options) as reporter:
        reporter.write(2, {"test/top1": 0.75})
    assert read_jsonl(tmp_path) == [
        {"step": 2, "train/loss": 1.0},
        {"step": 2, "test/top1": 0.75},
    ]


def test_a_run_that_resumes_reports_each_step_once(tmp_path):
    write(tmp_path, 0, (1, {"train/loss": 1.0}), (2, {"train/loss": 2.0}))
    with (tmp_path / JSONL).open("ab") as file:
        file.write(b'{"step": 3, "trai')
    write(tmp_path, 1, (2, {"train/loss": 3.0}))
    text = (tmp_path / JSONL).read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 3.0},
    ]


def test_metrics_that_are_not_finite_are_json_too(tmp_path):
    write(tmp_path, 0, (1, {"train/loss": math.nan, "train/top1": math.inf}))
    assert "NaN" not in (tmp_path / JSONL).read_text()
    (row,) = read_jsonl(tmp_path)
    assert math.isnan(row["train/loss"])
    write(tmp_path, 1, (2, {"train/loss": 1.0}))
    assert [row["step"] for row in read_jsonl(tmp_path)] == [1, 2]


def test_what_would_spoil_a_run_is_refused(digits_config, tmp_path, caplog):
    check_changes(digits_config, tmp_path)  # Nothing is known.
    save_config(digits_config, tmp_path)
    check_changes(digits_config, tmp_path)
    assert not caplog.text
    digits_config.batch_size = 8
    digits_config.model.dtype = "bfloat16"
    digits_config.data.augment.flip_probability = 0.25
    check_changes(digits_config, tmp_path)
    assert "config.batch_size was 16 and is now 8." in caplog.text
    assert "config.data.augment.flip_probability was 0.5 and is now" in caplog.text
    assert caplog.text.count("config.") == 3  # The leaves that differ, and no more.
    digits_config.model.width = 24
    digits_config.seed = 1
    spoiling = r"config\.model\.width was 16 and is now 24; config\.seed was 0 and is"
    with pytest.raises(UsageError, match=spoiling) as error:
        check_changes(digits_config, tmp_path)
    assert "batch_size" not in str(error.value)
    digits_config.on_change = "continue"
    check_changes(digits_config, tmp_path)


def test_keys_of_other_versions_are_no_change(digits_config, tmp_path, caplog):
    save_config(digits_config, tmp_path)
    settings = read_config(tmp_path)
    del settings["on_change"]
    settings["model"]["a_key_of_before"] = 1
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check_changes(digits_config, tmp_path)
    assert not caplog.text
