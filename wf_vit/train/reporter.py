"""What a run shows a person: its metrics, its log, its config and its figures."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
from wf_vit.errors import UsageError
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params
from wf_vit.workdir import read_json_if_whole, write_text

_LOG = logging.getLogger(__name__)

JSONL = "metrics.jsonl"
CONFIG = "config.json"


# What a run cannot change and stay one run: what is learned, and from what in which
# order. Of the model, what only says how it is computed may change.
_FIXED = (
    "seed",
    "model",
    "data.name",
    "data.train",
    "data.shuffle_buffer",
    "data.image_size",
)
_FREE = ("model.dtype", "model.remat", "model.drop_path", "model.fields.threshold")


def read_jsonl(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's ``metrics.jsonl``, in the order of their steps.

    Lines that are no rows, such as the half of one that a crash left, are left out, and
    the log says which. A value that was not finite is NaN.
    """
    path = workdir / JSONL
    if not path.exists():
        return []
    rows, unreadable = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line.strip(b"\0 "))
            step = int(row.pop("step"))
            rows.append(
                {"step": step, **{_renamed(k): _number(v) for k, v in row.items()}}
            )
        except (ValueError, TypeError, AttributeError, KeyError):
            unreadable.append(number)
    if unreadable:
        _LOG.warning(
            "%s: %d lines are damaged and are left out, the first is line %d.",
            path,
            len(unreadable),
            unreadable[0],
        )
    return rows


def _renamed(name: str) -> str:
    """Returns what a metric of an earlier version is called now."""
    return "train/top1" if name == "train/accuracy" else name


def _evaluates(row: Mapping[str, Any]) -> bool:
    """Whether a row is of an evaluation."""
    return not any(name.startswith("train/") for name in row)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _line(step: int, scalars: Mapping[str, float]) -> str:
    """Returns a line of ``metrics.jsonl``; JSON has no NaN, so that it is null."""
    finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
    return json.dumps({"step": step, **finite}, allow_nan=False) + "\n"


class Reporter:
    """Writes the metrics of a run, on the first process only.

    A run that resumes drops the rows of steps that it does again, so that each step
    is reported once.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        total: int,
        batch_size: int,
        active: bool,
        evaluation_pending: bool = False,
    ):
        """Starts reporting.

        Args:
          workdir: where ``metrics.jsonl`` and TensorBoard's events go.
          step: steps already done.
          total: steps of the whole run.
          batch_size: images in a step, over all processes.
          active: whether this process reports.
          evaluation_pending: whether the last of those steps is evaluated again.
        """
        self._active = active
        self._undrawable = False
        self._bar = None
        self._total = total
        self._start = (step, time.perf_counter())
        if not active:
            return
        # Whoever reads a finished run can do without TensorFlow. The writers of clu
        # would bring Keras, too, which takes a second.
        from wf_vit.data.tensorflow import tf

        kept = [
            row
            for row in read_jsonl(workdir)
            if row["step"] < step
            or (row["step"] == step and not (evaluation_pending and _evaluates(row)))
        ]
        write_text(
            workdir / JSONL, "".join(_line(row.pop("step"), row) for row in kept)
        )
        self._file = (workdir / JSONL).open("a", buffering=1)
        self._summary = tf.summary
        self._events = tf.summary.create_file_writer(str(workdir))
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
        self._events.close()
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
        self._file.write(_line(step, scalars))
        with self._events.as_default(step):
            for name, value in scalars.items():
                self._summary.scalar(name, value)
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
            with self._events.as_default(step):
                for name, images in pictures().items():
                    self._summary.image(name, images)
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
    return read_json_if_whole(workdir / CONFIG)


def save_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes ``config.json``."""
    if jax.process_index() == 0:
        write_text(workdir / CONFIG, json.dumps(_plain(config), indent=2) + "\n")


def check_changes(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Logs what of the config has changed since the run began.

    Args:
      config: with which the run is to go on.
      workdir: of the run, with its ``config.json``.

    Raises:
      UsageError: what changed would spoil the run, and ``config.on_change`` does not
        say to continue.
    """
    old = dict(_leaves(read_config(workdir)))
    new = dict(_leaves(_plain(config)))
    spoiling = []
    # A key that the version before did not have is no change.
    for name in sorted(old.keys() & new.keys()):
        if old[name] == new[name]:
            continue
        text = f"config.{name} was {old[name]!r} and is now {new[name]!r}"
        _LOG.warning("%s.", text)
        if _within(name, _FIXED) and not _within(name, _FREE):
            spoiling.append(text)
    if spoiling and config.on_change == "stop":
        raise UsageError(
            f"The run in {workdir} was begun with other settings: "
            f"{'; '.join(spoiling)}. Use those of the run, pass a new --workdir, or, "
            "if you mean it, --config.on_change=continue."
        )


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a config in terms of JSON."""
    return json.loads(config.to_json_best_effort())


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every key, such as ``model.fields.growth``, and its value."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


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
        gaussians = np.stack([f.gaussians for f in out["fields"].values()])
        figure = figures.learned_fields(images, gaussians, model.grid)
        _save(figure, workdir, "fields")


def _save(figure: Figure, workdir: Path, name: str) -> None:
    """Writes a figure as PNG and PDF."""
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    with figures.style():
        for suffix in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{suffix}")
    _LOG.info("Wrote %s.", folder / f"{name}.png")
