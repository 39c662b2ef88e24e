"""Runs an experiment: ``python main.py --config=configs/NAME.py``.

Without --config it trains a window-free transformer on embedded digits. Any key of
the config can be overridden: ``--config.batch_size=256``.
"""

import logging
import sys
from pathlib import Path

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from wf_vit.errors import UsageError

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/digits.py", "The experiment, a file that defines get_config()."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept. Default: runs/<name of the config file>."
)

_TASKS = ("train", "evaluate")


def main(argv: list[str]) -> None:
    """Dispatches on ``config.task``."""
    if len(argv) > 1:
        raise UsageError(f"Unexpected arguments {argv[1:]}: settings are --flags.")
    show_own_log()
    config = _CONFIG.value
    if config.task not in _TASKS:
        raise UsageError(f"config.task is {config.task!r}: choose one of {_TASKS}.")
    # Late, so that --help and a misspelt flag do not wait for them.
    from wf_vit.train import loop, parallel

    parallel.initialize(config.distributed)
    workdir = Path(_WORKDIR.value or default_workdir())
    getattr(loop, config.task)(config, workdir)


def show_own_log() -> None:
    """Shows what this program logs, and of its libraries only the errors."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("wf_vit")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def default_workdir() -> str:
    """Returns runs/<config name>, with the config's argument if it has one."""
    file, _, argument = config_flags.get_config_filename(
        flags.FLAGS["config"]
    ).partition(":")
    return f"runs/{Path(file).stem}" + (f"_{argument}" if argument else "")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a name that no config knows is a usage error."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{error}\nThe config file lists every key.") from error


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
