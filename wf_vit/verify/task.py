"""The task ``verify``: a checkpoint and a data set to evidence for the indicators."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from jaxtyping import Shaped

from wf_vit import figures
from wf_vit.data.config import DataConfig, View
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained.preprocess import tensorflow_name
from wf_vit.settings import opening
from wf_vit.shapes import Images, Labels, Params
from wf_vit.verify import report
from wf_vit.verify.bootstrap import intervals
from wf_vit.verify.class_maps import ClassMaps
from wf_vit.verify.faithfulness import Faithfulness
from wf_vit.verify.groups import Groups
from wf_vit.verify.pixels import Pixels
from wf_vit.verify.removal import Removal
from wf_vit.verify.subject import Case, Estimate, Outcomes, Protocol, Subject, Summary
from wf_vit.verify.tendency import Tendency
from wf_vit.verify.windows import Windows
from wf_vit.workdir import (
    claim_workdir,
    command_line,
    held,
    opened_arrays,
    prepare_workdir,
    replacing,
    write_text,
)

_LOG = logging.getLogger(__name__)

# Every protocol, by its name in a config and in the results.
PROTOCOLS: dict[str, type[Protocol]] = {
    "windows": Windows,
    "removal": Removal,
    "pixels": Pixels,
    "class_maps": ClassMaps,
    "faithfulness": Faithfulness,
    "groups": Groups,
    "tendency": Tendency,
}
_SPLIT = "verify"
# Settings that change no outcome, only what is made of them.
_FREE = ("bootstrap_samples", "timing_turns")


def verify(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the protocols, going on where an earlier call was interrupted.

    It takes one process and one device. Memory is that of a batch, and of the outcomes
    of each image, which are a few kilobytes.

    Args:
      config: that of ``configs/verify.py``, where its keys are documented.
      workdir: receives ``config.json``, ``outcomes/`` with the outcomes of each image,
        ``verify.json``, ``table.md`` and ``figures/``.

    Returns:
      What ``verify.json`` holds.

    Raises:
      UsageError: the config cannot work, or the working directory has outcomes of
        other settings.
    """
    names = _names(config)
    loaded = pretrained.load(
        config.weights, image_size=config.image_size, **opening(config)
    )
    class_names, num_examples, batches = _open(config, loaded)
    subject = Subject(
        model=loaded.model,
        params=loaded.params,
        labelled=tells_apart(loaded, class_names),
        target=config.target,
        num_probes=config.num_probes,
    )
    if not subject.labelled:
        _LOG.info("The head's classes are not those of the data: no top-1.")
    protocols = _protocols(names, subject, config)
    limits = {
        name: min(config.num_images.get(name, 0) or num_examples, num_examples)
        for name in protocols
    }
    settings = json.loads(config.to_json_best_effort())
    with held(workdir):
        store = Store(workdir, settings, loaded.params)
        _measure_missing(subject, protocols, limits, batches, store, config)
        outcomes = store.load()
    estimate = partial(intervals, seed=config.seed, samples=config.bootstrap_samples)
    results = {
        "command": command_line(),
        "machine": {
            "cpus": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        },
        "config": settings,
        "images": limits,
        **_summaries(outcomes, protocols, estimate),
    }
    _write(results, protocols, workdir)
    _LOG.info("Wrote %s.", workdir / "table.md")
    return results


