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
from clu import periodic_actions

from wf_vit.data import pipeline
from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params
from wf_vit.workdir import prepare_workdir
from wf_vit.train import initial, parallel, report, schedule, steps, teacher
from wf_vit.train.checkpoint import Checkpoints
from wf_vit.train.reporter import Reporter
from wf_vit.train.state import TrainState, init_state

_LOG = logging.getLogger(__name__)

# Steps that may be dispatched before the device has finished the first of them: it
# hides the host's work, and bounds the batches that wait in the device's memory.
_STEPS_AHEAD = 2


class NonFiniteLossError(RuntimeError):
    """The loss, the gradient or the update became infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config made concrete: all that a task needs, nothing that changes.

    ``params`` are those before the first step.
    """

    config: ml_collections.ConfigDict
    info: pipeline.DataInfo
    model: ViT
    params: Params
    durations: schedule.Durations
    evaluate: Callable[[Params, steps.Batch], steps.Metrics]

    @property
    def meta(self) -> dict[str, Any]:
        """What rebuilds the model and its input, for the checkpoint."""
        augment = self.config.data.augment
        return {
            "model": registry.to_json(self.model),
            "class_names": list(self.info.class_names),
            "mean": list(augment.mean),
            "std": list(augment.std),
        }


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
    experiment = build(config)
    durations = experiment.durations
    optimizer = schedule.make_optimizer(config, durations)
    guidance, teacher_params = teacher.guidance_and_teacher(
        config, duration=durations.guidance
    )
    state = init_state(experiment.params, optimizer, ema=config.ema_decay > 0)
    update = parallel.map_update(
        functools.partial(
            steps.train_step,
            model=experiment.model,
            optimizer=optimizer,
            recipe=steps.make_recipe(config, guidance),
            axis=parallel.AXIS,
        ),
        teacher_params,
    )
    with Checkpoints(workdir) as checkpoints:
        if checkpoints.last_step is not None:
            state = checkpoints.restore(state)
            _LOG.info("Resuming after step %d.", checkpoints.last_step)
        report.save_config(config, workdir)
        reporter = Reporter(
            workdir,
            step=int(state.step),
            total=durations.total,
            batch_size=config.batch_size,
            active=jax.process_index() == 0,
        )
        with reporter:
            state, metrics = _run(
                experiment,
                parallel.to_host(state),
                update,
                checkpoints,
                reporter,
                workdir,
            )
    report.save_figures(experiment.config, workdir, experiment.model, state.eval_params)
    return metrics


def evaluate(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, float]:
    """Evaluates a checkpoint of the working directory on every split of the config.

    Returns:
      ``<split>/top1`` and ``<split>/loss``.

    Raises:
      UsageError: the config cannot work, or there is no checkpoint.
    """
    experiment = build(config)
    optimizer = schedule.make_optimizer(config, experiment.durations)
    template = init_state(experiment.params, optimizer, ema=config.ema_decay > 0)
    with Checkpoints(workdir) as checkpoints:
        state = checkpoints.restore(template, which=config.evaluate_checkpoint)
    metrics = evaluate_splits(experiment, parallel.spread(state.eval_params))
    print(json.dumps({"step": int(state.step), **metrics}))
    return metrics


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Resolves a config into data, model and durations, checking them together.

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
    info = pipeline.describe(config.data)
    durations = schedule.durations(config, info.num_examples["train"])
    model, params = initial.model_and_params(config, info)
    step = functools.partial(
        steps.eval_step,
        model=model,
        augmentation=ml_collections.FrozenConfigDict(config.data.augment),
        axis=parallel.AXIS,
    )
    return Experiment(
        config=config,
        info=info,
        model=model,
        params=params,
        durations=durations,
        evaluate=parallel.map_reduce(step),
    )


def train_batches(
    config: ml_collections.ConfigDict, start_step: int
) -> Iterator[steps.Batch]:
    """Yields this process's sharded batches, from any step of the run on."""
    batches = pipeline.train_batches(
        config.data,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return map(parallel.shard, batches)


def evaluate_splits(experiment: Experiment, params: Params) -> dict[str, float]:
    """Returns ``<split>/top1`` and ``<split>/loss``, every example counted once."""
    config = experiment.config
    metrics = {}
    for split in config.data.eval:
        batches = pipeline.eval_batches(
            config.data,
            split,
            batch_size=config.eval_batch_size // jax.process_count(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        # The device adds up in float32 within a batch, the host in float64 over all.
        totals = collections.Counter()
        for batch in batches:
            sums = experiment.evaluate(params, parallel.shard(batch))
            totals.update({k: float(v) for k, v in sums.items()})
        for name in ("top1", "loss"):
            metrics[f"{split}/{name}"] = totals[name] / totals["count"]
    return metrics


def _run(
    experiment: Experiment,
    state: TrainState,
    update: Callable,
    checkpoints: Checkpoints,
    reporter: Reporter,
    workdir: Path,
) -> tuple[TrainState, dict[str, float]]:
    """Runs all remaining steps; returns the final state and its evaluation."""
    config, durations = experiment.config, experiment.durations
    rate = schedule.learning_rate(config, durations)
    first = int(state.step)
    best_split = next(iter(config.data.eval))
    window = _Window(config.batch_size)
    evaluation: dict[str, float] = {}
    profile = _profiler(config, workdir)
    if first >= durations.total:
        _LOG.info("All %d steps are done already.", durations.total)
        return state, evaluate_splits(experiment, state.eval_params)
    batches = train_batches(config, first)
    for step in range(first + 1, durations.total + 1):
        state, metrics = update(state, next(batches))
        window.add(step, metrics)
        profile(step)
        reporter.advance(step)
        last = step == durations.total
        evaluates = last or step % durations.eval == 0
        saves = evaluates or step % durations.checkpoint == 0
        if last or step % durations.log == 0:
            scalars = window.close()
            scalars["train/learning_rate"] = float(rate(step - 1))
            scalars["train/epoch"] = step / durations.steps_per_epoch
            reporter.write(step, scalars)
        if saves:
            with window.pause():
                if evaluates:
                    evaluation = evaluate_splits(experiment, state.eval_params)
                    reporter.write(step, evaluation)
                top1 = evaluation[f"{best_split}/top1"] if evaluates else None
                checkpoints.save(state, experiment.meta, top1)
    return state, evaluation


def _profiler(config: ml_collections.ConfigDict, workdir: Path) -> Callable[[int], Any]:
    """Returns what to call after each step."""
    if not config.profile:
        return lambda step: None
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
        means = {f"train/{k}": float(np.mean([r[k] for r in rows])) for k in rows[0]}
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
