"""The task ``explain``: images to data, figures and pages, a batch at a time."""

import dataclasses
import functools
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from wf_vit.errors import UsageError
from wf_vit.explanation import draw, gallery, images, progress, summary
from wf_vit.explanation.explanation import (
    DATA,
    IMAGES,
    Explanation,
    grid_of,
    source_of,
)
from wf_vit.explanation.measuring import Settings, explain_batch
from wf_vit.grid import Grid
from wf_vit.models import pretrained
from wf_vit.models.pretrained import Pretrained
from wf_vit.models.pretrained.readers import name_of
from wf_vit.settings import opening
from wf_vit.workdir import (
    claim_workdir,
    held,
    read_json_if_whole,
    replacing,
    write_text,
)

_LOG = logging.getLogger(__name__)

# Keys that change no number, and may differ from one call to the next.
_FREE = ("batch_size", "figures", "images", "page", "page_bytes", "patch", "pdf")
# Those of them that change what is drawn.
_DRAWN = {"patch": draw.FIGURES, "page_bytes": draw.PAGE}

Size = tuple[int, int]


def explain(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Explains images, going on where an earlier call was interrupted.

    An image is done when its files are there; to do one again, delete its folder. Other
    images may be added by a later call.

    Args:
      config: that of ``configs/explain.py``, where its keys are documented.
      workdir: receives ``config.json``; for each image ``images/NAME/`` with
        ``data.npz``, ``figures/`` and ``page.html``; and over all images
        ``index.html``, ``table.csv``, ``statistics.json`` and ``figures/``. Its
        ``README.md`` says what the arrays and columns are.

    Raises:
      UsageError: the config cannot work; the results there are another config's; or,
        when all the others are done, some images could not be read.
    """
    settings = _settings(config)
    sources = images.find(config.images, leave_out=workdir)
    with held(workdir):
        _explain(sources, config, settings, workdir)


def _explain(
    sources: Sequence[images.Source],
    config: ml_collections.ConfigDict,
    settings: Settings,
    workdir: Path,
) -> None:
    """Explains images, in a working directory that is this call's own."""
    loaded = pretrained.load(config.weights, **opening(config))
    folder = workdir / IMAGES
    sources = _known(sources, folder)
    sizes, broken = _sizes(sources, loaded, config, folder)
    _check_patch(config.patch, loaded, set(sizes.values()), folder)
    earlier = read_json_if_whole(workdir / "config.json")
    claim_workdir(
        workdir,
        json.loads(config.to_json_best_effort()),
        loaded.params,
        results=folder,
        free=_FREE,
    )
    _forget(earlier, config, folder)
    broken |= _explain_all(sizes, loaded, config, settings, folder)
    done = [s.name for s in sources if s.path not in broken]
    if done:
        notes = {"indicator": settings.indicators[-1], "mass": config.mass}
        everything = _measured(folder)
        summary.write(workdir, everything, notes, pdf=config.pdf)
        gallery.write(workdir, everything, _describe(config.weights, loaded))
        _LOG.info("Wrote %s.", workdir / gallery.INDEX)
    if broken:
        listing = "\n  ".join(f"{path}: {reason}" for path, reason in broken.items())
        raise UsageError(
            f"{len(broken)} of {len(sources)} images could not be read, and are left "
            f"out of {workdir}: replace or remove them.\n  {listing}"
        )


def _settings(config: ml_collections.ConfigDict) -> Settings:
    """Returns what is measured; raises UsageError for values that cannot work."""
    # On a command line "mean,knockout" is one name.
    names = [n.strip() for name in config.indicators for n in name.split(",")]
    settings = Settings(
        indicators=tuple(names),
        target=config.target,
        num_probes=config.num_probes,
        layers=tuple(config.layers) or None,
        heads=config.heads,
        mass=config.mass,
        removal=config.removal,
    )
    if not config.weights or not config.images:
        raise UsageError(
            f"config.weights is {config.weights!r} and config.images "
            f"{config.images!r}: pass a checkpoint and a photograph or a folder, as "
            "--config.weights=CHECKPOINT --config.images=photo.jpg."
        )
    return settings


def _measured(folder: Path) -> list[str]:
    """Returns the names of all images that are measured, also by earlier calls."""
    return sorted(str(file.parent.relative_to(folder)) for file in folder.rglob(DATA))


def _known(sources: Sequence[images.Source], folder: Path) -> list[images.Source]:
    """Returns images under the names that they were measured under, if they were.

    The names of an earlier call may be relative to another folder.
    """
    names = {source.name for source in sources}
    others = [name for name in _measured(folder) if name not in names]
    earlier = {source_of(folder / name): name for name in others}

    def known(source: images.Source) -> images.Source:
        if not earlier or (folder / source.name / DATA).exists():
            return source
        try:
            digest = images.digest(source.path)
        except images.UnreadableImageError:
            return source
        return source._replace(name=earlier.pop(digest, source.name))

    return [known(source) for source in sources]


def _forget(
    earlier: dict[str, Any], config: ml_collections.ConfigDict, folder: Path
) -> None:
    """Removes what an earlier call drew otherwise, so that it is drawn again."""
    changed = [_DRAWN[k] for k in _DRAWN if k in earlier and earlier[k] != config[k]]
    for name, drawn in itertools.product(_measured(folder), changed):
        path = folder / name / drawn
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sizes(
    sources: Sequence[images.Source],
    loaded: Pretrained,
    config: ml_collections.ConfigDict,
    folder: Path,
) -> tuple[dict[images.Source, Size], dict[Path, str]]:
    """Returns the size at which each image is seen, and why some are unreadable.

    Raises:
      UsageError: the folder holds another image of the same name.
    """
    sizes, broken = {}, {}
    model = loaded.model
    for source in sources:
        try:
            photograph = images.size(source.path)
            if (folder / source.name / DATA).exists():
                _check_same(source, folder / source.name)
        except images.UnreadableImageError as error:
            broken[source.path] = str(error)
            continue
        sizes[source] = images.seen_size(
            photograph,
            model.image_size,
            model.patch_size,
            tuple(config.image_size),
            config.fit,
        )
    return sizes, broken


def _check_same(source: images.Source, folder: Path) -> None:
    if source_of(folder) not in ("", images.digest(source.path)):
        raise UsageError(
            f"{folder} explains another image than {source.path}, which has the same "
            "name: rename the image, remove that folder, or pass another --workdir."
        )


def _explain_all(
    sizes: dict[images.Source, Size],
    loaded: Pretrained,
    config: ml_collections.ConfigDict,
    settings: Settings,
    folder: Path,
) -> dict[Path, str]:
    """Measures and draws what is missing; returns why some files are unreadable."""

    @functools.lru_cache(maxsize=1)
    def seeing(size: Size) -> Pretrained:
        """Returns the model for images of a size."""
        return loaded.resized(size)

    def missing(source: images.Source) -> bool:
        return not (folder / source.name / DATA).exists()

    broken: dict[Path, str] = {}
    todo = sorted(filter(missing, sizes), key=lambda s: (sizes[s], s))
    seconds = _announce(len(sizes), todo, sizes, seeing, settings)
    bar = progress.Progress(len(todo), seconds)
    for size, same in itertools.groupby(todo, key=sizes.__getitem__):
        group = list(same)
        for start in range(0, len(group), config.batch_size):
            batch = group[start : start + config.batch_size]
            with bar.images(len(batch)):
                broken |= _measure(batch, seeing(size), config, settings, folder)
                _draw_missing([s.name for s in batch], loaded, config, folder)
    bar.close()
    # What was measured before, but not drawn.
    _draw_missing(_measured(folder), loaded, config, folder)
    return broken


def _announce(
    count: int,
    todo: Sequence[images.Source],
    sizes: dict[images.Source, Size],
    seeing: Callable[[Size], Pretrained],
    settings: Settings,
) -> float:
    """Says what is to be done and what it costs; returns the seconds for an image."""
    if not todo:
        _LOG.info("All %d images are measured.", count)
        return 0.0
    largest = max((sizes[source] for source in todo), key=lambda s: s[0] * s[1])
    model = seeing(largest).model
    passes = progress.passes(
        settings.num_probes,
        propagated="propagated" in settings.indicators,
        of_class=settings.of_class,
        removal=settings.removal,
    )
    seconds, words = progress.expected(model, passes)
    _LOG.info(
        "%d of %d images to measure, %d layers, %d heads, up to %d x %d patches: %s.",
        len(todo),
        count,
        model.depth,
        model.num_heads,
        *model.grid,
        words,
    )
    return seconds


def _check_patch(
    patch: int, loaded: Pretrained, sizes: set[Size], folder: Path
) -> None:
    """Raises UsageError unless every grid has the patch, or it is -1."""
    if patch == -1:
        return
    rows, columns = loaded.model.patch_size
    grids: set[Grid] = {(height // rows, width // columns) for height, width in sizes}
    for grid in grids | {grid_of(folder / name) for name in _measured(folder)}:
        if not -1 <= patch < grid[0] * grid[1]:
            raise UsageError(
                f"config.patch is {patch}, but there are {grid[0]} x {grid[1]} "
                f"patches: expected 0 to {grid[0] * grid[1] - 1}, row by row, or -1 "
                "for the most telling ones."
            )


def _describe(weights: str, loaded: Pretrained) -> str:
    model = loaded.model
    return f"{name_of(weights)}: {model.depth} layers, {model.num_heads} heads"


def _measure(
    batch: Sequence[images.Source],
    loaded: Pretrained,
    config: ml_collections.ConfigDict,
    settings: Settings,
    folder: Path,
) -> dict[Path, str]:
    """Measures a batch and writes its data; returns why some files are unreadable.

    An image's numbers depend on the seed and on its own file only.
    """
    photographs, read, unreadable = [], {}, {}
    for source in batch:
        try:
            read[source] = images.digest(source.path)
            photograph = images.read(source.path)
        except images.UnreadableImageError as error:
            read.pop(source, None)
            unreadable[source.path] = str(error)
            continue
        photographs.append(images.fitted(photograph, loaded.preprocess, config.fit))
    if not read:
        return unreadable
    # The model is compiled for batches of one size: the last one is filled up.
    fill = [np.zeros_like(photographs[0])] * (config.batch_size - len(photographs))
    seeds = [int(digest[:8], 16) for digest in read.values()] + [0] * len(fill)
    key = jax.random.key(config.seed)
    explanations = explain_batch(
        loaded,
        np.stack([*photographs, *fill]),
        settings,
        jax.vmap(functools.partial(jax.random.fold_in, key))(np.uint32(seeds)),
    )
    called = name_of(config.weights)
    for (source, digest), explanation in zip(read.items(), explanations, strict=False):
        explanation = dataclasses.replace(explanation, model=called)
        explanation.save_data(folder / source.name, source=digest)
    return unreadable


def _draw_missing(
    names: Iterable[str],
    loaded: Pretrained,
    config: ml_collections.ConfigDict,
    folder: Path,
) -> None:
    """Draws the figures and pages of images, unless they are there or unwanted."""
    wanted = {draw.FIGURES: config.figures, draw.PAGE: config.page}
    model = name_of(config.weights)
    for name in names:
        own = folder / name
        drawn = own / draw.FIGURES
        if config.figures and config.pdf and not any(drawn.glob("*.pdf")):
            shutil.rmtree(drawn, ignore_errors=True)  # Drawn without; once more.
        missing = {p for p in wanted if wanted[p] and not (own / p).exists()}
        if not missing or not (own / DATA).exists():
            continue
        # From the file, so that a call that was interrupted draws the same.
        explanation = Explanation.load(own)
        if draw.FIGURES in missing:
            patch = None if config.patch == -1 else config.patch
            drawings = draw.image_drawings(explanation, patch=patch, model=model)
            with replacing(drawn) as partial_folder:
                draw.save_figures(drawings, partial_folder, pdf=config.pdf)
        if draw.PAGE in missing:
            html = draw.page_html(
                explanation,
                mass=config.mass,
                title=name,
                model=_describe(config.weights, loaded),
                max_bytes=config.page_bytes,
            )
            write_text(own / draw.PAGE, html)
