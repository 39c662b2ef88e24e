"""The settings of a training run, their defaults, and what they are resolved to."""

import dataclasses
import logging
from typing import Any

import ml_collections
import numpy as np
import optax
from ml_collections import config_dict

from wf_vit import settings
from wf_vit.data import config as data_config
from wf_vit.data.config import Augmentation, DataConfig, DataInfo
from wf_vit.errors import UsageError
from wf_vit.models import pretrained, registry
from wf_vit.models.registry import ModelConfig
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import FieldViT
from wf_vit.settings import LARGEST_COUNT
from wf_vit.shapes import Params
from wf_vit.train.guidance import Guidance
from wf_vit.train.keys import KEYS
from wf_vit.train.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
)
from wf_vit.train.state import TrainState, init_state
from wf_vit.train.steps import Objective
from wf_vit.train.teacher import load_teacher

_LOG = logging.getLogger(__name__)

UNITS = ("steps", "epochs", "percent")

# The durations that are not counted from the run's start.
_INTERVALS = ("log", "eval", "checkpoint")


def default_config(model: str, variant: str) -> ml_collections.ConfigDict:
    """Returns a whole experiment's config; every key can be overridden.

    ``wf_vit.train.keys`` says what they mean, and ``--help`` with a config.

    A duration ``name`` has three keys, ``name_steps``, ``name_epochs`` and
    ``name_percent`` (of the whole run). The finest that is set counts, so that an
    override of ``warmup_steps`` wins over a config's ``warmup_epochs``. They are
    resolved when the run starts (``durations``).
    """
    config = settings.config_of(KEYS)
    config.data = data_config.default_config()
    config.model = registry.default_config(model, variant)
    return config


