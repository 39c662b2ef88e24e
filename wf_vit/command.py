"""The command: ``wf-vit``, or ``python main.py`` in a clone.

    wf-vit --config=NAME[:ARGUMENT] [--config.KEY=VALUE ...] [--workdir=DIR]

A config says which task is run. Nothing heavy is imported before it is known: the help
and a misspelt key are answered at once, also where TensorFlow is not installed.
"""

import ast
import contextlib
import dataclasses
import errno
import importlib
import importlib.util
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

from wf_vit import log, memory, settings, stops
from wf_vit.errors import RunError, UsageError


@dataclasses.dataclass(frozen=True)
class Task:
    """What a config can ask for.

    Attributes:
      module: the module with the function, which has the task's name and takes the
        config and the working directory.
      key: what the configs of this task have and those of other tasks may lack.
      summary: a line for the help.
      keys: the config in our folder that declares the settings; None: training does.
    """

    module: str
    key: str
    summary: str
    keys: str | None = None


TASKS = {
    "train": Task(
        "wf_vit.train.loop",
        "model",
        "trains a model; goes on from the last checkpoint in --workdir",
    ),
    "evaluate": Task(
        "wf_vit.train.loop", "model", "evaluates the best checkpoint in --workdir"
    ),
    "explain": Task(
        "wf_vit.explanation.task",
        "images",
        "explains images: figures, a page, a table",
        keys="explain",
    ),
    "verify": Task(
        "wf_vit.verify",
        "protocols",
        "checks the indicators on a data set",
        keys="verify",
    ),
    "export": Task(
        "wf_vit.models.pretrained.export",
        "layout",
        "saves a checkpoint for timm, for transformers, or in our own layout",
        keys="export",
    ),
    "prepare": Task(
        "wf_vit.data.prepare",
        "data",
        "downloads the config's data set and writes it in the form that is read",
    ),
}
_DEFAULT = "digits"
# Exit statuses; another one is ``stops.STATUS``.
_FAILED, _USAGE = 1, 2
_HELP = {"-h", "-help", "--help"}
# The extra [train] installs these; the rest of the package works without them.
_TRAIN_PACKAGES = (
    "clu",
    "importlib_resources",
    "optax",
    "scipy",
    "tensorboard",
    "tensorflow",
    "tensorflow_datasets",
)
# What config_flags raises for a key or a file that does not exist, or a wrong type.
_FLAG_ERRORS = (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError)


