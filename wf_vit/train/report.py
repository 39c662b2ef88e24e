"""What a run shows a person: its log, its config and its figures."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib.figure import Figure

from wf_vit import figures
from wf_vit.data import augment, pipeline
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params
from wf_vit.train.reporter import read_jsonl

_LOG = logging.getLogger(__name__)

_EXAMPLES = 6


def save_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes ``config.json``, and logs what changed against an earlier one."""
    if jax.process_index() != 0:
        return
    path = workdir / "config.json"
    new = json.loads(config.to_json_best_effort())
    if path.exists():
        old = json.loads(path.read_text())
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                _LOG.warning(
                    "config.%s was %s when this run began and is now %s.",
                    name,
                    old.get(name),
                    new.get(name),
                )
    path.write_text(json.dumps(new, indent=2) + "\n")


def save_figures(
    config: ml_collections.ConfigDict, workdir: Path, model: ViT, params: Params
) -> None:
    """Draws the curves of a run and, if its model has them, its learned fields."""
    if jax.process_index() != 0:
        return
    _save(figures.training_curves(read_jsonl(workdir)), workdir, "curves")
    split = next(iter(config.data.eval))
    batch = next(pipeline.eval_batches(config.data, split, batch_size=_EXAMPLES))
    images = batch["image"][batch["mask"].astype(bool)]
    normal = augment.normalize(
        jnp.asarray(images), config.data.augment.mean, config.data.augment.std
    )
    _, out = jax.jit(model.apply)({"params": params}, normal)
    if out["fields"]:
        extents = np.stack([f.extents for f in out["fields"].values()])
        figure = figures.learned_fields(
            images, extents, model.grid, softness=model.fields.softness
        )
        _save(figure, workdir, "fields")


def _save(figure: Figure, workdir: Path, name: str) -> None:
    """Writes a figure as PNG and PDF."""
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    with figures.style():
        for suffix in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{suffix}")
    _LOG.info("Wrote %s.", folder / f"{name}.png")
