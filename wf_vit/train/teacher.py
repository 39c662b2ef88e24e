"""Who teaches a model: another one, whose indicator says where to look."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wf_vit import grid as geometry
from wf_vit import measure
from wf_vit.errors import UsageError
from wf_vit.indicators.arithmetic import normalize_rows
from wf_vit.models import pretrained, registry
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Interactions, Params

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The model whose indicator is the target; its parameters travel separately.

    Attributes:
      model: the module.
      mean: of each channel of its images in [0, 1].
      std: of each channel.
    """

    model: ViT
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_teacher(
    source: str, *, image_size: int | None, dtype: str
) -> tuple[Teacher, Params]:
    """Opens a teacher.

    Args:
      source: whatever ``pretrained.load`` opens.
      image_size: side in pixels at which it sees the images; None: its own.
      dtype: of its parameters and its computation.

    Raises:
      UsageError: it cannot be opened.
    """
    loaded = pretrained.load(source, image_size=image_size)
    model = registry.with_dtype(loaded.model, dtype)
    _LOG.info("Teacher %s: %s", source, registry.to_json(model))
    form = loaded.preprocess.image_format
    teacher = Teacher(model=model, mean=tuple(form.mean), std=tuple(form.std))
    return teacher, jax.tree.map(lambda p: p.astype(model.dtype), loaded.params)


def taught_rows(
    teacher: Teacher,
    params: Params,
    images: Images,
    indicator: str,
    *,
    student: ViT,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    per_head: bool,
    num_probes: int,
    key: Array,
) -> Float[Array, "L B *H P P"]:
    """Returns what a teacher's indicator says, for each layer of a student.

    The teacher sees the student's own augmented images, resized to its size. If it is
    deeper or shallower, the student's first layer is taught by its first, the last by
    its last, and those between by the nearest in relative depth; if its grid is
    another, its indicator is resampled (``resample``).

    Args:
      teacher: the model.
      params: its parameters.
      images: as the student sees them.
      indicator: a name of ``measure.INDICATORS``.
      student: its depth, heads, image size and grid count.
      mean: by which the student's images are normalised.
      std: likewise.
      per_head: whether each head teaches the student's of the same index.
      num_probes: of the propagated indicator.
      key: randomness of the probes.

    Returns:
      Rows that sum to 1, without a gradient.

    Raises:
      UsageError: heads are to teach one by one, and the student has another number.
    """
    model = teacher.model
    if per_head and model.num_heads != student.num_heads:
        raise UsageError(
            f"guidance.per_head=True, but the teacher has {model.num_heads} heads and "
            f"the student {student.num_heads}: set model.num_heads to the teacher's, "
            "or per_head=False."
        )
    depths = np.linspace(0, model.depth - 1, student.depth)
    matched = tuple(int(layer) for layer in np.floor(depths + 0.5))
    whole = indicator == "rollout"
    layers = tuple(range(model.depth)) if whole else tuple(sorted(set(matched)))
    found = measure.impact(
        model,
        params,
        renormalized(images, student.image_size, mean, std, teacher),
        indicator,
        per_head=per_head,
        layers=layers,
        num_probes=num_probes,
        key=key,
    )
    rows = distributions(found.heads if per_head else found.impact)
    rows = resample(rows, model.grid, student.grid)
    return jax.lax.stop_gradient(rows[np.array([*map(layers.index, matched)])])


def renormalized(
    images: Images,
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    teacher: Teacher,
) -> Float[Array, "B rows columns 3"]:
    """Returns normalised images as a teacher expects them: its size, mean and std."""
    channels = (1, 1, 1, 3)
    scale = np.divide(std, teacher.std).reshape(channels)
    shift = (np.subtract(mean, teacher.mean) / teacher.std).reshape(channels)
    images = images * scale.astype(np.float32) + shift.astype(np.float32)
    if teacher.model.image_size == tuple(size):
        return images
    shape = (len(images), *teacher.model.image_size, 3)
    return jax.image.resize(images, shape, "bilinear")


def distributions(impact: Interactions) -> Interactions:
    """Returns rows that sum to 1; a row of zeros becomes even."""
    even = jnp.ones((), impact.dtype) / impact.shape[-1]
    total = impact.sum(-1, keepdims=True)
    return jnp.where(total > 0, normalize_rows(impact), even)


def resample(
    impact: Float[Array, "*batch old old"],
    source: geometry.Grid,
    target: geometry.Grid,
) -> Float[Array, "*batch new new"]:
    """Returns an indicator on another grid over the same image.

    A patch of the target listens as the patches of the source do that it overlaps,
    weighted by the overlap; what a patch of the source is listened to is spread evenly
    over its area. So rows that sum to 1 still do, and equal grids change nothing.

    Args:
      impact: on the source grid, ``[..., P, P]``.
      source: ``(GH, GW)`` of the indicator.
      target: ``(GH, GW)`` of the result.
    """
    if source == target:
        return impact
    axes = [_overlaps(*sizes) for sizes in zip(source, target, strict=True)]
    queries = np.kron(*(o / o.sum(1, keepdims=True) for o in axes))
    keys = np.kron(*(o / o.sum(0, keepdims=True) for o in axes))
    return jnp.einsum("ti,...ij,uj->...tu", queries, impact, keys)


def _overlaps(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Returns how long the cells of two even partitions of [0, 1] overlap."""
    edges = [np.arange(n + 1) / n for n in (target, source)]
    right = np.minimum(edges[0][1:, None], edges[1][None, 1:])
    left = np.maximum(edges[0][:-1, None], edges[1][None, :-1])
    return np.maximum(right - left, 0).astype(np.float32)
