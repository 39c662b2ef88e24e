"""Checkpoints of a run, through Orbax: asynchronous, checked, the best one kept.

The two newest are kept, so that a damaged one has another to fall back to.
"""

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from wf_vit.errors import RunError, UsageError
from wf_vit.models.pretrained import stored
from wf_vit.models.pretrained.runs import DIRECTORY
from wf_vit.models.pretrained.stored import DamagedError, Stored
from wf_vit.train.state import TrainState

_LOG = logging.getLogger(__name__)

METRIC = "top1"

# Where a damaged checkpoint is moved to, beside the folder of the checkpoints.
DAMAGED = "damaged_checkpoints"
# Likewise one whose step is being saved again: until that is whole, it is the newest.
_REPLACED = "replaced_checkpoints"

# Kept are the two newest and the best, and the next is written before one is removed.
_MOST = 4

_NEWEST = 2
# Bytes that are written for an array beside its content, at most about.
_OVERHEAD = 2048
_GIB = 2**30


class Checkpoints:
    """The checkpoints of a working directory; closes itself as a context manager.

    Each holds the whole ``TrainState`` and a JSON tree with what it takes to
    rebuild the model (``meta``), to which the digest of every array is added.
    """

    def __init__(self, workdir: Path):
        """Opens ``workdir/checkpoints``, creating it if need be."""
        self._directory = (workdir / DIRECTORY).absolute()
        self._damaged = (workdir / DAMAGED).absolute()
        self._replaced = (workdir / _REPLACED).absolute()
        self._put_back_replaced()
        self._set_aside_without_metrics()
        policies = checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(_NEWEST),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[METRIC],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            best_fn=lambda metrics: metrics[METRIC],
            best_mode="max",
            # It runs in the background; a new run has nothing to clean up.
            cleanup_tmp_directories=self._directory.exists(),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with self._full_disk_explained():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def newest(self) -> Stored | None:
        """Reads the newest checkpoint that is whole; None if there is none at all.

        Damaged ones are set aside, and the log says which and why.

        Raises:
          UsageError: all of them are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return _read(self._directory / str(step))
            except DamagedError as error:
                self._set_aside(step, error)
        if not steps:
            return None
        raise UsageError(
            f"Every checkpoint of {self._directory} is damaged ({steps}): they are "
            f"now in {self._damaged}. Run again to train from the start, or put back "
            "a copy of one."
        )

    def save(
        self,
        state: TrainState,
        meta: dict[str, Any],
        top1: float | None,
        *,
        again: bool = False,
    ) -> None:
        """Saves a state; returns as soon as it has been copied off the devices.

        Args:
          state: the state; its step names the checkpoint.
          meta: JSON-serialisable.
          top1: what the best checkpoint is chosen by, if it was measured.
          again: replaces a checkpoint of this step, which is kept until then.

        Raises:
          RunError: the disk is full.
        """
        state = jax.device_get(state)
        step = int(state.step)
        with self._full_disk_explained():
            replaces = step in self._manager.all_steps()
            if replaces and not again:
                return
            self.check_room(state)
            if replaces:
                self._put_aside(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=ocp.args.JsonSave(stored.sealed(meta, state)),
                ),
                metrics=None if top1 is None else {METRIC: float(top1)},
            )
            if replaces:
                self._manager.wait_until_finished()
                self._drop_replaced()

    def check_room(self, state: TrainState) -> None:
        """Checks that there is room for a checkpoint; the log says if it gets scarce.

        Args:
          state: what it would hold, or its shapes.

        Raises:
          RunError: there is none.
        """
        needed = self._needed(state)
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise RunError(
                f"The disk is full: a checkpoint needs {needed / _GIB:.3f} GiB, and "
                f"{self._directory} has {free / _GIB:.3f} GiB free. {self._kept()} "
                "Make room and run again to continue, or move the run to another "
                "--workdir."
            )
        rest = _MOST - len(self._manager.all_steps())
        if free < rest * needed:
            _LOG.warning(
                "%s has %.3f GiB free; the checkpoints will need up to %.3f GiB more.",
                self._directory,
                free / _GIB,
                rest * needed / _GIB,
            )

    @contextlib.contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        """Turns what Orbax raises on a full disk, at once or later, into a message."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if not is_disk_full(error):
                raise
            free = shutil.disk_usage(self._directory).free
            raise RunError(
                f"The disk became full while a checkpoint was written; "
                f"{self._directory} has {free / _GIB:.3f} GiB free. {self._kept()} "
                "Make room and run again to continue."
            ) from error

    def _needed(self, state: TrainState) -> int:
        """Returns the bytes of a checkpoint: those of the newest, if there is one."""
        leaves = jax.tree.leaves(state)
        content = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        folders = stored.step_folders(self._directory)
        files = folders[-1].rglob("*") if folders else ()
        on_disk = sum(file.stat().st_blocks * 512 for file in files)
        return max(content + _OVERHEAD * len(leaves), on_disk)

    def _kept(self) -> str:
        folders = stored.step_folders(self._directory)
        return f"Step {folders[-1].name} is kept." if folders else "None is kept yet."

    def _put_aside(self, step: int) -> None:
        """Moves a step out of the way of the one that replaces it."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            self._replaced.mkdir(exist_ok=True)
            (self._directory / str(step)).rename(self._replaced / str(step))
        _together("put aside")
        self._manager.reload()

    def _drop_replaced(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._replaced)
        _together("replaced")

    def _put_back_replaced(self) -> None:
        """Puts a step back that was put aside for one that was never whole."""
        if jax.process_index() == 0 and self._replaced.exists():
            for folder in stored.step_folders(self._replaced):
                if not (self._directory / folder.name).exists():
                    folder.rename(self._directory / folder.name)
            shutil.rmtree(self._replaced)
        _together("put back")

    def _set_aside_without_metrics(self) -> None:
        """Sets steps aside whose metrics would stop the manager."""
        for folder in stored.step_folders(self._directory):
            try:
                stored.read_metrics(folder)
            except DamagedError as error:
                _move(folder, self._damaged, error)
        _together("metrics")

    def _set_aside(self, step: int, error: DamagedError) -> None:
        _move(self._directory / str(step), self._damaged, error)
        _together("damaged")
        self._manager.reload()


def chosen(workdir: Path, which: str) -> Stored:
    """Reads a checkpoint of a run, which may go on meanwhile.

    Args:
      workdir: of the run.
      which: "last" or "best".

    Raises:
      UsageError: there is none, or it is damaged.
    """
    if which not in ("last", "best"):
        raise UsageError(f"The checkpoint is {which!r}: choose 'last' or 'best'.")
    directory = (workdir / DIRECTORY).absolute()
    folders = stored.step_folders(directory)
    try:
        if which == "best":
            measured = [(stored.read_metrics(f), int(f.name), f) for f in folders]
            ranked = [(m[METRIC], step, f) for m, step, f in measured if METRIC in m]
            folders = [folder for *_, folder in sorted(ranked)]
        if not folders:
            raise UsageError(
                f"There is no {which} checkpoint in {directory}: train first, or point "
                "--workdir at a run that has one."
            )
        return _read(folders[-1])
    except DamagedError as error:
        raise UsageError(
            f"The {which} checkpoint in {directory} is damaged: {error}. Choose "
            "another with config.evaluate_checkpoint; training goes on from the newest "
            "that is whole."
        ) from error


def restored(saved: Stored, template: TrainState) -> TrainState:
    """Returns the state that a checkpoint holds.

    Args:
      saved: the checkpoint.
      template: a state of the same structure, or its shapes.

    Raises:
      UsageError: it was made by another model or optimizer.
    """
    wanted = stored.by_path(template)
    differences = [
        f"{path} is {_form(saved.arrays.get(path))} and should be {_form(array)}"
        for path, array in sorted((dict.fromkeys(saved.arrays) | wanted).items())
        if _form(saved.arrays.get(path)) != _form(array)
    ]
    if differences:
        more = len(differences) - 3
        raise UsageError(
            f"The checkpoint does not fit the config: its model "
            "or optimizer is another. Use the config of that run, or a new "
            f"--workdir. {'; '.join(differences[:3])}"
            + (f"; and {more} more." if more > 0 else ".")
        )
    leaves = [jnp.asarray(saved.arrays[path]) for path in wanted]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def is_disk_full(error: BaseException) -> bool:
    """Says whether an error, of Python or of a library, is that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    texts = ("No space left on device", "Disk quota exceeded")
    return any(text in str(error) for text in texts)


def _read(folder: Path) -> Stored:
    """Reads a step; raises UsageError if it may not be read."""
    try:
        return stored.read_step(folder)
    except PermissionError as error:
        raise UsageError(
            f"Checkpoint {folder} may not be read: {error}. Change its permissions, or "
            "run as its owner."
        ) from error


def _move(folder: Path, target: Path, error: DamagedError) -> None:
    """Moves a damaged checkpoint, once for all processes, and says so."""
    if jax.process_index() != 0:
        return
    target.mkdir(exist_ok=True)
    free = next(
        path
        for path in (target / f"{folder.name}{tail}" for tail in _tails())
        if not path.exists()
    )
    folder.rename(free)
    _LOG.warning(
        "Checkpoint %s is damaged (%s): it is set aside as %s.", folder, error, free
    )


def _tails() -> Iterator[str]:
    yield ""
    number = 2
    while True:
        yield f"_{number}"
        number += 1


def _together(what: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _form(array: Any) -> str:
    """Returns shape and dtype as text."""
    if array is None:
        return "missing"
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
