"""The metrics and the time between two reports of a run, and the updates it skips."""

import contextlib
import logging
import time
from collections.abc import Iterator

import jax
import numpy as np

from wf_vit.errors import RunError
from wf_vit.train import parallel, steps
from wf_vit.train.config import Progress

# What is no mean, but a count.
_EXAMPLES = "examples_skipped"

_LOG = logging.getLogger(__name__)


class NonFiniteLossError(RunError):
    """Too many losses, gradients or updates were infinite or NaN."""


class Window:
    """The training metrics and the time since the last report.

    Attributes:
      updates_skipped: by the whole run, as they were not finite.
    """

    def __init__(self, done: Progress, *, batch_size: int, max_skipped_updates: int):
        """Starts the first window of this call.

        Args:
          done: how far the run has come; its window goes on.
          batch_size: images in a step, over all processes.
          max_skipped_updates: how many updates of the run may be skipped.
        """
        self._batch_size = batch_size
        self._limit = max_skipped_updates
        self._device: dict[int, steps.Metrics] = {}
        self._host = list(done.window)
        self._steps = 0
        self.updates_skipped = done.updates_skipped
        self._start = time.perf_counter()

    def add(self, step: int, metrics: steps.Metrics) -> None:
        """Takes a step's metrics, which may still be on their way."""
        self._device[step] = metrics
        self._steps += 1
        awaited = self._device.get(step - parallel.STEPS_AHEAD)
        if awaited is not None:
            jax.block_until_ready(awaited)

    def close(self) -> dict[str, float]:
        """Returns the means and the speed, and starts the next window.

        Raises:
          NonFiniteLossError: too many updates were skipped.
        """
        rows = self.rows()
        finite = [row for row in rows if not row["updates_skipped"]] or rows
        # A run that resumed with other settings may have other metrics since.
        names = {name for row in finite for name in row} - {"updates_skipped"}
        means = {
            f"train/{name}": float(
                np.mean([row[name] for row in finite if name in row])
            )
            for name in sorted(names - {_EXAMPLES})
        }
        skipped = [row[_EXAMPLES] for row in rows if _EXAMPLES in row]
        if skipped:
            means[f"train/{_EXAMPLES}"] = sum(skipped)
        if self.updates_skipped:
            means["train/updates_skipped"] = float(self.updates_skipped)
            means["train/max_skipped_updates"] = float(self._limit)
        seconds = time.perf_counter() - self._start
        means["train/images_per_second"] = self._steps * self._batch_size / seconds
        self._host, self._steps = [], 0
        self._start = time.perf_counter()
        return means

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens inside out of the speed; checks the steps before it.

        Raises:
          NonFiniteLossError: too many updates were skipped.
        """
        self.rows()
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def rows(self) -> list[dict[str, float]]:
        """Waits for the metrics of all steps of the window and returns them.

        Raises:
          NonFiniteLossError: too many updates were skipped.
        """
        fetched = jax.device_get(self._device)
        self._device = {}
        for step, row in fetched.items():
            self._host.append({name: float(value) for name, value in row.items()})
            if not row["updates_skipped"]:
                continue
            self.updates_skipped += 1
            found = (
                f"At step {step} the loss is {row['loss']}, the norm of the gradient "
                f"{row['gradient_norm']} and of the update {row['update_norm']}."
            )
            if self.updates_skipped > self._limit:
                raise NonFiniteLossError(
                    f"{found} {self.updates_skipped} updates were skipped, more than "
                    f"config.max_skipped_updates, {self._limit}. The last checkpoint "
                    "is from before. Lower config.optimizer.learning_rate or "
                    "clip_norm, lengthen the warm-up, or check the data; then run "
                    "again to resume."
                )
            _LOG.warning(
                "%s This update is skipped, number %d of at most %d.",
                found,
                self.updates_skipped,
                self._limit,
            )
        return self._host
