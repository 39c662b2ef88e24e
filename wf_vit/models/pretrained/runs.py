"""Checkpoints of this package's own runs, as ``wf_vit.train`` leaves them."""

from pathlib import Path
from typing import Any

from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.pretrained import guards, stored
from wf_vit.models.pretrained.hints import read_json
from wf_vit.models.pretrained.infer import Checkpoint
from wf_vit.models.pretrained.positions import TORCH_CUBIC_ANTIALIAS
from wf_vit.models.pretrained.preprocess import ImageFormat, pillow_name
from wf_vit.models.pretrained.readers import weights_in
from wf_vit.models.pretrained.stored import DamagedError

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
        folders = stored.step_folders(source / DIRECTORY)
        if not folders:
            raise UsageError(
                f"There is no checkpoint in {source / DIRECTORY} yet: train first."
            )
        source = folders[-1]
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
        try:
            saved = stored.read_step(source, lambda tree: [_kind(tree)])
        except DamagedError as error:
            others = ", ".join(f.name for f in stored.step_folders(source.parent))
            raise UsageError(
                f"The checkpoint {source} is damaged: {error}. Give the folder of "
                f"another step of this run ({others}), or a copy."
            ) from error
        model = registry.from_json(saved.meta["model"])
        names = guards.class_names(saved.meta.get("class_names", ()))
    with guards.explained(config, advice):
        image_format = ImageFormat(
            mean=tuple(data["augment"]["mean"]),
            std=tuple(data["augment"]["std"]),
            interpolation=pillow_name(data["resize_method"]),
            crop=data["eval_resize"],
        )
    return Checkpoint(
        model=model,
        parameters={
            path.partition("/")[2]: array for path, array in saved.arrays.items()
        },
        origin={},
        resampling=TORCH_CUBIC_ANTIALIAS,
        image_format=image_format,
        class_names=names,
    )


def _kind(tree: dict[str, Any]) -> str:
    """Returns which parameters a run is evaluated with: their average if it has one."""
    return "params" if tree["ema_params"] is None else "ema_params"
