"""Outcomes on disk, a file for each batch, so that a killed run goes on."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from wf_vit.shapes import Params
from wf_vit.workdir import claim_workdir, prepare_workdir, replacing

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
        prepare_workdir(self._folder)
        claim_workdir(workdir, settings, params, results=self._folder, free=_FREE)

    def has(self, batch: int) -> bool:
        """Whether the outcomes of a batch are there."""
        return self._file(batch).exists()

    def save(self, batch: int, outcomes: dict[str, Shaped[np.ndarray, "..."]]) -> None:
        """Writes the outcomes of a batch, all at once."""
        with replacing(self._file(batch)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **outcomes)

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
