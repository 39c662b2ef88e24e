"""The files of a run: a working directory that is never half written."""

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wf_vit.errors import UsageError
from wf_vit.shapes import Params


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
        earlier = json.loads(path.read_text())
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
    with replacing(path) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")


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
