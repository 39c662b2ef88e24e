"""The files of a run: a working directory that is never half written."""

import contextlib
import datetime
import hashlib
import json
import logging
import os
import socket
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np

from wf_vit.errors import UsageError
from wf_vit.shapes import Params

_LOG = logging.getLogger(__name__)

# Locked by the run that writes here, and what it says of itself.
_LOCK = ".lock"
_OWNER = ".owner.json"


def command_line() -> str:
    """Returns the command that started this program, as a reader would repeat it."""
    program = Path(sys.argv[0]).name
    start = [f"python {program}"] if program.endswith(".py") else [program]
    return " ".join([*start, *sys.argv[1:]])


def prepare_workdir(workdir: Path) -> None:
    """Creates the working directory; raises UsageError if it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UsageError(
            f"The working directory {workdir} cannot be written ({error.strerror}): "
            "pass another one with --workdir."
        ) from error


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds a working directory, so that no second run writes into it.

    The lock is the system's: it is free as soon as its owner is dead.

    Raises:
      UsageError: the folder cannot be written, or another run holds it.
    """
    prepare_workdir(workdir)
    owner = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command_line(),
    }
    lock = filelock.FileLock(workdir / _LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        other = read_json_if_whole(workdir / _OWNER)
        raise UsageError(
            f"{workdir} is in use by process {other.get('process', '?')} on "
            f"{other.get('host', '?')}, started {other.get('started', '?')} "
            f"({other.get('command', '?')}): wait for it, stop it, or pass another "
            "--workdir."
        ) from error
    except (OSError, NotImplementedError) as error:
        _LOG.warning(
            "%s cannot be locked (%s): see to it that no second run uses it.",
            workdir,
            error,
        )
    try:
        write_text(workdir / _OWNER, json.dumps(owner) + "\n")
        yield
    finally:
        (workdir / _OWNER).unlink(missing_ok=True)
        lock.release()


def read_json_if_whole(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds; none, and a warning, if it is damaged.

    A file that does not exist holds none either.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        _LOG.warning("%s cannot be read, and counts as empty: %s.", path, error)
        return {}
    return content


@contextlib.contextmanager
def opened_arrays(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Opens a file of arrays that a run has written.

    Raises:
      UsageError: it is damaged, or lacks an array that is looked up inside.
    """
    try:
        with np.load(path) as arrays:
            yield arrays
    except UsageError:
        raise
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{path} is damaged ({error}): remove it, and run again to make it anew."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file, all at once: a kill leaves the old one or the new one."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def claim_workdir(
    workdir: Path,
    settings: dict[str, Any],
    params: Params,
    *,
    results: Path,
    free: Collection[str],
) -> None:
    """Writes ``config.json``; if there are results, checks that they fit it.

    It also holds a digest of the parameters: the same name may stand for others now.

    Args:
      workdir: the working directory.
      settings: of the run, in terms of JSON.
      params: of the model.
      results: the folder of the results; there are some if it is not empty.
      free: keys that change no number, and may differ from one call to the next.

    Raises:
      UsageError: the results have other settings.
    """
    path = workdir / "config.json"
    settings = json.loads(json.dumps(settings))
    settings["parameters_sha256"] = _digest(params)
    if path.exists() and results.is_dir() and any(results.iterdir()):
        earlier = read_json_if_whole(path)
        if not earlier:
            raise UsageError(
                f"{path} is damaged, so that nobody knows the settings of the results "
                "beside it: pass another --workdir, or remove this one."
            )
        changed = [
            f"{name} was {earlier.get(name)!r} and is now {settings.get(name)!r}"
            for name in sorted(earlier.keys() | settings.keys())
            if name not in free and earlier.get(name) != settings.get(name)
        ]
        if changed:
            raise UsageError(
                f"{workdir} holds results of other settings: {'; '.join(changed)}. "
                "Pass another --workdir, or remove this one."
            )
    write_text(path, json.dumps(settings, indent=2) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write what then becomes ``path`` all at once.

    It may be a folder if ``path`` does not exist yet.
    """
    partial = path.with_name(f".partial-{path.name}")
    yield partial
    partial.replace(path)


def _digest(params: Params) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()
