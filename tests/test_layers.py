"""The layers of the package: imports go down only, and light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "wf_vit"

# Lowest first; a module imports from its own layer and from those before it.
LAYERS = [
    ["errors", "shapes", "grid", "tasks"],
    ["data", "models", "indicators"],
    ["fields"],
    ["interventions"],
    ["verify", "figures", "page"],
    ["train", "explain"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What may not be loaded by importing a module, directly or through others.
LIGHT = {
    "wf_vit.indicators": ("tensorflow", "flax", "matplotlib"),
    "wf_vit.models.windowfree": ("tensorflow", "clu"),
    "wf_vit.train.teacher": ("tensorflow", "clu", "tensorflow_datasets"),
    "wf_vit.train.steps": ("tensorflow", "clu", "tensorflow_datasets"),
    "wf_vit.train.optimizer": ("tensorflow", "clu", "tensorflow_datasets"),
    "wf_vit.train.parallel": ("tensorflow", "clu", "tensorflow_datasets"),
}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("wf_vit."):
                yield name.split(".")[1]


MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = part_of(path)
    assert own in LEVEL, f"{own} has no place in the layers: add it to LAYERS"
    for part in imported_parts(path):
        assert LEVEL[part] <= LEVEL[own], f"{own} imports {part}, a higher layer"


@pytest.mark.parametrize("module", LIGHT)
def test_module_stays_light(module):
    code = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    loaded = {name.split(".")[0] for name in output}
    assert module in output
    assert not loaded & set(LIGHT[module])


def test_only_parallel_knows_of_pmap():
    users = [p.name for p in MODULES if "pmap(" in p.read_text()]
    assert users == ["parallel.py"]
