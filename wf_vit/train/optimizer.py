"""Durations in steps, the learning rate over them, and the optimizer."""

import dataclasses
from collections.abc import Sequence

import jax
import ml_collections
import optax
from jaxtyping import PyTree

from wf_vit.errors import UsageError
from wf_vit.models.attention import FIELD
from wf_vit.shapes import Params
from wf_vit.train.config import UNITS

_BLOCK = "blocks_"
# Top-level parameters of a model that come before its blocks.
_EMBEDDING = ("patches", "prefix", "position_table")
# The gradient of a field that covers the grid is some 1e-5 of that of a narrow one,
# and clipping divides it by the norm of all others.
_WIDE_FIELDS_GAIN = 1e6


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


def durations(config: ml_collections.ConfigDict, num_train: int) -> Durations:
    """Resolves every duration of a config, overrides included, into steps.

    Args:
      config: the experiment's config (``wf_vit.train.config``).
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
        guidance=resolve("guidance", total),
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
    """Returns AdamW (arXiv 1711.05101) behind a clipping of the global norm.

    With ``layer_decay`` and ``fields_rate``, each parameter has its own rate
    (``relative_rate``). Where fields start wide (``fields.extents`` of 0), their gradient
    is so small that Adam's epsilon would hide it; it is made larger, which Adam does
    not notice otherwise.

    Raises:
      UsageError: the layer decay or the fields' rate is out of range.
    """
    options = config.optimizer
    if not 0 < options.layer_decay <= 1:
        raise UsageError(
            f"config.optimizer.layer_decay is {options.layer_decay}: expected more "
            "than 0 and at most 1, which gives all layers the same rate."
        )
    if options.fields_rate < 0:
        raise UsageError(
            f"config.optimizer.fields_rate is {options.fields_rate}: expected 0, which "
            "keeps the fields as they start, or more; 1 is the rate of the head."
        )
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=options.b1,
        b2=options.b2,
        weight_decay=options.weight_decay,
        mask=decay_mask,
    )
    parts = [adamw]
    if 0 in config.model.fields.extents:
        parts.insert(0, _amplify_fields(_WIDE_FIELDS_GAIN))
    if options.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(options.clip_norm))
    if options.layer_decay < 1 or options.fields_rate != 1:
        parts.append(_scale_updates(options.layer_decay, options.fields_rate))
    return optax.chain(*parts) if len(parts) > 1 else adamw


def _amplify_fields(gain: float) -> optax.GradientTransformation:
    """Returns what multiplies the gradient of every field."""

    def amplify(gradients: Params, params: Params | None) -> Params:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, gradient: (
                gain * gradient if FIELD in [key.key for key in path] else gradient
            ),
            gradients,
        )

    return optax.stateless(amplify)


def _scale_updates(decay: float, fields: float) -> optax.GradientTransformation:
    """Returns what multiplies every update by its ``relative_rate``."""

    def scale(updates: Params, params: Params | None) -> Params:
        del params
        depth = sum(name.startswith(_BLOCK) for name in updates)
        return jax.tree_util.tree_map_with_path(
            lambda path, update: (
                update
                * relative_rate(
                    [key.key for key in path], depth=depth, decay=decay, fields=fields
                )
            ),
            updates,
        )

    return optax.stateless(scale)


def relative_rate(
    path: Sequence[str], *, depth: int, decay: float, fields: float
) -> float:
    """Returns a parameter's learning rate, as a share of that of the head.

    As in BEiT (arXiv 2106.08254): ``decay ** (L - l)`` for block l, counted from 0,
    ``decay ** (L + 1)`` for the embedding, and 1 for what follows the blocks. Fields
    have a rate of their own, wherever they are: when a ViT becomes a window-free
    transformer they are as new as the head.

    Args:
      path: the names that lead to the parameter.
      depth: L.
      decay: from one layer to the one below it.
      fields: of the fields of all layers.
    """
    if FIELD in path:
        return fields
    if path[0] in _EMBEDDING:
        return decay ** (depth + 1)
    if path[0].startswith(_BLOCK):
        return decay ** (depth - int(path[0].removeprefix(_BLOCK)))
    return 1.0


def decay_mask(params: Params) -> PyTree[bool]:
    """Returns True for every kernel: biases, norms, scales and tokens do not decay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
