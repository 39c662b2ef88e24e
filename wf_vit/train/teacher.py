"""From ``config.guidance`` to what guides the fields, and the teacher's parameters."""

import logging

import jax
import ml_collections

from wf_vit.errors import UsageError
from wf_vit.models import pretrained, registry
from wf_vit.shapes import Params
from wf_vit.train.guidance import Guidance, Teacher

_LOG = logging.getLogger(__name__)


def guidance_and_teacher(
    config: ml_collections.ConfigDict, *, duration: int
) -> tuple[Guidance | None, Params | None]:
    """Returns what guides the fields of a model, and the parameters of the teacher.

    Args:
      config: the experiment's; its ``guidance`` and the model's name count.
      duration: of the guidance, in steps.

    Returns:
      None for either that there is not.

    Raises:
      UsageError: the settings contradict one another or the model, or the teacher
        cannot be opened.
    """
    options = config.guidance
    if not options.weight:
        if options.teacher:
            raise UsageError(
                f"config.guidance.teacher is {options.teacher!r}, but its weight is "
                "0: set config.guidance.weight (1 is a start), or no teacher."
            )
        return None, None
    if options.match == "fields" and config.model.name not in registry.FIELD_MODELS:
        raise UsageError(
            f"config.guidance.weight is {options.weight}, but {config.model.name!r} "
            f"has no fields to guide: use {' or '.join(registry.FIELD_MODELS)}, or set "
            "config.guidance.match='attention', or the weight to 0."
        )
    teacher, params = None, None
    if options.teacher:
        teacher, params = load_teacher(options)
    guidance = Guidance(
        weight=options.weight,
        area_weight=options.area_weight,
        duration=duration,
        indicator=options.indicator,
        num_probes=options.num_probes,
        teacher=teacher,
        match=options.match,
        per_head=options.per_head,
    )
    return guidance, params


def load_teacher(options: ml_collections.ConfigDict) -> tuple[Teacher, Params]:
    """Opens the teacher of ``config.guidance``, to run in its ``dtype``."""
    loaded = pretrained.load(options.teacher, image_size=options.image_size)
    described = registry.to_json(loaded.model) | {"dtype": options.dtype}
    _LOG.info("Teacher %s: %s", options.teacher, described)
    model = registry.from_json(described)
    recipe = loaded.preprocess.recipe
    teacher = Teacher(model=model, mean=tuple(recipe.mean), std=tuple(recipe.std))
    return teacher, jax.tree.map(lambda p: p.astype(model.dtype), loaded.params)
