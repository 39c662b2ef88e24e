"""The task ``export``: any checkpoint, saved in another layout."""

import logging
from pathlib import Path

import ml_collections

from wf_vit import settings
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained.runs import DIRECTORY
from wf_vit.workdir import prepare_workdir

_LOG = logging.getLogger(__name__)


def export(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Saves ``config.weights`` in the layout ``config.layout``.

    Args:
      config: of ``configs/export.py``.
      workdir: the folder that is written.

    Raises:
      UsageError: the checkpoint cannot be opened, or the layout cannot hold it.
    """
    if (workdir / DIRECTORY).exists():
        raise UsageError(
            f"{workdir} is the folder of a run, whose config.json would be lost: pass "
            "another --workdir."
        )
    if not config.weights:
        raise UsageError(
            "config.weights is empty: name a checkpoint, such as the folder of a run."
        )
    loaded = pretrained.load(config.weights, **settings.opening(config))
    prepare_workdir(workdir)
    loaded.save(workdir, layout=config.layout)
    _LOG.info(
        "Saved %s in the layout %s as %s: %r", config.weights, config.layout, workdir,
        loaded,
    )  # fmt: skip
