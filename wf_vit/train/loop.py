"""The tasks ``train`` and ``evaluate``: data, devices, steps, checkpoints, reports."""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import UInt8

from wf_vit import stops
from wf_vit.data.config import DataConfig
from wf_vit.data.pipeline import Dataset, open_dataset
from wf_vit.errors import RunError, UsageError
from wf_vit.models.pretrained.stored import Stored
from wf_vit.shapes import Params
from wf_vit.train import parallel, peers, steps
from wf_vit.train.checkpoint import Checkpoints, chosen, restored
from wf_vit.train.config import Progress, Training, resolve
from wf_vit.train.pictures import draw_pictures
from wf_vit.train.reporter import (
    Reporter,
    check_changes,
    read_config,
    save_config,
    save_figures,
)
from wf_vit.train.state import TrainState
from wf_vit.workdir import held

_LOG = logging.getLogger(__name__)

_START = Progress()


class NonFiniteLossError(RunError):
    """Too many losses, gradients or updates were infinite or NaN."""


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
    with _alone(config, workdir), Checkpoints(workdir) as checkpoints:
        saved = checkpoints.newest()
        done = _progress(saved, config, workdir)
        if saved is not None:
            check_changes(config, workdir)
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
        if saved is None:
            checkpoints.check_room(state)
        else:
            state = restored(saved, state)
            del saved  # A copy of the state that the host need not keep.
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
        with reporter, stops.deferred("The run is done, but for its figures."):
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


@contextlib.contextmanager
def _alone(config: ml_collections.ConfigDict, workdir: Path) -> Iterator[None]:
    """Holds the working directory for this run, all of whose processes are watched."""
    seconds = config.distributed.peer_timeout_seconds
    first = jax.process_index() == 0
    lock = held(workdir) if first else contextlib.nullcontext()
    with lock, peers.watched(workdir, seconds=seconds):
        yield


def _progress(
    saved: Stored | None, config: ml_collections.ConfigDict, workdir: Path
) -> Progress:
    """Returns how far the run of the working directory has come."""
    if saved is None:
        return _START
    step, meta = int(saved.arrays["step"]), saved.meta
    examples = meta.get("examples_seen")
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
    return Progress(
        step,
        examples,
        updates_skipped=meta.get("updates_skipped", 0),
        evaluation_pending=meta.get("evaluation_pending", False),
        window=tuple(meta.get("window", ())),
    )


def evaluate(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, float]:
    """Evaluates a checkpoint of the working directory on every split of the config.

    Returns:
      ``<split>/top1`` and ``<split>/loss``.

    Raises:
      UsageError: the config cannot work, or there is no checkpoint.
    """
    run = open_run(config, guided=False)
    saved = chosen(workdir, config.evaluate_checkpoint)
    state = restored(saved, run.training.start())
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
      max_skipped_updates: how many updates of the run may be skipped.
    """

    data: Dataset
    training: Training
    batch_size: int
    eval_batch_size: int
    draws: bool
    max_skipped_updates: int

    def train_batches(self, examples_seen: int) -> Iterator[steps.Batch]:
        """Yields this process's sharded batches, from any example of the run on."""
        batches = self.data.train_batches(
            batch_size=self.batch_size // jax.process_count(),
            seed=self.training.objective.seed,
            start=examples_seen // jax.process_count(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return map(parallel.shard, batches)

    def evaluate(
        self, params: Params, stopping: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Returns ``<split>/top1`` and ``<split>/loss``, every example counted once.

        Args:
          params: of the model, spread over the devices.
          stopping: asked after every batch; the result is empty once it says yes.
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
                if stopping():
                    return {}
            for name in ("top1", "loss"):
                metrics[f"{split}/{name}"] = totals[name] / totals["count"]
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
        max_skipped_updates=config.max_skipped_updates,
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
    """Runs all remaining steps; returns the final state and its evaluation.

    A stop is looked for at every step and at every batch of an evaluation. What the
    interrupted step still owed, its evaluation and its report, is kept in the
    checkpoint, so that the run that goes on is the same to the bit.

    Raises:
      Stopped: a stop was asked for; the step is saved.
    """
    durations = run.training.durations
    num_train = run.data.info.num_examples["train"]
    best_split = next(iter(run.data.config.eval))
    window = _Window(run, done)
    evaluation: dict[str, float] = {}
    agreement = parallel.Agreement()

    def stopping() -> bool:
        return agreement.asks(bool(stops.asked()))

    def evaluate_and_save(step: int, *, evaluates: bool, stop: bool, again=False):
        """Returns the evaluation, and whether to stop."""
        evaluation = {}
        if evaluates and not stop:
            evaluation = run.evaluate(state.eval_params, stopping)
            stop = not evaluation
        if evaluation:
            reporter.write(step, evaluation)
            if run.draws:
                reporter.draw(step, lambda: run.pictures(state.eval_params))
        meta = {
            **run.training.meta,
            "examples_seen": done.examples + (step - done.step) * run.batch_size,
            "updates_skipped": window.updates_skipped,
            "evaluation_pending": evaluates and not evaluation,
            "window": window.rows(),
        }
        top1 = evaluation.get(f"{best_split}/top1")
        checkpoints.save(state, meta, top1, again=again)
        return evaluation, stop

    stop = False
    if done.evaluation_pending:
        evaluation, stop = evaluate_and_save(
            done.step, evaluates=True, stop=False, again=True
        )
    elif done.step >= durations.total:
        _LOG.info("All %d steps are done already.", durations.total)
        return state, run.evaluate(state.eval_params, stopping)
    if not stop:
        _LOG.info("Step %d of %d compiles first.", done.step + 1, durations.total)
        batches = run.train_batches(done.examples)
    for step in range(done.step + 1, durations.total + 1):
        if stop:
            break
        state, metrics = update(state, next(batches))
        window.add(step, metrics)
        stop = stopping()
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
            examples = done.examples + (step - done.step) * run.batch_size
            scalars["train/epoch"] = examples / num_train
            reporter.write(step, scalars)
        if saves or stop:
            with window.pause():
                evaluation, stop = evaluate_and_save(
                    step, evaluates=evaluates, stop=stop
                )
    if stop:
        raise stops.stopped(f"Saved step {int(state.step)}.")
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
    """The training metrics and the time since the last report.

    Attributes:
      updates_skipped: by the whole run, as they were not finite.
    """

    def __init__(self, run: Run, done: Progress):
        self._batch_size = run.batch_size
        self._limit = run.max_skipped_updates
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
        names = rows[0].keys() - {"updates_skipped"}
        means = {
            f"train/{name}": float(np.mean([row[name] for row in finite]))
            for name in sorted(names)
        }
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
