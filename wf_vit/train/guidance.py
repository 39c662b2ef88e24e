"""Guidance: an indicator teaches a model where to look.

The definitions are ours. The rows R_i of a teacher's indicator, normalised over the
patches j, are the target, of each head or of their mean. What is to match them:

``match="fields"``: the fields. With M the membership the loss of a layer is the mean
over its patches i of

    1 - sum_j R_ij M_ij  +  area_weight * mean_j M_ij :

cover the interactions that matter, with as little area as possible. To cover a patch j
pays if R_ij exceeds ``area_weight / P``: with 1, if the interaction has more than the
even share. With less than 1 the fields of any target grow; with much more those of a
target that is nearly even vanish.
Both terms are computed from the row and column profiles of the membership, never from
M itself. In hard mode the loss is that of the soft membership, which has a gradient
everywhere.

``match="attention"``: what the student really does within its fields. With A the
attention over patches, the loss is the mean over patches of the divergence

    sum_j R_ij log(R_ij / A_ij) .

Rows of A sum to 1, so that area costs without a weight to choose, and queries, keys
and fields all learn from it. Models without fields can be guided too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import rel_entr
from jaxtyping import Array, Float, Int
from jaxtyping import Key as KeyArray

from wf_vit import grid as geometry
from wf_vit import indicators, measure
from wf_vit.errors import UsageError
from wf_vit.models.learned_fields import LearnedFields
from wf_vit.models.vit import ViT
from wf_vit.shapes import Images, Params
from wf_vit.train.masks import mean_over
from wf_vit.train.teacher import Teacher, distributions, taught_rows

MATCHES = ("fields", "attention")
# Attention below this counts as this: what a hard field drops is exactly 0.
_LEAST = 1e-9


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What guides the fields of a student, and for how long.

    Attributes:
      weight: of the loss at the first step; it falls linearly, to 0 at ``duration``.
      area_weight: of the area term within the loss.
      duration: in steps.
      indicator: a name of ``measure.INDICATORS``.
      num_probes: of the propagated indicator.
      teacher: None for the controls, or for the area term alone.
      match: what of the student is to match the target, one of ``MATCHES``.
      per_head: whether each head of the student is taught by the teacher's of the same
        index, or the mean over heads by the indicator fused over them.
    """

    weight: float
    area_weight: float
    duration: int
    indicator: str
    num_probes: int
    teacher: Teacher | None
    match: str
    per_head: bool

    def __post_init__(self):
        if self.teacher is not None and self.is_control:
            raise UsageError(
                f"guidance.indicator={self.indicator!r} needs no teacher: set "
                "guidance.teacher='', or another indicator."
            )
        if self.match == "attention" and not (self.teacher or self.is_control):
            raise UsageError(
                f"guidance.match='attention' and indicator={self.indicator!r} need a "
                "teacher, since attention has no area: set guidance.teacher, "
                "match='fields', or one of the indicators "
                f"{', '.join(measure.CONTROLS)}."
            )

    @property
    def is_control(self) -> bool:
        """Whether the target looks at no image, and needs no teacher."""
        return self.indicator in measure.CONTROLS

    def weight_at(self, step: Array) -> Float[Array, ""]:
        """Returns the weight of the loss before update ``step``, counted from 0."""
        return self.weight * jnp.maximum(1 - step / self.duration, 0)


