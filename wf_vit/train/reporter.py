"""What a run shows a person: its metrics, its log, its config and its figures."""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from jaxtyping import UInt8
from matplotlib.figure import Figure

from wf_vit import figures
from wf_vit.data import augment
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params

_LOG = logging.getLogger(__name__)

JSONL = "metrics.jsonl"
CONFIG = "config.json"


def read_jsonl(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's ``metrics.jsonl``, in the order of their steps."""
    path = workdir / JSONL
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # What "train/top1" was called by earlier versions.
    return [
        {"train/top1" if k == "train/accuracy" else k: v for k, v in row.items()}
        for row in rows
    ]


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
        self._undrawable = False
        self._bar = None
        self._total = total
        self._start = (step, time.perf_counter())
        if not active:
            return
        # It brings TensorFlow, which whoever reads a finished run can do without.
        from clu import metric_writers

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

    def draw(self, step: int, pictures: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Shows pictures of the model in TensorBoard.

        Training goes on if they cannot be drawn; the log says why, once.

        Args:
          step: of the model.
          pictures: makes them, by name; it is called by the process that reports only.
        """
        if not self._active or self._undrawable:
            return
        try:
            self._writer.write_images(step, dict(pictures()))
        # A figure is not worth a run of days, whatever is wrong with it.
        except Exception as error:
            self._undrawable = True
            _LOG.warning(
                "Pictures of the model cannot be drawn, and are left out from now on "
                "(%s: %s). config.pictures=False turns them off.",
                type(error).__name__,
                error,
            )

    def _left(self, step: int) -> str:
        first, start = self._start
        if step <= first:
            return ""
        seconds = (time.perf_counter() - start) / (step - first) * (self._total - step)
        return f"{tqdm.tqdm.format_interval(seconds)} left"


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns what ``config.json`` holds; nothing if there is none."""
    path = workdir / CONFIG
    return json.loads(path.read_text()) if path.exists() else {}


def save_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes ``config.json``, and logs what changed against an earlier one."""
    if jax.process_index() != 0:
        return
    new = json.loads(config.to_json_best_effort())
    old = read_config(workdir)
    for name in sorted(old.keys() | new.keys()) if old else ():
        if old.get(name) != new.get(name):
            _LOG.warning(
                "config.%s was %s when this run began and is now %s.",
                name,
                old.get(name),
                new.get(name),
            )
    (workdir / CONFIG).write_text(json.dumps(new, indent=2) + "\n")


def save_figures(
    workdir: Path,
    model: ViT,
    params: Params,
    images: UInt8[np.ndarray, "B height width 3"],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Draws the curves of a run and, if its model has them, its learned fields.

    Args:
      workdir: of the run; receives ``figures/``.
      model: the module.
      params: its parameters.
      images: held-out images, over which the fields are drawn.
      mean: by which the images are normalised.
      std: likewise.
    """
    if jax.process_index() != 0:
        return
    _save(figures.training_curves(read_jsonl(workdir)), workdir, "curves")
    normal = augment.normalize(jnp.asarray(images), mean, std)
    _, out = jax.jit(model.apply)({"params": params}, normal)
    if out["fields"]:
        extents = np.stack([f.extents for f in out["fields"].values()])
        figure = figures.learned_fields(
            images, extents, model.grid, softness=model.fields.softness
        )
        _save(figure, workdir, "fields")


def _save(figure: Figure, workdir: Path, name: str) -> None:
    """Writes a figure as PNG and PDF."""
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    with figures.style():
        for suffix in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{suffix}")
    _LOG.info("Wrote %s.", folder / f"{name}.png")
