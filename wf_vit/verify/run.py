"""The task ``verify``: a checkpoint and a data set to evidence for the indicators."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import tqdm

from wf_vit.data import pipeline
from wf_vit.data.config import default_config as default_data
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained.preprocess import Preprocess
from wf_vit.verify.report import write
from wf_vit.verify.store import Store
from wf_vit.verify.subject import Subject
from wf_vit.verify.summary import best_layer, summarize
from wf_vit.verify.timing import time_removal

_LOG = logging.getLogger(__name__)

PROTOCOLS = ("windows", "removal", "pixels", "faithfulness")
_SPLIT = "verify"


def verify(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the protocols, going on where an earlier call was interrupted.

    It takes one process and one device. Memory is that of a batch, and of the outcomes
    of each image, which are a few kilobytes.

    Args:
      config: see ``configs/verify.py``.
      workdir: receives ``config.json``, ``outcomes/`` with the outcomes of each image,
        ``verify.json``, ``table.md`` and ``figures/``.

    Returns:
      What ``verify.json`` holds.

    Raises:
      UsageError: the config cannot work, or the working directory has outcomes of
        other settings.
    """
    protocols = _protocols(config)
    loaded = pretrained.load(config.weights, image_size=config.image_size)
    data = _data(config, loaded)
    info = pipeline.describe(data)
    subject = Subject(
        model=loaded.model,
        params=loaded.params,
        layers=tuple(config.layers) or first_of_quarters(loaded.model.depth),
        labelled=loaded.model.num_classes == info.num_classes,
        config=config,
    )
    protocols = _allowed(subject, protocols)
    num_examples = info.num_examples[_SPLIT]
    limits = {
        protocol: min(config.num_images[protocol] or num_examples, num_examples)
        for protocol in protocols
    }
    settings = json.loads(config.to_json_best_effort())
    store = Store(workdir, settings, loaded.params)
    _measure_missing(subject, store, data, loaded.preprocess, limits)
    results = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "cpus": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        },
        "config": settings,
        "images": limits,
        **summarize(store.load(), subject),
    }
    if "removal" in protocols and config.timing_turns:
        layer = best_layer(results["removal"])
        results["removal"]["milliseconds_per_image"] = time_removal(
            subject.params,
            layer=layer,
            shares=config.removed,
            turns=config.timing_turns,
            model=subject.model,
        )
    write(results, workdir)
    _LOG.info("Wrote %s.", workdir / "table.md")
    return results


def first_of_quarters(depth: int) -> tuple[int, ...]:
    """Returns the first layer of each quarter of a model's layers, each once."""
    return tuple(sorted({quarter * depth // 4 for quarter in range(4)}))


def _protocols(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    # On a command line "windows,removal" is one name.
    names = tuple(n.strip() for name in config.protocols for n in name.split(","))
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise UsageError(
            f"config.protocols is {names}: name some of {', '.join(PROTOCOLS)}."
        )
    if not config.weights:
        raise UsageError(
            "config.weights is empty: pass a checkpoint or the folder of a run, as "
            "--config.weights=runs/cifar10."
        )
    if config.batch_size < 1:
        raise UsageError(
            f"config.batch_size is {config.batch_size}, expected at least 1."
        )
    return names


def _data(
    config: ml_collections.ConfigDict, loaded: pretrained.Pretrained
) -> ml_collections.ConfigDict:
    """Returns the settings of the data, sizes and resizing being the checkpoint's."""
    recipe = loaded.preprocess.recipe
    data = default_data()
    data.update(config.data)
    with data.ignore_type():
        data.image_size = loaded.model.image_size
    data.eval_resize = recipe.crop or 1.0
    data.resize_method = recipe.interpolation.replace("lanczos", "lanczos3")
    data.train = config.split
    data.eval = {_SPLIT: config.split}
    return data


def _allowed(subject: Subject, protocols: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the protocols that the model allows.

    Raises:
      UsageError: none is left, or there are no such layers.
    """
    if not set(subject.layers) <= set(range(subject.model.depth)):
        raise UsageError(
            f"config.layers is {subject.layers}: name some of the model's layers, 0 to "
            f"{subject.model.depth - 1}, or none for the first of each quarter."
        )
    if not subject.labelled:
        _LOG.info("The head's classes are not those of the data: no top-1.")
    if subject.model.num_classes or "pixels" not in protocols:
        return protocols
    if protocols == ("pixels",):
        raise UsageError(
            "The checkpoint has no head, which the protocol pixels needs: choose other "
            "config.protocols, or a classifier."
        )
    _LOG.info("The checkpoint has no head: the protocol pixels is left out.")
    return tuple(name for name in protocols if name != "pixels")


def _measure_missing(
    subject: Subject,
    store: Store,
    data: ml_collections.ConfigDict,
    preprocess: Preprocess,
    limits: dict[str, int],
) -> None:
    """Measures and stores the batches that are not done."""
    size, total = subject.config.batch_size, max(limits.values())
    key = jax.random.key(subject.config.seed)
    batches = pipeline.eval_batches(data, _SPLIT, batch_size=size)
    with tqdm.tqdm(total=total, unit=" images", disable=None) as bar:
        for number, start in enumerate(range(0, total, size)):
            batch = next(batches)
            if not store.has(number):
                counts = {
                    name: min(max(limit - start, 0), size)
                    for name, limit in limits.items()
                }
                images = preprocess.normalize(batch["image"])
                outcomes = subject.outcomes(
                    jnp.asarray(images),
                    jnp.asarray(batch["label"]),
                    counts,
                    jax.random.fold_in(key, number),
                )
                store.save(number, outcomes)
            done = min(start + size, total)
            bar.update(done - bar.n)
            if bar.disable:
                _LOG.info("%d of %d images", done, total)
