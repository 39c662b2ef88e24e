"""What is installed: the parts, what the core needs, and what the wheel carries."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import wf_vit

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages():
    folders = {path.parent for path in (ROOT / "wf_vit").rglob("__init__.py")}
    return {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_every_package_is_listed():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == packages() | {"wf_vit.configs"}


def test_every_part_is_an_attribute_and_loaded_when_asked_for():
    parts = {
        path.stem if path.is_file() else path.name
        for path in (ROOT / "wf_vit").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    # These are the command's, not the library's.
    own = {
        "__init__",
        "cache",
        "command",
        "log",
        "memory",
        "settings",
        "stops",
        "workdir",
    }
    assert parts - own == set(wf_vit._PARTS)
    code = (
        "import sys, wf_vit; before = set(sys.modules); "
        "assert 'jax' not in before; "
        "print(wf_vit.indicators.__name__, 'flax' in sys.modules, dir(wf_vit))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert output.stdout.startswith("wf_vit.indicators False"), output.stderr
    assert "'measure'" in output.stdout
    with pytest.raises(AttributeError, match="no attribute 'indicator'"):
        wf_vit.indicator  # noqa: B018


# What an extra or a data set of one's own brings; imported where it is used.
OPTIONAL = {"huggingface_hub", "sklearn", "torch"}
# The parts that need the extra [train].
TRAIN = ("data", "train", "verify")


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            package = name.partition(".")[0]
            if package not in sys.stdlib_module_names | {"wf_vit", "configs"}:
                yield package


def distributions(requirements):
    names = {re.match(r"[\w.-]+", line).group().lower() for line in requirements}
    return {name.replace("_", "-") for name in names}


def test_what_is_imported_is_declared_and_nothing_else():
    owners = metadata.packages_distributions()
    core, train = set(), set()
    for path in [*(ROOT / "wf_vit").rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        part = path.relative_to(ROOT).parts[1]
        needed = train if part in TRAIN else core
        for package in set(imported_packages(path)) - OPTIONAL:
            needed.add(owners[package][0].lower().replace("_", "-"))
    declared = distributions(PROJECT["project"]["dependencies"])
    assert core == declared
    extra = distributions(PROJECT["project"]["optional-dependencies"]["train"])
    # Those that clu and TFDS import without declaring them.
    undeclared = {"importlib-resources", "tensorboard"}
    either = {"tensorflow", "tensorflow-cpu"}
    assert (train - core) - either == extra - undeclared - either


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, made without a network."""
    version = metadata.version("setuptools")
    if int(version.partition(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 to build the wheel, here is {version}")
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", ".*", "results", "runs")
    shutil.copytree(ROOT, source, ignore=ignore, dirs_exist_ok=True)
    target = tmp_path_factory.mktemp("wheel")
    code = "import sys, setuptools.build_meta as b; b.build_wheel(*sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (path,) = target.glob("wf_vit-*-py3-none-any.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_and_the_configs_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kinds = (".py", ".html", ".css", ".js", ".typed")
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "wf_vit").rglob("*")
        if path.suffix in kinds
    }
    expected |= {f"wf_vit/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    assert held == expected
    assert {"wf_vit/py.typed", "wf_vit/page/explorer.js"} <= held


def test_wheel_runs_by_the_name_of_a_config(wheel, tmp_path):
    """Away from the clone: the configs are found, and import each other."""
    wheel.extractall(tmp_path)
    code = (
        "import sys, wf_vit; from wf_vit import command; "
        "config, folder = command.parse(['--config=vit:runlocal']); "
        "print(config.model.name, folder, wf_vit.__file__); "
        "sys.exit(command.main(['--help']))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert output.startswith(f"vit runs/vit_runlocal {tmp_path}")
    assert f"They are in {tmp_path}/wf_vit/configs" in output


def test_wheel_metadata(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith("dist-info/METADATA")]
    text = wheel.read(name).decode()
    assert f"\nVersion: {wf_vit.__version__}\n" in text
    assert "\nClassifier: Programming Language :: Python :: 3.13\n" in text
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", text, flags=re.MULTILINE)
    assert "jax" in needed
    assert not {"tensorflow", "tensorflow-cpu", "clu", "tensorboard"} & set(needed)
    (name,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    assert "wf-vit = wf_vit.command:program" in wheel.read(name).decode()
