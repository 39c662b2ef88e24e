"""The tasks ``train`` and ``evaluate``: data, devices, steps, checkpoints, reports."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from wf_vit import stops
from wf_vit.errors import UsageError
from wf_vit.models.pretrained.stored import Stored
from wf_vit.train import parallel, peers, steps
from wf_vit.train.checkpoint import Checkpoints, chosen, restored
from wf_vit.train.config import Progress
from wf_vit.train.reporter import (
    Reporter,
    check_changes,
    read_config,
    save_config,
    save_figures,
)
from wf_vit.train.run import Run, open_run
from wf_vit.train.state import TrainState
from wf_vit.train.window import Window
from wf_vit.workdir import held

_LOG = logging.getLogger(__name__)


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
        if saved is not None and config.on_change == "stop":
            _check_data(saved, run)
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
            evaluation_pending=done.evaluation_pending,
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
        return Progress()
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


def _check_data(saved: Stored, run: Run, only: Sequence[str] = ()) -> None:
    """Compares the data of a checkpoint with that of a run.

    Args:
      saved: the checkpoint.
      run: which is to use it.
      only: what is compared, of the names in ``Run.meta``; nothing given: all.

    Raises:
      UsageError: other classes, another number of training images, or another
        evaluation that chooses the best checkpoint.
    """
    names = {
        "class_names": "classes",
        "train_examples": "training images",
        "best_split": "evaluation that chooses the best checkpoint",
    }
    changed = []
    for key in only or names:
        # A checkpoint of an earlier version does not say all.
        before, now = saved.meta.get(key, run.meta[key]), run.meta[key]
        if key == "class_names" and len(before) == len(now):
            # Of many names, the first that differs.
            pairs = zip(before, now, strict=True)
            before, now = next((p for p in pairs if p[0] != p[1]), (None, None))
        if before != now:
            changed.append(f"{names[key]}: {before} before, {now} now")
    if changed:
        raise UsageError(
            f"The checkpoint is of other data: {'; '.join(changed)}. Use the data of "
            "that run, or a new --workdir; to train on all the same, pass "
            "--config.on_change=continue."
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
    _check_data(saved, run, only=("class_names",))
    state = restored(saved, run.training.start())
    metrics = run.evaluate(parallel.spread(state.eval_params))
    print(json.dumps({"step": int(state.step), **metrics}))
    return metrics


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
    window = Window(
        done,
        batch_size=run.batch_size,
        max_skipped_updates=run.max_skipped_updates,
    )
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
            **run.meta,
            "examples_seen": done.examples + (step - done.step) * run.batch_size,
            "updates_skipped": window.updates_skipped,
            "evaluation_pending": evaluates and not evaluation,
            "window": window.rows(),
        }
        top1 = evaluation.get(f"{run.best_split}/top1")
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
    if not stop and done.step < durations.total:
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
            # An update that is skipped is none that the schedule counts.
            updates = max(step - window.updates_skipped, 1)
            rate = run.training.learning_rate(updates - 1)
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
