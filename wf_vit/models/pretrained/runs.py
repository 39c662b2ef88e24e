"""Checkpoints of this package's own runs, as ``wf_vit.train`` leaves them."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.pretrained import guards
from wf_vit.models.pretrained.embedding import Parameters
from wf_vit.models.pretrained.hints import read_json
from wf_vit.models.pretrained.infer import Checkpoint
from wf_vit.models.pretrained.positions import TORCH_CUBIC_ANTIALIAS
from wf_vit.models.pretrained.preprocess import ImageFormat
from wf_vit.models.pretrained.readers import weights_in

DIRECTORY = "checkpoints"


def is_run(source: Path) -> bool:
    """Whether a folder is a run's working directory, or one of its checkpoints.

    The name alone does not tell: weights of others lie in folders called checkpoints
    too. A run that has no checkpoint yet counts, unless there are weights beside.
    """
    if not source.is_dir():
        return False
    if source.absolute().parent.name == DIRECTORY:
        return source.name.isdecimal() and not weights_in(source)
    if not (source / DIRECTORY).is_dir():
        return False
    steps = any(folder.name.isdecimal() for folder in (source / DIRECTORY).iterdir())
    return steps or not weights_in(source)


def read_run(source: Path) -> Checkpoint:
    """Reads the parameters that a run would be evaluated with, and nothing else.

    Args:
      source: the working directory, for its last checkpoint; or the folder of one,
        ``<workdir>/checkpoints/<step>``.

    Returns:
      The checkpoint: the moving average of the parameters if the run keeps one.

    Raises:
      UsageError: there is no checkpoint, or no ``config.json``, or they are damaged.
    """
    source = source.absolute()
    advice = "The run is damaged, or not of this package: take another of its steps."
    if (source / DIRECTORY).is_dir():
        with guards.explained(source / DIRECTORY, advice):
            steps = ocp.utils.checkpoint_steps(source / DIRECTORY)
        if not steps:
            raise UsageError(
                f"There is no checkpoint in {source / DIRECTORY} yet: train first."
            )
        source = source / DIRECTORY / str(max(steps))
    config = source.parent.parent / "config.json"
    if not config.exists():
        raise UsageError(
            f"{config} is missing: a run's folder is its config.json and {DIRECTORY}/."
        )
    data = read_json(config).get("data")
    if not isinstance(data, dict) or not isinstance(data.get("augment"), dict):
        raise UsageError(
            f"{config} is not that of a run of this package, though {DIRECTORY}/ is "
            "beside it: give the file of the weights by name."
        )
    with guards.explained(source, advice):
        meta, parameters = _restore(source)
        model = registry.from_json(meta["model"])
        names = guards.class_names(meta.get("class_names", ()))
    with guards.explained(config, advice):
        image_format = ImageFormat(
            mean=tuple(data["augment"]["mean"]),
            std=tuple(data["augment"]["std"]),
            interpolation=data["resize_method"],
            crop=data["eval_resize"],
        )
    return Checkpoint(
        model=model,
        parameters=parameters,
        origin={},
        resampling=TORCH_CUBIC_ANTIALIAS,
        image_format=image_format,
        class_names=names,
    )


def _restore(source: Path) -> tuple[dict[str, Any], Parameters]:
    """Returns the ``meta`` of a checkpoint and its parameters by flat name."""
    size = guards.regular_files(source)
    json_item = ocp.JsonCheckpointHandler()
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), meta=json_item, metrics=json_item
    )
    with ocp.Checkpointer(handler) as checkpointer:
        saved = checkpointer.metadata(source).item_metadata["state"]
        kind = "params" if saved["ema_params"] is None else "ema_params"
        wanted = {kind: saved[kind]}
        leaves = jax.tree.leaves(wanted)
        declared = [math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves]
        guards.check_total(sum(declared), size, source)
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        restored = checkpointer.restore(
            source,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=jax.tree.map(lambda _: as_numpy, wanted),
                    partial_restore=True,
                ),
                meta=ocp.args.JsonRestore(),
            ),
        )
    parameters = traverse_util.flatten_dict(restored["state"][kind], sep="/")
    return restored["meta"], parameters
