"""Outcomes on disk, a file for each batch, so that a killed run goes on."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from wf_vit.errors import UsageError
from wf_vit.shapes import Params

# Settings that change no outcome, only what is made of them.
_FREE = ("bootstrap_samples", "timing_turns")


class Store:
    """The outcomes of one set of settings, in ``config.json`` and ``outcomes/``."""

    def __init__(self, workdir: Path, settings: dict[str, Any], params: Params):
        """Opens the working directory, and creates it if it does not exist.

        Args:
          workdir: where the outcomes are kept.
          settings: of the run, in terms of JSON.
          params: of the model; the same name may stand for others one day.

        Raises:
          UsageError: it cannot be written, or holds outcomes of other settings.
        """
        self._folder = workdir / "outcomes"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise UsageError(
                f"The working directory {workdir} cannot be written "
                f"({error.strerror}): pass another one with --workdir."
            ) from error
        path = workdir / "config.json"
        settings = settings | {"parameters_sha256": _digest(params)}
        settings = json.loads(json.dumps(settings))
        if path.exists() and any(self._folder.glob("*.npz")):
            _check_same(workdir, json.loads(path.read_text()), settings)
        path.write_text(json.dumps(settings, indent=2) + "\n")

    def has(self, batch: int) -> bool:
        """Whether the outcomes of a batch are there."""
        return self._file(batch).exists()

    def save(self, batch: int, outcomes: dict[str, Shaped[np.ndarray, "..."]]) -> None:
        """Writes the outcomes of a batch, all at once."""
        partial = self._file(batch).with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **outcomes)
        partial.replace(self._file(batch))

    def load(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Returns the outcomes of all batches one after the other, by name."""
        parts: dict[str, list[np.ndarray]] = {}
        for path in sorted(self._folder.glob("*.npz")):
            with np.load(path) as arrays:
                for name in arrays.files:
                    parts.setdefault(name, []).append(arrays[name])
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _file(self, batch: int) -> Path:
        return self._folder / f"{batch:06d}.npz"


def _check_same(workdir: Path, earlier: dict, settings: dict) -> None:
    changed = [
        f"{name} was {earlier.get(name)!r} and is now {settings.get(name)!r}"
        for name in sorted(earlier.keys() | settings.keys())
        if name not in _FREE and earlier.get(name) != settings.get(name)
    ]
    if changed:
        raise UsageError(
            f"{workdir} holds outcomes of other settings: {'; '.join(changed)}. Pass "
            "another --workdir, or remove this one."
        )


def _digest(params: Params) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()
