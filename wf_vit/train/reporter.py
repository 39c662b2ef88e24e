"""What a run reports: TensorBoard, ``metrics.jsonl``, a progress bar or plain lines."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tqdm
from clu import metric_writers

_LOG = logging.getLogger(__name__)

JSONL = "metrics.jsonl"


def read_jsonl(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's ``metrics.jsonl``, in the order of their steps."""
    path = workdir / JSONL
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


class Reporter:
    """Writes the metrics of a run, on the first process only.

    A run that resumes drops the rows of steps that it does again, so that each step
    is reported once.
    """

    def __init__(
        self, workdir: Path, *, step: int, total: int, batch_size: int, active: bool
    ):
        """Starts reporting.

        Args:
          workdir: where ``metrics.jsonl`` and TensorBoard's events go.
          step: steps already done.
          total: steps of the whole run.
          batch_size: images in a step, over all processes.
          active: whether this process reports.
        """
        self._active = active
        self._bar = None
        self._total = total
        self._start = (step, time.perf_counter())
        if not active:
            return
        kept = [row for row in read_jsonl(workdir) if row["step"] <= step]
        (workdir / JSONL).write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = (workdir / JSONL).open("a", buffering=1)
        self._writer = metric_writers.AsyncWriter(
            metric_writers.SummaryWriter(str(workdir))
        )
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                initial=step,
                total=total,
                unit=" images",
                unit_scale=batch_size,
                dynamic_ncols=True,
            )

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_) -> None:
        if not self._active:
            return
        self._writer.close()
        self._file.close()
        if self._bar is not None:
            self._bar.close()

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Reports scalars of a step."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._writer.write_scalars(step, dict(scalars))
        text = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        if self._bar is None:
            _LOG.info("step %d/%d  %s  %s", step, self._total, text, self._left(step))
        else:
            self._bar.write(f"step {step}: {text}", file=sys.stderr)

    def _left(self, step: int) -> str:
        first, start = self._start
        if step <= first:
            return ""
        seconds = (time.perf_counter() - start) / (step - first) * (self._total - step)
        return f"{tqdm.tqdm.format_interval(seconds)} left"
