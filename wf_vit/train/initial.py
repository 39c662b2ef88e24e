"""What a run starts from: a fresh model, or a published checkpoint's."""

import logging

import jax
import jax.numpy as jnp
import ml_collections
from flax import traverse_util

from wf_vit.data.pipeline import DataInfo
from wf_vit.errors import UsageError
from wf_vit.models import pretrained, registry
from wf_vit.models.attention import FIELD
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params
from wf_vit.train.state import init_params

_LOG = logging.getLogger(__name__)


def model_and_params(
    config: ml_collections.ConfigDict, info: DataInfo
) -> tuple[ViT, Params]:
    """Returns the model and its parameters before the first step.

    With ``config.init_from`` the architecture is the checkpoint's, at the data's image
    size and classes, and ``config.model`` says how to train it
    (``registry.rebuild``). Parameters that the checkpoint lacks start afresh, and the
    log names them.

    Raises:
      UsageError: the config contradicts itself, or the checkpoint cannot be opened.
    """
    if not config.init_from:
        model = registry.create_model(
            config.model, num_classes=info.num_classes, image_size=info.image_size
        )
        return model, init_params(model, config.seed)
    loaded = pretrained.load(
        config.init_from, image_size=info.image_size, num_classes=info.num_classes
    )
    model = registry.rebuild(loaded.model, config.model)
    _LOG.info("From %s: %s", config.init_from, registry.to_json(model))
    new = init_params(model, config.seed)
    return model, adopt(new, loaded.params, source=config.init_from)


def adopt(new: Params, loaded: Params, *, source: str) -> Params:
    """Returns ``loaded``, with the fields of ``new`` if it has none.

    Fields are what a checkpoint may lack: they turn a ViT into a window-free
    transformer. (A head for other classes is the importer's to make.)

    Raises:
      UsageError: other parameters differ; they are named.
    """
    ours = traverse_util.flatten_dict(new, sep="/")
    theirs = traverse_util.flatten_dict(loaded, sep="/")
    fresh = [n for n in ours if n not in theirs and FIELD in n.split("/")]
    wrong = [n for n in ours if n not in theirs and n not in fresh]
    wrong += [n for n in theirs if n not in ours]
    if wrong:
        raise UsageError(
            f"{source} and config.model.name differ in the parameters "
            f"{', '.join(wrong)}: name the checkpoint's model."
        )
    if fresh:
        _LOG.info("Not in %s, so started afresh: %s", source, ", ".join(fresh))
    taken = jax.tree.map(jnp.asarray, theirs)
    return traverse_util.unflatten_dict({**ours, **taken}, sep="/")
