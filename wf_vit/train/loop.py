"""The tasks ``train`` and ``evaluate``: data, devices, steps, checkpoints, reports."""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import UInt8

from wf_vit.data.config import DataConfig
from wf_vit.data.pipeline import Dataset, open_dataset
from wf_vit.errors import UsageError
from wf_vit.shapes import Params
from wf_vit.train import parallel, steps
from wf_vit.train.checkpoint import Checkpoints
from wf_vit.train.config import Progress, Training, resolve
from wf_vit.train.pictures import draw_pictures
from wf_vit.train.reporter import Reporter, read_config, save_config, save_figures
from wf_vit.train.state import TrainState
from wf_vit.workdir import prepare_workdir

_LOG = logging.getLogger(__name__)

# Steps that may be dispatched before the device has finished the first of them: it
# hides the host's work, and bounds the batches that wait in the device's memory.
_STEPS_AHEAD = 2

_START = Progress()

# What a checkpoint's ``meta`` calls the training examples that led to it.
_EXAMPLES_SEEN = "examples_seen"


class NonFiniteLossError(RuntimeError):
    """The loss, the gradient or the update became infinite or NaN."""


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains, from the last checkpoint of the working directory if there is one.

    Args:
      config: the experiment's config (``wf_vit.train.config``).
      workdir: receives ``config.json``, ``metrics.jsonl``, TensorBoard's events,
        ``checkpoints/`` and, at the end, ``figures/``.

    Returns:
      The metrics of the last evaluation.

    Raises:
      UsageError: the config cannot work; the message says what to do.
      NonFiniteLossError: training diverged; the last good checkpoint is intact.
    """
    prepare_workdir(workdir)
    with Checkpoints(workdir) as checkpoints:
        done = _progress(checkpoints, config, workdir)
        run = open_run(config, done=done)
        training = run.training
        update = parallel.map_update(
            functools.partial(
                steps.train_step,
                model=training.model,
                optimizer=training.optimizer,
                objective=training.objective,
                axis=parallel.AXIS,
            ),
            training.teacher_params,
        )
        state = training.start()
        if checkpoints.last_step is not None:
            state = checkpoints.restore(state)
            _LOG.info(
                "Resuming after step %d and %d examples.", done.step, done.examples
            )
        save_config(config, workdir)
        reporter = Reporter(
            workdir,
            step=done.step,
            total=training.durations.total,
            batch_size=run.batch_size,
            active=jax.process_index() == 0,
        )
        with reporter:
            state, metrics = _train(
                run,
                done,
                parallel.spread(state),
                update,
                checkpoints,
                reporter,
                _profiler(workdir) if config.profile else None,
            )
    augmentation = training.objective.augmentation
    save_figures(
        workdir,
        training.model,
        state.eval_params,
        run.examples,
        mean=augmentation.mean,
        std=augmentation.std,
    )
    return metrics


def _progress(
    checkpoints: Checkpoints, config: ml_collections.ConfigDict, workdir: Path
) -> Progress:
    """Returns how far the run of the working directory has come."""
    step = checkpoints.last_step
    if step is None:
        return _START
    examples = checkpoints.last_meta.get(_EXAMPLES_SEEN)
    if examples is None:
        # A checkpoint of an earlier version: the run's config has the batch size.
        batch_size = read_config(workdir).get("batch_size", config.batch_size)
        examples = step * batch_size
        _LOG.info(
            "Checkpoint %d does not say how many examples it has seen: taken for %d, "
            "%d in each step.",
            step,
            examples,
            batch_size,
        )
    return Progress(step, examples)


def evaluate(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, float]:
    """Evaluates a checkpoint of the working directory on every split of the config.

    Returns:
      ``<split>/top1`` and ``<split>/loss``.

    Raises:
      UsageError: the config cannot work, or there is no checkpoint.
    """
    run = open_run(config, guided=False)
    with Checkpoints(workdir) as checkpoints:
        state = checkpoints.restore(
            run.training.start(), which=config.evaluate_checkpoint
        )
    metrics = run.evaluate(parallel.spread(state.eval_params))
    print(json.dumps({"step": int(state.step), **metrics}))
    return metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """A config made concrete: its data and its training.

    Attributes:
      data: open.
      training: the rest.
      batch_size: of a step, over all devices of all processes.
      eval_batch_size: likewise, of evaluation.
      draws: whether an evaluation draws pictures, too.
    """

    data: Dataset
    training: Training
    batch_size: int
    eval_batch_size: int
    draws: bool

    def train_batches(self, examples_seen: int) -> Iterator[steps.Batch]:
        """Yields this process's sharded batches, from any example of the run on."""
        batches = self.data.train_batches(
            batch_size=self.batch_size,
            seed=self.training.objective.seed,
            start=examples_seen,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return map(parallel.shard, batches)

    def evaluate(self, params: Params) -> dict[str, float]:
        """Returns ``<split>/top1`` and ``<split>/loss``, every example counted once.

        With ``config.data.on_error="skip"`` ``<split>/skipped`` counts those left out.
        """
        metrics = {}
        for split in self.data.config.eval:
            batches = self.data.eval_batches(
                split,
                batch_size=self.eval_batch_size // jax.process_count(),
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            # The device adds up in float32 within a batch, the host in float64.
            totals = collections.Counter()
            for batch in batches:
                sums = self._eval_step(params, parallel.shard(batch))
                totals.update({k: float(v) for k, v in sums.items()})
            if not totals["count"]:
                raise UsageError(
                    f"No example of the split {split!r} of config.data.eval can be "
                    "read: repair the data set, or remove the split."
                )
            for name in ("top1", "loss"):
                metrics[f"{split}/{name}"] = totals[name] / totals["count"]
            if self.data.config.on_error == "skip":
                skipped = self.data.info.num_examples[split] - totals["count"]
                metrics[f"{split}/skipped"] = skipped
        return metrics

    @functools.cached_property
    def _eval_step(self) -> Callable[[Params, steps.Batch], steps.Metrics]:
        augmentation = self.training.objective.augmentation
        return parallel.map_reduce(
            functools.partial(
                steps.eval_step,
                model=self.training.model,
                mean=augmentation.mean,
                std=augmentation.std,
                axis=parallel.AXIS,
            )
        )

    def pictures(self, params: Params) -> dict[str, np.ndarray]:
        """Returns pictures of the model, by name."""
        augmentation = self.training.objective.augmentation
        return draw_pictures(
            self.training.model,
            params,
            self.examples,
            mean=augmentation.mean,
            std=augmentation.std,
        )

    @functools.cached_property
    def examples(self) -> UInt8[np.ndarray, "B height width 3"]:
        """A few images of the first evaluation split, to be drawn."""
        batch = next(
            self.data.eval_batches(next(iter(self.data.config.eval)), batch_size=6)
        )
        return batch["image"][batch["mask"]]


def open_run(
    config: ml_collections.ConfigDict,
    *,
    guided: bool = True,
    done: Progress = _START,
) -> Run:
    """Opens the data and resolves the config, checking them together.

    Args:
      config: the experiment's config (``wf_vit.train.config``).
      guided: whether to open what guides; an evaluation needs no teacher.
      done: where the run resumes.

    Raises:
      UsageError: what is wrong, and what to do.
    """
    local = parallel.local_batch_size(config.batch_size, what="config.batch_size")
    parallel.local_batch_size(config.eval_batch_size, what="config.eval_batch_size")
    per_device = local // jax.local_device_count()
    if config.accumulate_steps < 1 or per_device % config.accumulate_steps:
        raise UsageError(
            f"config.accumulate_steps is {config.accumulate_steps}, but each device "
            f"has {per_device} examples a step: choose a divisor of that."
        )
    data = open_dataset(DataConfig.of(config.data))
    return Run(
        data=data,
        training=resolve(config, data.info, guided=guided, done=done),
        batch_size=config.batch_size,
        eval_batch_size=config.eval_batch_size,
        draws=config.pictures,
    )


def _train(
    run: Run,
    done: Progress,
    state: TrainState,
    update: Callable,
    checkpoints: Checkpoints,
    reporter: Reporter,
    profile: Callable[[int], Any] | None,
) -> tuple[TrainState, dict[str, float]]:
    """Runs all remaining steps; returns the final state and its evaluation."""
    durations = run.training.durations
    num_train = run.data.info.num_examples["train"]
    best_split = next(iter(run.data.config.eval))
    window = _Window(run.batch_size)
    evaluation: dict[str, float] = {}
    if done.step >= durations.total:
        _LOG.info("All %d steps are done already.", durations.total)
        return state, run.evaluate(state.eval_params)
    batches = run.train_batches(done.examples)
    for step in range(done.step + 1, durations.total + 1):
        state, metrics = update(state, next(batches))
        examples = done.examples + (step - done.step) * run.batch_size
        window.add(step, metrics)
        if profile is not None:
            profile(step)
        reporter.advance(step)
        last = step == durations.total
        evaluates = last or step % durations.eval == 0
        saves = evaluates or step % durations.checkpoint == 0
        if last or step % durations.log == 0:
            scalars = window.close()
            rate = run.training.learning_rate(step - 1)
            scalars["train/learning_rate"] = float(rate)
            scalars["train/epoch"] = examples / num_train
            reporter.write(step, scalars)
        if saves:
            with window.pause():
                if evaluates:
                    evaluation = run.evaluate(state.eval_params)
                    reporter.write(step, evaluation)
                    if run.draws:
                        draw = functools.partial(run.pictures, state.eval_params)
                        reporter.draw(step, draw)
                top1 = evaluation[f"{best_split}/top1"] if evaluates else None
                meta = {**run.training.meta, _EXAMPLES_SEEN: examples}
                checkpoints.save(state, meta, top1)
    return state, evaluation


def _profiler(workdir: Path) -> Callable[[int], Any]:
    """Returns what to call after each step, to trace some of them."""
    from clu import periodic_actions

    return periodic_actions.Profile(
        logdir=str(workdir),
        num_profile_steps=5,
        profile_duration_ms=None,
        first_profile=10,
    )


class _Window:
    """The training metrics and the time since the last report."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._metrics: dict[int, steps.Metrics] = {}
        self._start = time.perf_counter()

    def add(self, step: int, metrics: steps.Metrics) -> None:
        """Takes a step's metrics, which may still be on their way."""
        self._metrics[step] = metrics
        awaited = self._metrics.get(step - _STEPS_AHEAD)
        if awaited is not None:
            jax.block_until_ready(awaited)

    def close(self) -> dict[str, float]:
        """Returns the means and the speed, and starts the next window.

        Raises:
          NonFiniteLossError: a loss, a gradient or an update was not finite.
        """
        rows = self._fetch()
        totals = {k: float(np.sum([r[k] for r in rows])) for k in rows[0]}
        means = {f"train/{k}": v / len(rows) for k, v in totals.items()}
        if "skipped" in totals:  # A count, and no mean.
            means["train/skipped"] = totals["skipped"]
        seconds = time.perf_counter() - self._start
        means["train/images_per_second"] = len(rows) * self._batch_size / seconds
        self._metrics = {}
        self._start = time.perf_counter()
        return means

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens inside out of the speed; checks the steps before it.

        Raises:
          NonFiniteLossError: a loss, a gradient or an update was not finite.
        """
        self._fetch()
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def _fetch(self) -> list[dict[str, np.ndarray]]:
        """Waits for the metrics of all steps; raises if one is not finite."""
        rows = jax.device_get(self._metrics)
        for step, row in rows.items():
            norms = row["gradient_norm"], row["update_norm"]
            if not math.isfinite(row["loss"] + sum(norms)):
                raise NonFiniteLossError(
                    f"At step {step} the loss is {row['loss']}, the norm of the "
                    f"gradient {norms[0]} and of the update {norms[1]}. The last "
                    "checkpoint is from before. Lower config.optimizer.learning_rate "
                    "or clip_norm, lengthen the warm-up, or check the data; then run "
                    "again to resume."
                )
        return list(rows.values())