def measure(
    case: Case, protocols: Mapping[str, Protocol], counts: Mapping[str, int]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Returns the outcomes of each protocol on the first images of a batch.

    Args:
      case: the batch.
      protocols: by name.
      counts: how many images each protocol still takes, which may be none or more than
        there are; the others only fill up the batch.

    Returns:
      ``PROTOCOL/MEASURE``: what the protocol returns for each image, and with labels
      ``whole/top1``, of the model left alone.
    """
    counts = {n: min(max(count, 0), len(case.images)) for n, count in counts.items()}
    outcomes = {}
    if case.labels is not None:
        right = np.asarray(case.whole.logits.argmax(-1) == case.labels, np.float32)
        outcomes["whole/top1"] = right[: max(counts.values())]
    for protocol, count in counts.items():
        measures = protocols[protocol].measure(case, count) if count else {}
        for name, outcome in measures.items():
            outcomes[f"{protocol}/{name}"] = outcome[:count]
    return outcomes


class Store:
    """The outcomes of one set of settings, a file for each batch.

    They are in ``outcomes/``, beside ``config.json``, so that a killed run goes on.
    """

    def __init__(self, workdir: Path, settings: dict[str, Any], params: Params):
        """Opens the working directory, and creates it if it does not exist.

        Args:
          workdir: where the outcomes are kept.
          settings: of the run, in terms of JSON.
          params: of the model; the same name may stand for others one day.

        Raises:
          UsageError: it cannot be written, or holds outcomes of other settings.
        """
        self._folder = workdir / "outcomes"
        prepare_workdir(self._folder)
        claim_workdir(workdir, settings, params, results=self._folder, free=_FREE)

    def has(self, batch: int) -> bool:
        """Whether the outcomes of a batch are there."""
        return self._file(batch).exists()

    def save(self, batch: int, outcomes: dict[str, Shaped[np.ndarray, "..."]]) -> None:
        """Writes the outcomes of a batch, all at once."""
        with replacing(self._file(batch)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **outcomes)

    def load(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Returns the outcomes of all batches one after the other, by name."""
        parts: dict[str, list[np.ndarray]] = {}
        for path in sorted(self._folder.glob("*.npz")):
            with opened_arrays(path) as arrays:
                for name in arrays.files:
                    parts.setdefault(name, []).append(arrays[name])
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _file(self, batch: int) -> Path:
        return self._folder / f"{batch:06d}.npz"


def _names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the names of the protocols that are asked for; checks the config."""
    # On a command line "windows,removal" is one name.
    names = tuple(n.strip() for name in config.protocols for n in name.split(","))
    if not set(names) <= set(PROTOCOLS):
        raise UsageError(
            f"config.protocols is {names}: name some of {', '.join(PROTOCOLS)}, or "
            "none for all of them."
        )
    if not config.weights:
        raise UsageError(
            "config.weights is empty: pass a checkpoint or the folder of a run, as "
            "--config.weights=runs/cifar10."
        )
    return names or tuple(PROTOCOLS)


def _open(
    config: ml_collections.ConfigDict, loaded: pretrained.Pretrained
) -> tuple[tuple[str, ...], int, Iterator[tuple[Images, Labels]]]:
    """Opens the data; sizes, resizing and normalisation are the checkpoint's.

    Returns:
      The names of the classes, the number of examples, and the batches.
    """
    # Here, because it loads TensorFlow.
    from wf_vit.data.pipeline import open_dataset

    form = loaded.preprocess.image_format
    view = View(
        image_size=loaded.model.image_size,
        eval_resize=form.crop or 1.0,
        resize_method=tensorflow_name(form.interpolation),
    )
    splits = {"train": config.split, "eval": {_SPLIT: config.split}}
    data = open_dataset(DataConfig(**config.data.to_dict(), **splits, view=view))
    info = data.info
    batches = data.eval_batches(_SPLIT, batch_size=config.batch_size)
    normalized = (
        (
            jnp.asarray(loaded.preprocess.normalize(batch["image"])),
            jnp.asarray(batch["label"]),
        )
        for batch in batches
    )
    return info.class_names, info.num_examples[_SPLIT], normalized


def tells_apart(loaded: pretrained.Pretrained, names: Sequence[str]) -> bool:
    """Whether the classes of a checkpoint are those of the data, in this order.

    Names may be written in two ways, as words and as numbers of WordNet, say. But if
    some are the same and others are not, the classes are others.

    Args:
      loaded: the checkpoint; it need not know its classes' names.
      names: of the classes of the data.
    """
    if loaded.model.num_classes != len(names):
        return False
    known = loaded.class_names or ()
    return tuple(known) == tuple(names) or not set(known) & set(names)


def _protocols(
    names: tuple[str, ...], subject: Subject, config: ml_collections.ConfigDict
) -> dict[str, Protocol]:
    """Returns the protocols that the model allows, by name.

    Raises:
      UsageError: none is left, or the settings of one do not fit the model.
    """
    headless = not subject.model.num_classes
    left_out = [name for name in names if headless and PROTOCOLS[name].needs_head]
    if set(left_out) == set(names):
        raise UsageError(
            f"The checkpoint has no head, which the protocol {', '.join(left_out)} "
            "needs: choose other config.protocols, or a classifier."
        )
    for name in left_out:
        _LOG.info("The checkpoint has no head: the protocol %s is left out.", name)
    return {n: PROTOCOLS[n](subject, config) for n in names if n not in left_out}


def _measure_missing(
    subject: Subject,
    protocols: Mapping[str, Protocol],
    limits: Mapping[str, int],
    batches: Iterator[tuple[Images, Labels]],
    store: Store,
    config: ml_collections.ConfigDict,
) -> None:
    """Measures and stores the batches that are not done."""
    size, total = config.batch_size, max(limits.values())
    key = jax.random.key(config.seed)
    with tqdm.tqdm(total=total, unit=" images", disable=None) as bar:
        for number, start in enumerate(range(0, total, size)):
            images, labels = next(batches)
            if not store.has(number):
                case = Case(subject, images, labels, jax.random.fold_in(key, number))
                counts = {name: limit - start for name, limit in limits.items()}
                store.save(number, measure(case, protocols, counts))
            done = min(start + size, total)
            bar.update(done - bar.n)
            if bar.disable:
                _LOG.info("%d of %d images", done, total)


def _summaries(
    outcomes: Mapping[str, Shaped[np.ndarray, "..."]],
    protocols: Mapping[str, Protocol],
    estimate: Estimate,
) -> dict[str, Summary]:
    """Returns the summary of each protocol that has outcomes."""
    by_protocol: dict[str, Outcomes] = {}
    for name, outcome in outcomes.items():
        protocol, _, measure = name.partition("/")
        by_protocol.setdefault(protocol, {})[measure] = outcome
    summaries = {}
    for name, measures in by_protocol.items():
        if name == "whole":
            summary = {n: report.nested(estimate(o)) for n, o in measures.items()}
        else:
            summary = protocols[name].summarize(measures, estimate)
        summaries[name] = summary
    return summaries


def _write(results: Summary, protocols: Mapping[str, Protocol], workdir: Path) -> None:
    """Writes ``verify.json``, ``table.md`` and ``figures/``."""
    text = json.dumps(results, indent=1, allow_nan=False)
    write_text(workdir / "verify.json", text + "\n")
    parts = [_heading(results)]
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    with figures.style():
        for name, protocol in protocols.items():
            parts += protocol.tables(results[name], results["images"][name])
            for stem, figure in protocol.figures(results[name]):
                for suffix in ("png", "pdf"):
                    figure.savefig(folder / f"{stem}.{suffix}")
    write_text(workdir / "table.md", "\n\n".join(parts) + "\n")


def _heading(results: Summary) -> str:
    machine = results["machine"]
    text = f"`{results['command']}`. Mean over images ± half the 95 % interval of the "
    text += "bootstrap; margins are paired by image. "
    text += f"{machine['cpus']} CPU cores, device {machine['device']}."
    if "whole" in results:
        text += " Left alone, the model has a top-1 of "
        text += f"{report.number(results['whole']['top1'], 'top1')} %."
    return text
