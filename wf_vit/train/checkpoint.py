"""Checkpoints of a run, through Orbax: asynchronous, the last and the best kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from wf_vit.errors import UsageError
from wf_vit.models.pretrained.runs import DIRECTORY
from wf_vit.train.state import TrainState

METRIC = "top1"


class Checkpoints:
    """The checkpoints of a working directory; closes itself as a context manager.

    Each holds the whole ``TrainState`` and a JSON tree with what it takes to
    rebuild the model (``meta``).
    """

    def __init__(self, workdir: Path):
        """Opens ``workdir/checkpoints``, creating it if need be."""
        self._directory = (workdir / DIRECTORY).absolute()
        policies = checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(1),
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
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def last_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def last_meta(self) -> dict[str, Any]:
        """The ``meta`` of the newest checkpoint; there must be one."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self.last_step, args=args)["meta"]

    def save(self, state: TrainState, meta: dict[str, Any], top1: float | None) -> None:
        """Saves a state; returns as soon as it has been copied off the devices.

        Args:
          state: the state; its step names the checkpoint.
          meta: JSON-serialisable.
          top1: what the best checkpoint is chosen by, if it was measured.
        """
        state = jax.device_get(state)
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
            metrics=None if top1 is None else {METRIC: top1},
        )

    def restore(self, template: TrainState, *, which: str = "last") -> TrainState:
        """Reads a checkpoint.

        Args:
          template: a state of the same structure, or its shapes.
          which: "last" or "best".

        Raises:
          UsageError: there is none, or it was made by another model or optimizer.
        """
        choices = {"last": self._manager.latest_step, "best": self._manager.best_step}
        if which not in choices:
            raise UsageError(f"The checkpoint is {which!r}: choose 'last' or 'best'.")
        step = choices[which]()
        if step is None:
            raise UsageError(
                f"There is no {which} checkpoint in {self._directory}: train first, "
                "or point --workdir at a run that has one."
            )
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            )
        except ValueError as error:
            raise UsageError(
                f"Checkpoint {step} in {self._directory} does not fit the config: its "
                "model or optimizer is another. Use the config of that run, or a new "
                f"--workdir. Orbax says: {error}"
            ) from error
        return restored["state"]
