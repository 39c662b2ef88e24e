"""The task ``explain``: images to data, figures and pages, a batch at a time."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import ml_collections
import numpy as np
import tqdm

from wf_vit.errors import UsageError
from wf_vit.explanation import draw, images, summary
from wf_vit.explanation.explanation import (
    DATA,
    IMAGES,
    Explanation,
    check_indicators,
    explain_batch,
)
from wf_vit.grid import Grid
from wf_vit.models import pretrained
from wf_vit.models.pretrained.preprocess import Preprocess
from wf_vit.workdir import claim_workdir, prepare_workdir, replacing

_LOG = logging.getLogger(__name__)

# Keys that change no number, and may differ from one call to the next.
_FREE = ("batch_size", "figures", "page")


def explain(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Explains images, going on where an earlier call was interrupted.

    An image is done when its files are there; to do one again, delete its folder.

    Args:
      config: that of ``configs/explain.py``, where its keys are documented.
      workdir: receives ``config.json``; for each image ``images/NAME/`` with
        ``data.npz``, ``figures/`` and ``page.html``; and over all images
        ``table.csv``, ``statistics.json`` and ``figures/``. Its ``README.md`` says
        what the arrays and columns are.

    Raises:
      UsageError: the config cannot work; the results there are another config's; or,
        when all the others are done, some images could not be read.
    """
    # On a command line "mean,knockout" is one name.
    indicators = [n.strip() for name in config.indicators for n in name.split(",")]
    layers = tuple(config.layers) or None
    check_indicators(indicators, layers)
    _check(config)
    sources = images.find(config.images, leave_out=workdir)
    prepare_workdir(workdir)
    loaded = pretrained.load(config.weights, image_size=config.image_size)
    _LOG.info("%d images; %s", len(sources), _describe(config.weights, loaded))
    _check_patch(config.patch, loaded.model.grid)
    claim_workdir(
        workdir,
        json.loads(config.to_json_best_effort()),
        loaded.params,
        results=workdir / IMAGES,
        free=_FREE,
    )
    measure_batch = partial(
        explain_batch,
        loaded,
        indicators=indicators,
        target=config.target,
        num_probes=config.num_probes,
        layers=layers,
        heads=config.heads,
        mass=config.mass,
    )
    broken = _explain_all(sources, workdir, loaded, config, measure_batch)
    done = [source.name for source in sources if source.path not in broken]
    if done:
        notes = {"indicator": indicators[-1], "mass": config.mass}
        summary.write(workdir, done, notes)
        _LOG.info("Wrote %s.", workdir)
    if broken:
        listing = "\n  ".join(f"{path}: {reason}" for path, reason in broken.items())
        raise UsageError(
            f"{len(broken)} of {len(sources)} images could not be read, and are left "
            f"out of {workdir}: replace or remove them.\n  {listing}"
        )


def _explain_all(
    sources: Sequence[images.Source],
    workdir: Path,
    loaded: pretrained.Pretrained,
    config: ml_collections.ConfigDict,
    measure_batch: Callable[..., list[Explanation]],
) -> dict[Path, str]:
    """Measures and draws what is missing; returns why some files are unreadable."""
    folder, model = workdir / IMAGES, _describe(config.weights, loaded)
    # Batches of one size, for which the model is compiled; the last is filled up.
    size = -(-len(sources) // -(-len(sources) // config.batch_size))
    key = jax.random.key(config.seed)
    broken = {}
    with tqdm.tqdm(total=len(sources), unit=" images", disable=None) as bar:
        for start in range(0, len(sources), size):
            batch = sources[start : start + size]
            fresh, unreadable = _measure_missing(
                batch,
                size,
                folder,
                loaded.preprocess,
                partial(measure_batch, key=jax.random.fold_in(key, start)),
            )
            for source in batch:
                if source.path not in unreadable:
                    _draw_missing(source.name, fresh, folder, config, model)
            broken |= unreadable
            bar.update(len(batch))
            end, count = start + len(batch), len(sources)
            # Without a terminal, a line for each per cent.
            if bar.disable and 100 * end // count > 100 * start // count:
                _LOG.info("%d of %d images", end, count)
    return broken


def _check(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError for values that nothing after it would explain."""
    if not config.weights or not config.images:
        raise UsageError(
            f"config.weights is {config.weights!r} and config.images "
            f"{config.images!r}: pass a checkpoint and a photograph or a folder, as "
            "--config.weights=CHECKPOINT --config.images=photo.jpg."
        )
    if config.batch_size < 1:
        raise UsageError(
            f"config.batch_size is {config.batch_size}, expected at least 1."
        )


def _check_patch(patch: int, grid: Grid) -> None:
    """Raises UsageError unless the grid has the patch, or it is -1."""
    if not -1 <= patch < grid[0] * grid[1]:
        raise UsageError(
            f"config.patch is {patch}, but there are {grid[0]} x {grid[1]} patches: "
            f"expected 0 to {grid[0] * grid[1] - 1}, row by row, or -1 for the most "
            "telling ones."
        )


def _describe(weights: str, loaded: pretrained.Pretrained) -> str:
    model = loaded.model
    return (
        f"{Path(weights).name}: {model.depth} layers, {model.num_heads} heads, "
        f"{model.grid[0]} x {model.grid[1]} patches of an image of "
        f"{model.image_size[0]} x {model.image_size[1]} pixels"
    )


def _measure_missing(
    batch: Sequence[images.Source],
    size: int,
    folder: Path,
    preprocess: Preprocess,
    measure_batch: Callable[..., list[Explanation]],
) -> tuple[dict[str, Explanation], dict[Path, str]]:
    """Measures the images of a batch that are not done, and writes their data.

    An image's numbers depend on its place in the batch, but not on which others are
    done already: their places are left empty.

    Returns:
      The new explanations by name, and why some files are unreadable.
    """
    photographs = np.zeros((size, *preprocess.image_size, 3), np.uint8)
    places, unreadable = {}, {}
    for place, (name, path) in enumerate(batch):
        if (folder / name / DATA).exists():
            continue
        try:
            photographs[place] = preprocess.fit(images.read(path))
            places[name] = place
        except images.UnreadableImageError as error:
            unreadable[path] = str(error)
    if not places:
        return {}, unreadable
    explanations = measure_batch(photographs)
    fresh = {name: explanations[place] for name, place in places.items()}
    for name, explanation in fresh.items():
        explanation.save(folder / name)
    return fresh, unreadable


def _draw_missing(
    name: str,
    fresh: Mapping[str, Explanation],
    folder: Path,
    config: ml_collections.ConfigDict,
    model: str,
) -> None:
    """Draws the figures and the page of an image, unless they are there or unwanted."""
    own = folder / name
    wanted = {draw.FIGURES: config.figures, draw.PAGE: config.page}
    missing = {part for part in wanted if wanted[part] and not (own / part).exists()}
    if not missing:
        return
    explanation = fresh[name] if name in fresh else Explanation.load(own)
    if draw.FIGURES in missing:
        patch = None if config.patch == -1 else config.patch
        with replacing(own / draw.FIGURES) as partial_folder:
            draw.save_figures(draw.image_drawings(explanation, patch), partial_folder)
    if draw.PAGE in missing:
        draw.save_page(
            explanation, own / draw.PAGE, mass=config.mass, title=name, model=model
        )
