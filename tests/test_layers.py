"""The layers of the package: imports go down only, in no circle, and stay light."""

import ast
import graphlib
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wf_vit"

# Lowest first; a module imports from its own layer and from those before it.
LAYERS = [
    [
        "errors",
        "settings",
        "arrays",
        "cache",
        "shapes",
        "grid",
        "log",
        "memory",
        "stops",
        "workdir",
    ],
    ["data", "models", "indicators"],
    ["measure", "tendency", "fields"],
    ["interventions"],
    ["selection"],
    ["figures", "page"],
    ["train", "verify", "explanation"],
    ["command"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

TRAIN = ("tensorflow", "tensorflow_datasets", "clu", "tensorboard")
# What may not be loaded by importing some modules, directly or through others.
LIGHT = {
    ("flax", "matplotlib", *TRAIN): ["indicators", "fields", "interventions"],
    ("orbax",): ["explanation", "models.pretrained"],
    TRAIN: [
        "command",
        "data.augment",
        "explanation",
        "figures",
        "measure",
        "models.pretrained",
        "models.registry",
        "page",
        "train.checkpoint",
        "train.config",
        "train.parallel",
        "train.reporter",
        "train.steps",
    ],
}

# Where a config is resolved. Everything below takes typed settings, not the config.
DOORS = {
    "command",
    "data.config",
    "data.prepare",
    "explanation.task",
    "models.pretrained.export",
    "models.registry",
    "settings",
    "train.config",
    "train.loop",
    "train.parallel",
    "train.reporter",
    "train.run",
    "verify.task",
    # Each protocol reads its own settings when it is made.
    *(f"verify.{name}" for name in ("subject", "class_maps", "faithfulness", "groups")),
    *(f"verify.{name}" for name in ("pixels", "removal", "tendency", "windows")),
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(path):
    """The modules of the package that a file imports anywhere, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            # What is imported from a module may be a name in it.
            found |= {n for n in (name, name.rpartition(".")[0]) if n in MODULES}
    return found - {"wf_vit"}


def test_imports_go_down_only_and_in_no_circle():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    for name, imported in graph.items():
        if name == "wf_vit":
            continue
        own = name.split(".")[1]
        assert own in LEVEL, f"{own} has no place in the layers: add it to LAYERS"
        for other in imported:
            part = other.split(".")[1]
            assert LEVEL[part] <= LEVEL[own], f"{name} imports {other}, a higher layer"
    # A package hands on what its own modules define.
    for name in graph:
        graph[name] = {n for n in graph[name] if not name.startswith(f"{n}.")}
    graphlib.TopologicalSorter(graph).prepare()


def test_a_config_goes_no_further_than_the_doors():
    takers = {
        name.removeprefix("wf_vit.")
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.arg) and node.annotation
        if "ConfigDict" in ast.unparse(node.annotation)
    }
    assert takers | {"settings"} == DOORS


@pytest.mark.parametrize("absent", LIGHT, ids=lambda names: names[0])
def test_modules_are_imported_without_what_they_do_not_need(absent):
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"  # To import them is an error.
        f"[importlib.import_module('wf_vit.' + name) for name in {LIGHT[absent]}]"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem
)
def test_what_a_benchmark_takes_from_the_package_is_there(path):
    """They are run by hand, some with packages that the tests do without."""
    tree = ast.parse(path.read_text())
    taken = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "wf_vit"
        ):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if f"{node.module}.{alias.name}" in MODULES:
                    importlib.import_module(f"{node.module}.{alias.name}")
                taken[alias.asname or alias.name] = getattr(module, alias.name)
    assert taken
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = taken.get(node.value.id)
            if isinstance(owner, types.ModuleType):
                assert hasattr(owner, node.attr), f"{owner.__name__}.{node.attr}"


def test_only_parallel_knows_of_pmap():
    users = [p.name for p in MODULES.values() if "pmap(" in p.read_text()]
    assert users == ["parallel.py"]


def test_only_the_command_sets_up_jax():
    """A notebook that uses the package keeps its own settings of JAX."""
    users = [n for n, p in MODULES.items() if "wf_vit.cache" in imports_of(p)]
    assert users == ["wf_vit.command"]
    setters = [n for n, p in MODULES.items() if 'config.update("jax' in p.read_text()]
    assert setters == ["wf_vit.cache"]


def test_no_file_is_too_long_to_read():
    lengths = {n: len(p.read_text().splitlines()) for n, p in MODULES.items()}
    assert {n: length for n, length in lengths.items() if length > 400} == {}
