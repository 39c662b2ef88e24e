"""The command line: what it runs, its help, and errors that end in a message."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from wf_vit import command, log
from wf_vit.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "tests" / "models" / "fixtures" / "hf_vit"


@pytest.fixture(autouse=True)
def _in_a_clone(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batchsize=3"], "batchsize"),
        (["--confg=configs/digits.py"], "confg"),
        (["--config=configs/digit.py"], r"digit\.py.*one of cifar10, digits, explain"),
        (["--config=digit"], "no config 'digit'.*one of cifar10, digits, explain"),
        (["--config="], "no value"),
        (["--config"], "no value"),
        (["configs/digits.py"], "Unexpected arguments"),
        (["--config=configs/windowfree.py:fast"], r"\.py, line \d+:.*runlocal"),
        (["--config.batch_size=many"], "batch_size=many"),
        (["--config.task=trian"], "choose one of train, evaluate, explain, verify"),
        (["--config.task=explain"], r"no 'images': pass.*configs/explain\.py"),
        (["--config=configs/verify.py", "--config.task=train"], "no 'model': pass"),
        (["--config=explain", "--config.task=prepare"], "no 'data': pass"),
        (["--config=configs/explain.py"], "pass a checkpoint and a photograph"),
        (["--config=configs/explain.py", "--config.indicators=odd"], "odds"),
        (["--config=configs/verify.py"], "--config.weights=runs"),
        (["--config=configs/verify.py", "--config.protocols=a,b"], r"\('a', 'b'\)"),
        (["--config.data.name=imagenet2012"], r"(?s)1\..*2\..*task=prepare.*3\."),
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
    with pytest.raises(UsageError, match=message) as error:
        command.run([*workdir, *empty, *arguments])
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "workdir", "model"),
    [
        ([], "runs/digits", "windowfree"),
        (["--config=digits:vit"], "runs/digits_vit", "vit"),
        (["--config", "digits:vit"], "runs/digits_vit", "vit"),
        (["--config=configs/digits.py:vit"], "runs/digits_vit", "vit"),
        (["--config=configs/digits.py:vit", "--workdir=there"], "there", "vit"),
        # Imports another config.
        (["--config=vit:runlocal"], "runs/vit_runlocal", "vit"),
    ],
)
def test_config_and_default_workdir(arguments, workdir, model):
    config, folder = command.parse([*arguments, "--config.batch_size=7"])
    assert str(folder) == workdir
    assert config.model.name == model
    assert config.batch_size == 7


def test_a_config_anywhere_imports_those_beside_it_and_ours(tmp_path):
    (tmp_path / "shared_parts.py").write_text("BATCH = 5\n")
    (tmp_path / "own.py").write_text(
        textwrap.dedent(
            """
            from configs import shared_parts, vit

            def get_config(mode="runlocal"):
                config = vit.get_config(mode)
                config.batch_size = shared_parts.BATCH
                return config
            """
        )
    )
    code = (
        "import sys; from wf_vit import command; "
        "config, folder = command.parse(sys.argv[1:]); "
        "print(config.batch_size, config.model.name, folder)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, f"--config={tmp_path}/own.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["5", "vit", "runs/own"]


def test_help_lists_every_config_and_task_and_how_to_list_keys(capsys):
    assert command.main(["--config=digits", "--help"]) == 0
    text = capsys.readouterr().out
    files = [file.stem for file in (ROOT / "configs").glob("[!_]*.py")]
    assert len(files) >= 7
    for name in [*files, *command.TASKS]:
        assert any(line.split()[:1] == [name] for line in text.splitlines()), name
    assert "WinfT on scikit-learn's digits" in text
    assert "--config=NAME --help lists all" in text


def test_help_may_be_cut_off():
    command_line = f"{sys.executable} main.py --config=verify --help"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command_line} | head -2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("python3 main.py")


def test_status_and_message_of_a_failed_command():
    result = subprocess.run(
        [sys.executable, "main.py", "--config.batchsize=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "The config has no key 'batchsize'\nDid you mean" in result.stderr
    assert "Traceback" not in result.stderr


# Stands for an installation of the core alone: TensorFlow cannot be imported.
CORE_ONLY = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from wf_vit.command import main
sys.exit(main(sys.argv[1:]))
"""


def core_only(*arguments, packages=("tensorflow", "tensorflow_datasets", "clu")):
    return subprocess.run(
        [sys.executable, "-c", CORE_ONLY.format(packages=packages), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config.task=evaluate"],
        ["--config.task=prepare"],
        ["--config=verify", f"--config.weights={PUBLISHED}"],
    ],
    ids=["train", "evaluate", "prepare", "verify"],
)
def test_a_task_that_lacks_the_extra_names_it(arguments, tmp_path):
    result = core_only(*arguments, f"--workdir={tmp_path}")
    assert result.returncode == 2, result.stderr
    assert "pip install 'wf-vit[train]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_package_that_is_not_of_the_extra_is_no_usage_error():
    result = core_only("--config.task=prepare", packages=("ml_dtypes",))
    assert result.returncode == 1
    assert "ModuleNotFoundError: No module named 'ml_dtypes'" in result.stderr


def test_nothing_of_the_libraries_opens_a_run(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TF_")
    }
    result = subprocess.run(
        [
            sys.executable,
            "main.py",
            "--config.task=prepare",
            f"--config.data.data_dir={tmp_path}",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "oneDNN" not in result.stderr
    assert "WARNING" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert "'digits' comes with scikit-learn" in lines[0]


def test_the_user_decides_what_tensorflow_logs(monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    log.show_own_log()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "0"
