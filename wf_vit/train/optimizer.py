"""The learning rate over the steps, and AdamW for groups of parameters."""

import dataclasses
from collections.abc import Sequence

import jax
import optax
from jaxtyping import PyTree

from wf_vit import settings
from wf_vit.models.attention import FIELD_NAMES
from wf_vit.settings import setting
from wf_vit.shapes import Params

_BLOCK = "blocks_"
# Top-level parameters of a model that come before its blocks.
_EMBEDDING = ("patches", "prefix", "position_table")
_EPSILON = 1e-8
# The gradient of a field that covers the grid is some 1e-5 of that of a narrow one, and
# clipping divides it by the norm of all others: Adam's own epsilon would hide it.
_WIDE_FIELDS_EPSILON = 1e-14


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The settings of AdamW (arXiv 1711.05101), ``config.optimizer``.

    Raises:
      UsageError: a value is out of its range.
    """

    learning_rate: float = setting(
        1e-3, "at its peak, after the warm-up", low=0, high=1e6
    )
    weight_decay: float = setting(
        0.1,
        "a step subtracts learning rate * decay * kernel; of kernels only",
        low=0,
        high=1e6,
    )
    b1: float = setting(0.9, "decay of the mean of the gradient", low=0, below=1)
    b2: float = setting(0.999, "decay of the mean of its square", low=0, below=1)
    clip_norm: float = setting(
        1.0,
        "largest norm of the gradient; 0: no clipping",
        low=0,
        high=1e6,
    )
    layer_decay: float = setting(
        1.0,
        "factor of the rate from each layer to the one before it; 1: all have the rate "
        "of the head",
        above=0,
        high=1,
    )
    fields_rate: float = setting(
        1.0,
        "rate of the fields, times that of the head; 0 keeps them as they start",
        low=0,
        high=1e6,
    )

    def __post_init__(self):
        settings.check_fields(self, "config.optimizer")


def learning_rate_schedule(
    peak: float, *, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Returns the schedule: linear warm-up from 0, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=max(total_steps, warmup_steps + 1),
    )


def make_optimizer(
    config: OptimizerConfig,
    learning_rate: optax.Schedule,
    *,
    depth: int,
    wide_fields: bool = False,
) -> optax.GradientTransformation:
    """Returns AdamW behind a clipping of the global norm.

    Each group of parameters (``group_names``) has its own rate (``relative_rates``).

    Args:
      config: the settings.
      learning_rate: of the head.
      depth: L, the number of blocks.
      wide_fields: whether fields start so wide that they need an epsilon of their own.
    """
    rates = relative_rates(config, depth)
    epsilons = {"fields": _WIDE_FIELDS_EPSILON} if wide_fields else {}

    def adamw(epsilon: float, rate: float) -> optax.GradientTransformation:
        transform = optax.adamw(
            learning_rate,
            b1=config.b1,
            b2=config.b2,
            eps=epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
        return transform if rate == 1 else optax.chain(transform, optax.scale(rate))

    # Groups of equal settings are one.
    settings = {name: (epsilons.get(name, _EPSILON), rates[name]) for name in rates}
    distinct = {str(setting): setting for setting in settings.values()}
    if len(distinct) == 1:
        update = adamw(*settings["rest"])
    else:
        update = optax.partition(
            {label: adamw(*setting) for label, setting in distinct.items()},
            lambda params: jax.tree.map(
                lambda name: str(settings[name]), group_names(params)
            ),
        )
    if not config.clip_norm:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def relative_rates(config: OptimizerConfig, depth: int) -> dict[str, float]:
    """Returns the learning rate of each group, as a share of that of the head.

    As in BEiT (arXiv 2106.08254) the rate falls from the head to the embedding. Fields
    have one of their own, wherever they are: when a ViT becomes a window-free
    transformer they are as new as the head.
    """
    decay = config.layer_decay
    rates = {"rest": 1.0, "fields": config.fields_rate}
    rates["embedding"] = decay ** (depth + 1)
    return rates | {f"{_BLOCK}{n}": decay ** (depth - n) for n in range(depth)}


def group_names(params: Params) -> PyTree[str]:
    """Returns the group of each parameter.

    Returns:
      "fields", "embedding", "blocks_0" to "blocks_<L - 1>", or "rest".
    """

    def group(path: Sequence[jax.tree_util.DictKey]) -> str:
        names = [entry.key for entry in path]
        if any(name in FIELD_NAMES for name in names):
            return "fields"
        if names[0] in _EMBEDDING:
            return "embedding"
        return names[0] if names[0].startswith(_BLOCK) else "rest"

    return jax.tree_util.tree_map_with_path(lambda path, _: group(path), params)


def decay_mask(params: Params) -> PyTree[bool]:
    """Returns True for every kernel: biases, norms, scales and tokens do not decay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