def program() -> NoReturn:
    """Runs the command and ends the process.

    After an error it waits for nothing: neither for threads of a library that could not
    finish, nor for the other processes of a run, which learn of it otherwise.
    """
    status = main()
    if status in (_USAGE, _FAILED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: those of the command line, without the program's name; None: those
        this program was started with.

    Returns:
      The exit status: 0; 2 after a usage error, 1 if the run cannot go on, 75 after a
      stop by a signal, each of which is printed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if _HELP & set(arguments):
            rest = [argument for argument in arguments if argument not in _HELP]
            print(help_text(), *[keys_text(rest)] if rest else [], sep="\n", flush=True)
            return 0
        with stops.handled(), _full_disk_explained():
            run(arguments)
    except UsageError as error:
        return _ended(f"Error: {error}", _USAGE)
    except RunError as error:
        return _ended(f"Error: {error}", _FAILED)
    except stops.Stopped as stop:
        return _ended(str(stop), stops.STATUS)
    except BrokenPipeError:  # Who reads what is printed, such as ``head``, has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _ended(message: str, status: int) -> int:
    """Prints why the run ended; returns the status with which it did."""
    print(message, file=sys.stderr, flush=True)
    return status


@contextlib.contextmanager
def _full_disk_explained() -> Iterator[None]:
    """Turns a write that failed for lack of room into a message."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while {error.filename} was written" if error.filename else ""
        raise RunError(
            f"The disk is full{where}. Make room and run again to continue."
        ) from error


def run(arguments: Sequence[str]) -> None:
    """Runs the task of the config that the arguments name.

    Raises:
      UsageError: the arguments, or what the task was given, cannot work.
    """
    log.show_own_log()  # First: a config may import TensorFlow too.
    config, workdir = parse(arguments)
    check(config)
    memory.keep()
    from wf_vit import cache

    cache.keep_compiled_programs()
    with _missing_packages_explained():
        if config.task in ("train", "evaluate"):
            from wf_vit.train import parallel

            parallel.initialize(config.distributed)
        module = importlib.import_module(TASKS[config.task].module)
        getattr(module, config.task)(config, workdir)


def parse(arguments: Sequence[str]) -> tuple[ml_collections.ConfigDict, Path]:
    """Returns the config, with its overrides, and the working directory.

    Args:
      arguments: of the command line, without the program's name.

    Raises:
      UsageError: there is no such config, key or flag, or a value is of another type.
    """
    name, arguments = _split_off_config(arguments)
    name, colon, argument = name.partition(":")
    file = _config_file(name)
    _let_configs_import_each_other(file.parent)
    argv = ["wf-vit", f"--config={file}{colon}{argument}", *arguments]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=argv
    )
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        with _missing_packages_explained():
            rest = values(argv)[1:]
            loaded = config.value
    except UsageError:
        raise
    except _FLAG_ERRORS as error:
        raise UsageError(
            f"{_reason(error)}\nSee --help for the flags, and {file} for its keys."
        ) from error
    if rest:
        raise UsageError(f"Unexpected arguments {rest}: settings are --flags.")
    default = f"runs/{file.stem}" + (f"_{argument}" if argument else "")
    return loaded, Path(workdir.value or default)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError unless a config fits its task, with all values in range."""
    check_task(config)
    settings.check(keys_of(config.task), config)


def keys_of(task: str) -> settings.Tree:
    """Returns the declarations of all settings of a task."""
    name = TASKS[task].keys
    if name is None:
        with _missing_packages_explained():
            return importlib.import_module("wf_vit.train.keys").KEYS
    # Ours, whatever lies beside the user's config.
    file = config_folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"wf_vit_keys_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.KEYS


def keys_text(arguments: Sequence[str]) -> str:
    """Returns the help for the keys of the config that the arguments name.

    Raises:
      UsageError: as ``parse``.
    """
    config, _ = parse(arguments)
    check_task(config)
    lines = [f"Keys of this config (task {config.task}), with their values:"]
    for key, value, expected, meaning in settings.rows(keys_of(config.task), config):
        lines.append(f"\n  --config.{key}={value!r}")
        lines += textwrap.wrap(
            f"{meaning}. Expected: {expected}.",
            width=88,
            initial_indent="      ",
            subsequent_indent="      ",
        )
    return "\n".join(lines)


def check_task(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError unless the config is made for its ``config.task``."""
    if config.task not in TASKS:
        raise UsageError(
            f"config.task is {config.task!r}: choose one of {', '.join(TASKS)}."
        )
    key = TASKS[config.task].key
    if key not in config:
        raise UsageError(
            f"config.task is {config.task!r}, but the config has no {key!r}: pass a "
            "config of that task: configs/explain.py, configs/verify.py, "
            "configs/export.py, or such as configs/digits.py to train, evaluate and "
            "prepare."
        )


def help_text() -> str:
    """Returns what ``--help`` prints: the configs, the tasks, where the keys are."""
    program = Path(sys.argv[0]).name
    command = "python3 main.py" if program == "main.py" else "wf-vit"
    folder = config_folder()
    configs = {file.stem: _first_line(file) for file in sorted(folder.glob("[!_]*.py"))}
    tasks = {name: task.summary for name, task in TASKS.items()}
    return f"""\
{command} [--config=NAME[:ARGUMENT]] [--config.KEY=VALUE ...] [--workdir=DIR]

Measures, shows and trains from the patch interactions of vision transformers.

Configs: --config=NAME, or the path of a file of your own (default: {_DEFAULT}).
{_table(configs)}
They are in {folder}
The top of each file says what it needs, and which ARGUMENT it takes.

Tasks: --config.task=TASK (default: the config's own).
{_table(tasks)}

Keys: --config.KEY=VALUE changes one, such as --config.batch_size=256.
  --config=NAME --help lists all of a config with their values, ranges and meanings.

--workdir: the folder of the results (default: runs/NAME, or runs/NAME_ARGUMENT).

Exit status: 0 done; 1 the run cannot go on; 2 something given cannot work;
{stops.STATUS} stopped by SIGTERM or Ctrl-C, to be run again.
"""


def config_folder() -> Path:
    """Returns the folder of the configs: within the package (wheel) or beside it."""
    package = Path(__file__).resolve().parent
    within = package / "configs"
    return within if within.is_dir() else package.parent / "configs"


def _split_off_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the value of --config, and the other arguments."""
    name, rest = _DEFAULT, []
    arguments = iter(arguments)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            rest.append(argument)
            continue
        name = value if equals else next(arguments, "")
        if not name:
            raise UsageError(f"--config has no value: give it one of {_names()}.")
    return name, rest


def _config_file(name: str) -> Path:
    """Returns the file of a config: a path, or the name of one of the package's."""
    file = Path(name) if name.endswith(".py") else config_folder() / f"{name}.py"
    if not file.is_file():
        raise UsageError(
            f"There is no config {name!r}: give --config the path of a .py file, or "
            f"one of {_names()}."
        )
    return file.resolve()


def _names() -> str:
    return ", ".join(sorted(file.stem for file in config_folder().glob("[!_]*.py")))


def _let_configs_import_each_other(folder: Path) -> None:
    """Makes ``from configs import NAME`` work in a config, wherever it lies.

    It finds the files beside the config first, then those of this package.
    """
    if "configs" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "configs",
        config_folder() / "__init__.py",
        submodule_search_locations=[str(folder), str(config_folder())],
    )
    sys.modules["configs"] = importlib.util.module_from_spec(spec)


@contextlib.contextmanager
def _missing_packages_explained() -> Iterator[None]:
    """Turns the lack of a package of the extra [train] into a usage error."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _TRAIN_PACKAGES:
            raise
        raise UsageError(
            f"This task needs the package {package!r}, which is not installed: run "
            "`pip install 'wf-vit[train]'` (in a clone: `pip install -e '.[train]'`)."
        ) from error


def _reason(error: Exception) -> str:
    """Returns what config_flags or a config says, without the layers around it."""
    if "Error whilst parsing config file" in str(error):  # and its whole traceback
        while error.__context__ is not None:
            error = error.__context__
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{where.filename}, line {where.lineno}: {error}"
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    return f"The config has no key {text}" if text.startswith("'") else text


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:{width}}   {text}" for name, text in rows.items())
