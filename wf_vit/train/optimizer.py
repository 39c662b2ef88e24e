"""The learning rate over the steps, and AdamW or Muon for groups of parameters."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import optax
from jaxtyping import Array, PyTree
from optax.contrib import MuonDimensionNumbers, muon

from wf_vit import settings
from wf_vit.models.attention import FIELD_NAMES
from wf_vit.settings import setting
from wf_vit.shapes import Params

_BLOCK = "blocks_"
# Top-level parameters of a model that come before its blocks.
_EMBEDDING = ("patches", "prefix", "position_table", "embedding_norm")
_EPSILON = 1e-8
# The gradient of a field that covers the grid is some 1e-5 of that of a narrow one, and
# clipping divides it by the norm of all others: Adam's own epsilon would hide it.
_WIDE_FIELDS_EPSILON = 1e-14

ADAMW, MUON = "adamw", "muon"
# The root mean square of Muon's updates, in learning rates: about that of AdamW's, so
# that a rate and a decay suit both (arXiv 2502.16982).
_MUON_RMS = 0.2
# Whose kernels are [D, H, K].
_TO_HEADS = ("query", "key", "value")

KeyPath = Sequence[jax.tree_util.DictKey]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The settings of the optimizer, ``config.optimizer``.

    AdamW is that of arXiv 1711.05101. Muon (Jordan, 2024) makes the update of a matrix
    orthogonal, which moves all directions alike; here with optax's momentum of 0.95
    and updates as large as AdamW's (arXiv 2502.16982).

    Raises:
      UsageError: a value is out of its range.
    """

    name: str = setting(
        ADAMW,
        "muon: for the kernels of attention and MLPs, and AdamW for all else",
        kind=str,
        choices=(ADAMW, MUON),
    )
    learning_rate: float = setting(
        1e-3, "at its peak, after the warm-up", low=0, high=1e6
    )
    weight_decay: float = setting(
        0.1,
        "a step subtracts learning rate * decay * kernel; of kernels only",
        low=0,
        high=1e6,
    )
    b1: float = setting(
        0.9, "AdamW's decay of the mean of the gradient", low=0, below=1
    )
    b2: float = setting(
        0.999, "AdamW's decay of the mean of its square", low=0, below=1
    )
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
    """Returns AdamW, or Muon with AdamW, behind a clipping of the global norm.

    Each group of parameters (``group_names``) has its own rate (``relative_rates``).

    Args:
      config: the settings.
      learning_rate: of the head.
      depth: L, the number of blocks.
      wide_fields: whether fields start so wide that they need an epsilon of their own.
    """
    rates = relative_rates(config, depth)
    epsilons = {"fields": _WIDE_FIELDS_EPSILON} if wide_fields else {}

    def transform(
        kind: str, epsilon: float, rate: float
    ) -> optax.GradientTransformation:
        if kind == MUON:
            made = muon(
                learning_rate,
                weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=matrix_axes,
                consistent_rms=_MUON_RMS,
            )
        else:
            made = optax.adamw(
                learning_rate,
                b1=config.b1,
                b2=config.b2,
                eps=epsilon,
                weight_decay=config.weight_decay,
                mask=decay_mask,
            )
        return made if rate == 1 else optax.chain(made, optax.scale(rate))

    # The settings of each group: of its matrices, and of all else in it.
    plain = {
        name: (ADAMW, epsilons.get(name, _EPSILON), rate)
        for name, rate in rates.items()
    }
    matrices = dict(plain)
    if config.name == MUON:
        blocks = [name for name in rates if name.startswith(_BLOCK)]
        matrices |= {name: (MUON, _EPSILON, rates[name]) for name in blocks}

    def label(path: KeyPath, leaf: Array) -> str:
        of_kind = plain if _axes(path, leaf) is None else matrices
        return _label(*of_kind[_group(path)])

    # Groups of equal settings are one.
    distinct = {_label(*x): x for x in [*plain.values(), *matrices.values()]}
    if len(distinct) == 1:
        update = transform(*plain["rest"])
    else:
        update = optax.partition(
            {name: transform(*setting) for name, setting in distinct.items()},
            functools.partial(jax.tree_util.tree_map_with_path, label),
        )
    if not config.clip_norm:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _label(kind: str, epsilon: float, rate: float) -> str:
    """Names settings. Saved states of optimizers have these names: they must stay."""
    return str((epsilon, rate)) if kind == ADAMW else str((kind, rate))


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
    return jax.tree_util.tree_map_with_path(lambda path, _: _group(path), params)


def _group(path: KeyPath) -> str:
    names = [entry.key for entry in path]
    if any(name in FIELD_NAMES for name in names):
        return "fields"
    if names[0] in _EMBEDDING:
        return "embedding"
    return names[0] if names[0].startswith(_BLOCK) else "rest"


def matrix_axes(params: Params) -> PyTree[MuonDimensionNumbers | None]:
    """Returns which axes of each kernel of a block are a matrix's, for Muon.

    The heads of attention are one matrix: query, key and value map [D] to [H, K], and
    the output maps [H, K] back. None for all other parameters, those of fields too.
    """
    return jax.tree_util.tree_map_with_path(_axes, params)


def _axes(path: KeyPath, leaf: Array) -> MuonDimensionNumbers | None:
    if not _group(path).startswith(_BLOCK) or path[-1].key != "kernel":
        return None
    outputs = 2 if path[-2].key in _TO_HEADS else 1
    split = leaf.ndim - outputs
    return MuonDimensionNumbers(tuple(range(split)), tuple(range(split, leaf.ndim)))


def decay_mask(params: Params) -> PyTree[bool]:
    """Returns True for every kernel: biases, norms, scales and tokens do not decay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
