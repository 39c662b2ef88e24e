"""The command line: what goes wrong ends in a message, not in a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

import main
from wf_vit.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _in_a_clone(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with flagsaver.flagsaver():
        yield


def run(*arguments):
    main.main(main.parse_flags(["main.py", *arguments])[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batchsize=3"], "batchsize"),
        (["--confg=configs/digits.py"], "confg"),
        (["--config=configs/digit.py"], "digit.py"),
        (["--config=configs/windowfree.py:fast"], "runlocal"),
        (["--config.batch_size=many"], "many"),
        (["--config.task=trian"], "choose one of"),
        (["--config.task=explain"], r"no 'images': pass.*configs/explain\.py"),
        (["--config=configs/verify.py", "--config.task=train"], "no 'model': pass"),
        (["--config=configs/explain.py"], "pass a checkpoint and a photograph"),
        (["--config=configs/explain.py", "--config.indicators=odd"], "odds"),
        (["--config=configs/verify.py"], "--config.weights=runs"),
        (["--config=configs/verify.py", "--config.protocols=a,b"], r"\('a', 'b'\)"),
        (["--config.data.name=imagenet2012"], r"(?s)1\..*2\..*3\."),
        (["--config.data.name=cifar11"], "cifar10"),
        (["--config.model.variant=mu/3"], "do not divide an image"),
        (["--workdir=/dev/null/run"], "--workdir"),
    ],
)
def test_usage_errors(arguments, message, tmp_path):
    workdir = [] if "--workdir" in arguments[0] else [f"--workdir={tmp_path}"]
    empty = []
    if "imagenet" in arguments[0]:
        empty = [f"--config.data.data_dir={tmp_path}"]
    with pytest.raises(UsageError, match=message):
        run(*arguments, *workdir, *empty)


def test_default_workdir_is_named_after_the_config():
    main.parse_flags(["main.py"])
    assert main.default_workdir() == "runs/digits"
    main.parse_flags(["main.py", "--config=configs/digits.py:vit"])
    assert main.default_workdir() == "runs/digits_vit"


def test_status_and_message_of_a_failed_command():
    result = subprocess.run(
        [sys.executable, "main.py", "--config.batchsize=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "batchsize" in result.stderr
    assert "Traceback" not in result.stderr