def set_duration(
    config: ml_collections.ConfigDict,
    name: str,
    *,
    steps: int | None = None,
    epochs: float | int | None = None,
    percent: float | int | None = None,
) -> None:
    """Declares the three keys of a duration and sets those that are given."""
    for unit, value in zip(UNITS, (steps, epochs, percent), strict=True):
        kind = int if unit == "steps" else float
        config[f"{name}_{unit}"] = config_dict.placeholder(kind)
        if value is not None:
            config[f"{name}_{unit}"] = kind(value)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come, which may have changed its batch size on the way.

    Attributes:
      step: updates done.
      examples: training examples that they took, over all processes.
      updates_skipped: of the updates, those that were not finite.
      evaluation_pending: whether the evaluation that was due at this step was stopped.
      window: the metrics of each step since the last report.
    """

    step: int = 0
    examples: int = 0
    updates_skipped: int = 0
    evaluation_pending: bool = False
    window: tuple[dict[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Durations:
    """The durations of a run, in steps."""

    total: int
    warmup: int
    guidance: int
    log: int
    eval: int
    checkpoint: int
    steps_per_epoch: float


@dataclasses.dataclass(frozen=True)
class Training:
    """A config made concrete: what the rooms of training take in its place.

    Attributes:
      model: the module.
      params: its parameters before the first step.
      durations: in steps.
      learning_rate: of the head, by the number of updates done.
      optimizer: of the parameters.
      objective: what a step works towards.
      teacher_params: of the teacher, or None.
      info: of the data.
    """

    model: ViT
    params: Params
    durations: Durations
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation
    objective: Objective
    teacher_params: Params | None
    info: DataInfo

    def start(self) -> TrainState:
        """Returns the state before the first step."""
        ema = self.objective.ema_decay > 0
        return init_state(self.params, self.optimizer, ema=ema)

    @property
    def meta(self) -> dict[str, Any]:
        """What rebuilds the model and its input, for the checkpoint."""
        augmentation = self.objective.augmentation
        return {
            "model": registry.to_json(self.model),
            "class_names": list(self.info.class_names),
            "mean": list(augmentation.mean),
            "std": list(augmentation.std),
        }


def resolve(
    config: ml_collections.ConfigDict,
    info: DataInfo,
    *,
    guided: bool = True,
    done: Progress = Progress(),
) -> Training:
    """Resolves a config, overrides included, checking its parts together.

    Args:
      config: the experiment's.
      info: of the data that it is trained on.
      guided: whether to open what guides; an evaluation needs no teacher.
      done: where the run resumes.

    Raises:
      UsageError: what is wrong, and what to do.
    """
    settings.check(KEYS, config)
    data = DataConfig.of(config.data)
    steps = durations(config, info.num_examples["train"], done)
    model, params = _model_and_params(
        ModelConfig.of(config.model),
        init_from=config.init_from,
        seed=config.seed,
        num_classes=info.num_classes,
        image_size=info.image_size,
        augment=data.augment,
    )
    guidance, teacher_params = None, None
    if guided:
        guidance, teacher_params = _guidance(
            config.guidance, student=model, duration=steps.guidance
        )
    options = OptimizerConfig(**config.optimizer.to_dict())
    learning_rate = learning_rate_schedule(
        options.learning_rate, warmup_steps=steps.warmup, total_steps=steps.total
    )
    return Training(
        model=model,
        params=params,
        durations=steps,
        learning_rate=learning_rate,
        optimizer=make_optimizer(
            options,
            learning_rate,
            depth=model.depth,
            wide_fields=0 in config.model.fields.extents,
        ),
        objective=Objective(
            seed=config.seed,
            augmentation=data.augment,
            label_smoothing=config.label_smoothing,
            accumulate_steps=config.accumulate_steps,
            ema_decay=config.ema_decay,
            guidance=guidance,
        ),
        teacher_params=teacher_params,
        info=info,
    )


def _model_and_params(
    config: ModelConfig,
    *,
    init_from: str,
    seed: int,
    num_classes: int,
    image_size: tuple[int, int],
    augment: Augmentation,
) -> tuple[ViT, Params]:
    """Returns the model and its parameters before the first step.

    Args:
      config: the model, and how to train it.
      init_from: a checkpoint, whose architecture the model then has, at the data's
        image size and classes; ``config`` says how to train it (``registry.rebuild``).
        Parameters that it lacks start afresh, and the log names them. "": a fresh
        model.
      seed: of fresh parameters.
      num_classes: C.
      image_size: ``(height, width)`` in pixels.
      augment: with the normalisation; a warning says where the checkpoint's is another.

    Raises:
      UsageError: the config contradicts itself, or the checkpoint cannot be opened.
    """
    if not init_from:
        model = registry.create_model(
            config, num_classes=num_classes, image_size=image_size
        )
        return model, registry.init_params(model, seed)
    loaded = pretrained.load(init_from, image_size=image_size, num_classes=num_classes)
    form = loaded.preprocess.image_format
    theirs, ours = (form.mean, form.std), (augment.mean, augment.std)
    if not np.allclose(theirs, ours):
        _LOG.warning(
            "%s was trained on images of mean %s and std %s, but config.data.augment "
            "has %s and %s, so that it sees other images. To change that: "
            '--config.data.augment.mean="%s" --config.data.augment.std="%s".',
            init_from,
            *(*theirs, *ours, *theirs),
        )
    model = registry.rebuild(loaded.model, config)
    _LOG.info("From %s: %s", init_from, registry.to_json(model))
    fresh = registry.init_params(model, seed)
    return model, registry.adopt_fields(fresh, loaded.params, source=init_from)


def durations(
    config: ml_collections.ConfigDict, num_train: int, done: Progress = Progress()
) -> Durations:
    """Resolves every duration of a config into steps.

    Epochs are counted in examples. So if a run resumes with another batch size, what
    ends after so many epochs of the run (all of it, the warm-up, the guidance) ends at
    the step at which these examples have been seen.

    Args:
      config: the experiment's.
      num_train: number of training examples, over all processes.
      done: where the run resumes.

    Raises:
      UsageError: a duration is set in no unit, the run is too long to be counted, or
        the warm-up is longer than the run.
    """
    steps_per_epoch = num_train / config.batch_size
    # Steps done beyond those that the examples would have taken at this batch size.
    ahead = done.step - done.examples / config.batch_size

    def resolved(name: str, total: int | None = None) -> int:
        units = UNITS if total is not None else UNITS[:2]
        for unit in units:
            value = config[f"{name}_{unit}"]
            if value is not None:
                scale = {"steps": 1, "epochs": steps_per_epoch}.get(unit)
                scale = total / 100 if scale is None else scale
                from_start = unit == "epochs" and name not in _INTERVALS
                length = round(value * scale + (ahead if from_start else 0))
                return max(length, 0 if name == "warmup" else 1)
        keys = ", ".join(f"{name}_{unit}" for unit in units)
        raise UsageError(f"The duration {name!r} is not set: set one of {keys}.")

    total = resolved("total")
    if total > LARGEST_COUNT:
        raise UsageError(
            f"The run takes {total:,} steps, expected at most {LARGEST_COUNT:,}: "
            "shorten it (total_steps or total_epochs), or take larger batches."
        )
    warmup = resolved("warmup", total)
    if warmup > total:
        raise UsageError(
            f"The warm-up takes {warmup} steps of a run of {total}: shorten it "
            "(warmup_steps, warmup_epochs or warmup_percent)."
        )
    return Durations(
        total=total,
        warmup=warmup,
        guidance=resolved("guidance", total),
        log=resolved("log", total),
        eval=resolved("eval", total),
        checkpoint=resolved("checkpoint", total),
        steps_per_epoch=steps_per_epoch,
    )


def _guidance(
    config: ml_collections.ConfigDict, *, student: ViT, duration: int
) -> tuple[Guidance | None, Params | None]:
    """Returns what guides the student, and the parameters of the teacher."""
    if not config.weight:
        if config.teacher:
            raise UsageError(
                f"config.guidance.teacher is {config.teacher!r}, but its weight is "
                "0: set config.guidance.weight (1 is a start), or no teacher."
            )
        return None, None
    if config.match == "fields" and not isinstance(student, FieldViT):
        raise UsageError(
            f"config.guidance.weight is {config.weight}, but a "
            f"{type(student).__name__} has no fields to guide: set "
            "config.model.name='windowfree', or "
            "config.guidance.match='attention', or the weight to 0."
        )
    teacher, params = None, None
    if config.teacher:
        teacher, params = load_teacher(
            config.teacher, image_size=config.image_size, dtype=config.dtype
        )
    guidance = Guidance(
        weight=config.weight,
        area_weight=config.area_weight,
        duration=duration,
        indicator=config.indicator,
        num_probes=config.num_probes,
        teacher=teacher,
        match=config.match,
        per_head=config.per_head,
    )
    return guidance, params
