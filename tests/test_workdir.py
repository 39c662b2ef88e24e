"""The files of a run: written at once, read with care, by one run at a time."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit.errors import UsageError
from wf_vit.workdir import (
    claim_workdir,
    held,
    opened_arrays,
    read_json_if_whole,
    write_text,
)

HOLDER = """
import sys, time
from pathlib import Path
from wf_vit.workdir import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_of_the_first(tmp_path):
    owner = rf"in use by process {os.getpid()} on \S+, started 20\d\d-.*--workdir"
    refused = pytest.raises(UsageError, match=owner)
    with held(tmp_path / "run"), refused, held(tmp_path / "run"):
        pass
    with held(tmp_path / "run"):  # It is free again.
        pass


def test_a_dead_owner_holds_nothing(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        owner = f"in use by process {process.pid} on"
        with pytest.raises(UsageError, match=owner), held(tmp_path):
            pass
        process.kill()
    with held(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\0" * 20, b"[1]", b"\xff\xfe"])
def test_a_damaged_json_file_counts_as_empty(tmp_path, caplog, content):
    path = tmp_path / "config.json"
    assert read_json_if_whole(path) == {}
    assert not caplog.text
    path.write_bytes(content)
    assert read_json_if_whole(path) == {}
    assert "config.json cannot be read, and counts as empty" in caplog.text
    write_text(path, json.dumps({"a": 1}))
    assert read_json_if_whole(path) == {"a": 1}


def test_results_of_unknown_settings_are_not_added_to(tmp_path):
    params = {"a": jnp.zeros(3)}
    results = tmp_path / "results"
    options = {"results": results, "free": ()}
    claim_workdir(tmp_path, {"seed": 0}, params, **options)
    results.mkdir()
    (results / "one").touch()
    claim_workdir(tmp_path, {"seed": 0}, params, **options)
    with pytest.raises(UsageError, match="seed was 0 and is now 1"):
        claim_workdir(tmp_path, {"seed": 1}, params, **options)
    (tmp_path / "config.json").write_bytes(b"")
    with pytest.raises(UsageError, match="nobody knows the settings"):
        claim_workdir(tmp_path, {"seed": 0}, params, **options)


def test_damaged_arrays_are_named(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, a=np.arange(1000), b=np.ones(3))
    whole = path.read_bytes()
    with opened_arrays(path) as arrays:
        np.testing.assert_array_equal(arrays["b"], 1)
    for damaged in (b"", whole[:100], whole[:400] + b"\1" + whole[401:], b"text"):
        path.write_bytes(damaged)
        message = r"data\.npz is damaged.*run again"
        with pytest.raises(UsageError, match=message), opened_arrays(path) as arrays:
            arrays["a"]
    path.write_bytes(whole)
    message = r"data\.npz is damaged.*missing"
    with pytest.raises(UsageError, match=message), opened_arrays(path) as arrays:
        arrays["missing"]