def guide(
    guidance: Guidance,
    outputs: dict[str, Any],
    step: Int[Array, ""],
    params: Params | None,
    images: Images,
    keys: KeyArray[Array, " B"],
    *,
    student: ViT,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    weights: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the weighted loss of a student; see the top of this module.

    The teacher runs only as long as the weight is not 0.

    Args:
      guidance: what guides.
      outputs: of the student: its ``fields`` by layer, and to match attention its
        ``records`` of all layers.
      step: updates done before this one.
      params: of the teacher, if there is one.
      images: as the student sees them.
      keys: one for each image; randomness of the indicators that need it.
      student: its grid and depth count.
      mean: by which the student's images are normalised.
      std: likewise.
      weights: of the images, if not all are real (``masks.weights_of``).

    Returns:
      The loss, and as metrics ``guidance_loss``, the same, and what it is made of:
      ``field_coverage``, ``sum_j R_ij M_ij`` (0 without a target), or
      ``attention_divergence``, in nats. Both are 0 when guidance is over.
    """
    weight = guidance.weight_at(step)

    def look(params, images, keys):
        return target(
            guidance, params, images, keys, student=student, mean=mean, std=std
        )

    def rest(*inputs):
        shapes = jax.eval_shape(look, *inputs)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    rows = jax.lax.cond(weight > 0, look, rest, params, images, keys)
    if guidance.match == "attention":
        apart = divergence(outputs["records"], rows, student.num_prefix_tokens, weights)
        loss = weight * apart
        return loss, {"guidance_loss": loss, "attention_divergence": apart}
    covered, area = coverage_and_area(outputs["fields"], rows, weights)
    real = 1.0 if weights is None else weights.mean()
    missed = 0.0 if rows is None else real - covered
    loss = weight * (missed + guidance.area_weight * area)
    return loss, {"guidance_loss": loss, "field_coverage": covered}


def divergence(
    records: dict[int, dict[str, Array]],
    target: Float[Array, "L B *H P P"],
    num_prefix_tokens: int,
    weights: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Returns how far attention is from the target, ``sum_j R_ij log(R_ij / A_ij)``.

    Args:
      records: of the student, by layer, with its ``attention [B H N N]``.
      target: R of each layer, for each head or for their mean.
      num_prefix_tokens: of the student, which are left out.
      weights: of the images, if not all are real.

    Returns:
      The mean over layers, images, heads (if they are apart) and patches, in nats.
    """
    apart = []
    for place, layer in enumerate(sorted(records)):
        attention = indicators.interaction_indicator(
            records[layer]["attention"],
            num_prefix_tokens=num_prefix_tokens,
            per_head=target.ndim == 5,
            normalize=True,
        )
        attention = jnp.maximum(attention, _LEAST)
        apart.append(mean_over(rel_entr(target[place], attention).sum(-1), weights))
    return jnp.stack(apart).mean()


def coverage_and_area(
    fields: dict[int, LearnedFields],
    target: Float[Array, "L B *H P P"] | None,
    weights: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns how much of the target the fields cover, and their area.

    Args:
      fields: of the student, by layer.
      target: for each of its layers, rows that sum to 1, of each head or of their
        mean; None: none is covered.
      weights: of the images, if not all are real.

    Returns:
      ``sum_j R_ij M_ij`` and ``mean_j M_ij``, each the mean over layers, images and
      patches.
    """
    areas, covered = [], []
    for place, layer in enumerate(sorted(fields)):
        rows = jnp.exp(fields[layer].log_rows)
        columns = jnp.exp(fields[layer].log_columns)
        areas.append(mean_over(rows.mean(-1) * columns.mean(-1), weights))
        if target is not None:
            covered.append(coverage(target[place], rows, columns, weights))
    mean_covered = jnp.stack(covered).mean() if covered else jnp.zeros(())
    return mean_covered, jnp.stack(areas).mean()


def coverage(
    target: Float[Array, "B *H P P"],
    rows: Float[Array, "#B #H P GH"],
    columns: Float[Array, "#B #H P GW"],
    weights: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Returns ``sum_j R_ij M_ij``, mean over images and patches.

    Args:
      target: R, rows that sum to 1, of each head or of their mean.
      rows: membership of every row of the grid, for each query and head.
      columns: membership of every column, so that M is their product, of each head
        or the mean over heads.
      weights: of the images, if not all are real.
    """
    height, width = rows.shape[-1], columns.shape[-1]
    grids = target.reshape(*target.shape[:-1], height, width)
    batch = (len(target), rows.shape[1])
    rows = jnp.broadcast_to(rows, (*batch, *rows.shape[2:]))
    columns = jnp.broadcast_to(columns, (*batch, *columns.shape[2:]))
    heads = "h" if target.ndim == 4 else ""
    by_row = jnp.einsum(f"b{heads}pyx,bhpx->bhpy", grids, columns)
    return mean_over((by_row * rows).sum(-1), weights)


def target(
    guidance: Guidance,
    params: Params | None,
    images: Images,
    keys: KeyArray[Array, " B"],
    *,
    student: ViT,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "L B *H P P"] | None:
    """Returns what each layer of the student, or each of its heads, should attend to.

    Args:
      guidance: what guides.
      params: of the teacher.
      images: as the student sees them.
      keys: one for each image; randomness of the indicators that need it.
      student: its grid and depth count.
      mean: by which the student's images are normalised.
      std: likewise.

    Returns:
      Rows that sum to 1, without a gradient (``teacher.taught_rows``); None: the area
      term acts alone.

    Raises:
      UsageError: heads are to be taught one by one, by a teacher of another number.
    """
    heads = (student.num_heads,) if guidance.per_head else ()
    patches = student.grid[0] * student.grid[1]
    shape = (student.depth, len(images), *heads, patches, patches)
    if guidance.indicator == "distance":
        near = distributions(1 / (1 + jnp.asarray(geometry.distances(student.grid))))
        return jnp.broadcast_to(near, shape)
    if guidance.indicator == "random":
        draw = jax.vmap(lambda key: jax.random.uniform(key, (shape[0], *shape[2:])))
        return distributions(draw(keys).swapaxes(0, 1))
    if guidance.teacher is None:
        return None
    return taught_rows(
        guidance.teacher,
        params,
        images,
        guidance.indicator,
        student=student,
        mean=mean,
        std=std,
        per_head=guidance.per_head,
        num_probes=guidance.num_probes,
        key=keys[0],
    )
