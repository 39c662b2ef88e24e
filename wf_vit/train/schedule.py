"""Durations in steps, the learning rate over them, and the optimizer."""

import dataclasses

import jax
import ml_collections
import optax
from jaxtyping import PyTree

from wf_vit.errors import UsageError
from wf_vit.shapes import Params
from wf_vit.train.recipe import UNITS


@dataclasses.dataclass(frozen=True)
class Durations:
    """The durations of a run, in steps."""

    total: int
    warmup: int
    log: int
    eval: int
    checkpoint: int
    steps_per_epoch: float


def durations(config: ml_collections.ConfigDict, num_train: int) -> Durations:
    """Resolves every duration of a config, overrides included, into steps.

    Args:
      config: the experiment's config (``wf_vit.train.recipe``).
      num_train: number of training examples, over all processes.

    Raises:
      UsageError: a duration is set in no unit, is not positive, or the warm-up is
        longer than the run.
    """
    steps_per_epoch = num_train / config.batch_size

    def resolve(name: str, total: int | None = None) -> int:
        units = UNITS if total is not None else UNITS[:2]
        for unit in units:
            value = config[f"{name}_{unit}"]
            if value is not None:
                scale = {"steps": 1, "epochs": steps_per_epoch}.get(unit)
                scale = total / 100 if scale is None else scale
                if value < 0 or (value == 0 and name != "warmup"):
                    raise UsageError(
                        f"{name}_{unit} is {value}: expected a positive number."
                    )
                return (
                    round(value * scale)
                    if name == "warmup"
                    else max(round(value * scale), 1)
                )
        keys = ", ".join(f"{name}_{unit}" for unit in units)
        raise UsageError(f"The duration {name!r} is not set: set one of {keys}.")

    total = resolve("total")
    warmup = resolve("warmup", total)
    if warmup > total:
        raise UsageError(
            f"The warm-up takes {warmup} steps of a run of {total}: shorten it "
            "(warmup_steps, warmup_epochs or warmup_percent)."
        )
    return Durations(
        total=total,
        warmup=warmup,
        log=resolve("log", total),
        eval=resolve("eval", total),
        checkpoint=resolve("checkpoint", total),
        steps_per_epoch=steps_per_epoch,
    )


def learning_rate(config: ml_collections.ConfigDict, steps: Durations):
    """Returns the schedule: linear warm-up from 0, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.optimizer.learning_rate,
        warmup_steps=steps.warmup,
        decay_steps=max(steps.total, steps.warmup + 1),
    )


def make_optimizer(
    config: ml_collections.ConfigDict, steps: Durations
) -> optax.GradientTransformation:
    """Returns AdamW (arXiv 1711.05101) behind a clipping of the global norm."""
    options = config.optimizer
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=options.b1,
        b2=options.b2,
        weight_decay=options.weight_decay,
        mask=decay_mask,
    )
    if options.clip_norm:
        return optax.chain(optax.clip_by_global_norm(options.clip_norm), adamw)
    return adamw


def decay_mask(params: Params) -> PyTree[bool]:
    """Returns True for every kernel: biases, norms, scales and tokens do not decay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
