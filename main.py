"""Runs an experiment: ``python main.py --config=configs/NAME.py``.

Without --config it trains a window-free transformer on embedded digits. Any key of
the config can be overridden: ``--config.batch_size=256``.
"""

import importlib
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from wf_vit.errors import UsageError
from wf_vit.workdir import check_task, show_own_log

_DEFAULT = Path(__file__).parent / "configs" / "digits.py"
_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="The experiment, a file that defines get_config()."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept. Default: runs/<name of the config file>."
)

# The module of each task, which has a function of the task's name.
_TASKS = dict.fromkeys(("train", "evaluate"), "wf_vit.train.loop")
_TASKS |= {"explain": "wf_vit.explanation", "verify": "wf_vit.verify"}
# What config_flags raises for a key or a file that does not exist, or a wrong type.
_FLAG_ERRORS = (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError)


def main(argv: list[str]) -> None:
    """Dispatches on ``config.task``."""
    if len(argv) > 1:
        raise UsageError(f"Unexpected arguments {argv[1:]}: settings are --flags.")
    config = _CONFIG.value
    check_task(config)
    show_own_log()
    if "distributed" in config:
        from wf_vit.train import parallel

        parallel.initialize(config.distributed)
    task = getattr(importlib.import_module(_TASKS[config.task]), config.task)
    task(config, Path(_WORKDIR.value or default_workdir()))


def default_workdir() -> str:
    """Returns runs/<config name>, with the config's argument if it has one."""
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    file, _, argument = name.partition(":")
    return f"runs/{Path(file).stem}" + (f"_{argument}" if argument else "")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a name that no config knows is a usage error."""
    if not any(arg.startswith(("--config=", "--config:")) for arg in argv):
        argv = [argv[0], f"--config={_DEFAULT}", *argv[1:]]
    sys.argv = argv  # Where config_flags looks for overrides.
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.is_locked  # noqa: B018  Loads the file.
    except _FLAG_ERRORS as error:
        reason = error
        while reason.args and isinstance(reason.args[0], Exception):
            reason = reason.args[0]
        text = reason.args[0] if isinstance(reason, KeyError) else reason
        hint = "See --help for the flags, and the config file for every key."
        raise UsageError(f"{text}\n{hint}") from error
    return rest


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
