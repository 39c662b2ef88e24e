"""Devices and processes: the only module that knows of ``jax.pmap``.

The state stays unreplicated: ``in_axes=None`` spreads it and ``out_axes=None`` hands
one copy back, so that nothing outside this module sees a device axis.
"""

import collections
import os
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from jaxtyping import PyTree

from wf_vit import stops
from wf_vit.errors import UsageError

AXIS = "devices"

# Steps that may be dispatched before the device has finished the first of them: it
# hides the host's work, and bounds the batches that wait in the device's memory.
STEPS_AHEAD = 2

# Set by the launchers of jobs that span hosts, when there is more than one process.
_LAUNCHER_SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def initialize(config: ml_collections.ConfigDict) -> None:
    """Connects the processes of a multi-host run; does nothing for a single one.

    Args:
      config: ``config.distributed``. Without a coordinator address, a TPU pod, Slurm
        and Open MPI are detected.
    """
    options = config.to_dict()
    del options["peer_timeout_seconds"]
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    launched = any(int(os.environ.get(name) or 1) > 1 for name in _LAUNCHER_SIZES)
    if config.coordinator_address is not None:
        jax.distributed.initialize(**options)
    elif pod or launched or "JAX_COORDINATOR_ADDRESS" in os.environ:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UsageError(
                "The environment says that this is one of several processes, but not "
                f"where the others are ({error}): start them with srun or mpirun, set "
                "config.distributed.coordinator_address, or, to run alone, unset "
                f"{', '.join(name for name in _LAUNCHER_SIZES if name in os.environ)}."
            ) from error
    stops.handle_again()  # JAX takes SIGTERM for a service of its own.


class Agreement:
    """Asks all processes a question; if one says yes, all hear yes at the same time."""

    def __init__(self):
        self._answers = collections.deque()
        self._sum = jax.pmap(lambda x: jax.lax.psum(x, AXIS), AXIS, out_axes=None)

    def asks(self, mine: bool) -> bool:
        """Returns whether any process said yes, ``STEPS_AHEAD`` calls ago.

        That is how long an answer may take without a device waiting for it. A process
        alone hears itself at once.
        """
        if jax.process_count() == 1:
            return mine
        votes = np.full(jax.local_device_count(), mine, np.int32)
        self._answers.append(self._sum(votes))
        if len(self._answers) <= STEPS_AHEAD:
            return False
        return bool(self._answers.popleft() > 0)


def local_batch_size(batch_size: int, *, what: str) -> int:
    """Returns this process's share of a batch over all devices.

    Raises:
      UsageError: the devices cannot share the batch evenly.
    """
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        below = batch_size // devices * devices
        multiples = f"{below} or {below + devices}" if below else f"{devices}"
        raise UsageError(
            f"{what} is {batch_size}, which {devices} devices cannot share evenly: "
            f"set it to a multiple of {devices}, such as {multiples}."
        )
    return batch_size // jax.process_count()


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Splits a batch over this process's devices, [b, ...] to [devices, -1, ...]."""
    devices = jax.local_device_count()
    return {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()}


def spread(tree: PyTree) -> PyTree:
    """Hands a tree to all devices, each of which has the whole of it.

    This is how a mapped step returns its state. A state that it is given otherwise
    costs a compilation of its own. And with several processes, jax 0.10 deletes a
    donated array that lies on one device before it has been spread.
    """
    mesh = jax.sharding.Mesh(jax.devices(), AXIS)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(jax.device_get(tree), everywhere)


def map_update(step: Callable, shared: PyTree = None) -> Callable:
    """Maps ``step(state, batch, shared) -> (state, metrics)`` over all devices.

    The state's memory is reused. The step reduces over the axis ``AXIS``, so that
    every device ends with the same state and metrics.

    Args:
      step: the step.
      shared: arrays that are the same at every step, a teacher's parameters say. They
        are handed to the devices once.

    Returns:
      The function of a state, spread over the devices, and a sharded batch.
    """
    mapped = jax.pmap(
        step, AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=(0,)
    )
    shared = spread(shared)
    return lambda state, batch: mapped(state, batch, shared)


def on_one_device(step: Callable) -> Callable:
    """Returns a mapped step for use within a larger program, on a single shard.

    ``step(state, batch, ...)`` reduces over the axis ``AXIS``, which has one place
    here; the rest of what it takes is passed on. The result is traceable: it can be
    jitted, and mapped over other axes.
    """

    def alone(state: PyTree, batch: PyTree, *rest: PyTree) -> PyTree:
        axes = (None, 0, *(None for _ in rest))
        mapped = jax.vmap(step, in_axes=axes, out_axes=None, axis_name=AXIS)
        return mapped(state, jax.tree.map(lambda x: x[None], batch), *rest)

    return alone


def map_reduce(step: Callable) -> Callable:
    """Maps ``step(params, batch) -> sums`` likewise; nothing is overwritten."""
    return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None)
