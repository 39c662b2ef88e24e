r"""Evaluates trained runs on images that are larger than those they were trained on.

    python -m benchmarks.resolution --data=cifar10.npz --output=results/resolution \
        --runs=runs/vit,runs/winft

Nothing is trained again. The images of the test set are enlarged as each run prepares
its images for an evaluation; position tables and fields follow the grid
(``models.windowfree.FieldViT``). Beside that, fields are left as many patches wide as
they are. DATA comes from ``python -m benchmarks.sweep``. Writes OUTPUT.json and
OUTPUT.md.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Int, UInt8

from benchmarks import sweep
from wf_vit.grid import Grid
from wf_vit.models import pretrained
from wf_vit.models.pretrained import Pretrained
from wf_vit.models.windowfree import FieldViT
from wf_vit.workdir import replacing

FACTORS = (1.0, 1.5, 2.0)
SCALED, LEFT = "scaled with the grid", "left as they are, in patches"
BATCH_SIZE = 250


def models(loaded: Pretrained, grid: Grid) -> Iterator[tuple[str, Pretrained]]:
    """Yields a model for another grid of patches, with each kind of fields."""
    height, width = loaded.model.patch_size
    resized = loaded.resized((grid[0] * height, grid[1] * width))
    if not isinstance(resized.model, FieldViT):
        yield "", resized
        return
    yield SCALED, resized
    left = resized.model.clone(trained_patches=None)
    yield LEFT, Pretrained(left, resized.params, resized.preprocess)


def top1(
    loaded: Pretrained,
    images: UInt8[np.ndarray, "B height width 3"],
    labels: Int[np.ndarray, " B"],
) -> float:
    """Returns the share of the images that are answered correctly."""
    model = loaded.model
    classify = jax.jit(lambda params, x: model.apply({"params": params}, x)[0])
    right = 0
    for start in range(0, len(labels), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        prepared = jnp.asarray(loaded.preprocess(list(images[part])))
        answers = np.asarray(classify(loaded.params, prepared)).argmax(-1)
        right += int((answers == labels[part]).sum())
    return right / len(labels)


def evaluate(
    runs: Sequence[str], split: sweep.Split, factors: Sequence[float] = FACTORS
) -> list[dict[str, Any]]:
    """Returns a row for each run and kind of fields: top-1 by factor of the size."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for run in runs:
        trained = pretrained.load(run)
        height, width = trained.model.grid
        for factor in factors:
            grid = round(factor * height), round(factor * width)
            for fields, loaded in models(trained, grid):
                found = rows.setdefault((run, fields), {})
                found[f"{factor:g}"] = top1(loaded, *split)
    return [
        {"run": run, "fields": fields, "top1": found}
        for (run, fields), found in rows.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    factors = list(rows[0]["top1"])
    head = ["test top-1, %; size of the images", *(f"{f} x" for f in factors)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        name = row["run"] + (f", fields {row['fields']}" if row["fields"] else "")
        numbers = [f"{100 * row['top1'][factor]:.1f}" for factor in factors]
        lines.append("| " + " | ".join([name, *numbers]) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Evaluates the runs, and writes what was found."""
    del argv
    flag = flags.FLAGS
    splits, _ = sweep.load(Path(flag.data))
    test = sweep.Split(*(array[: flag.test_images or None] for array in splits["test"]))
    rows = evaluate(flag.runs, test)
    text = table(rows)
    print(text)
    results = {
        "command": " ".join(["python -m benchmarks.resolution", *sys.argv[1:]]),
        "images": len(test.labels),
        "rows": rows,
    }
    output = Path(flag.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(results, indent=2)), (".md", text)):
        with replacing(output.with_suffix(suffix)) as partial:
            partial.write_text(content)


if __name__ == "__main__":
    flags.DEFINE_string("data", "cifar10.npz", "From benchmarks.sweep.")
    flags.DEFINE_list("runs", None, "Folders of runs.", required=True)
    flags.DEFINE_integer("test_images", 0, "Use the first so many; 0: all.")
    flags.DEFINE_string("output", None, "File without suffix.", required=True)
    app.run(main)
