r"""Do learned fields follow the image? Their overlap with the fields of a teacher.

    python -m benchmarks.field_overlap --data=cifar10.npz --teacher=RUN/vit \
        --students=RUN/winft,RUN/winft_guided --output=results/windowfree/field_overlap

On test images, which no model was trained on. A patch's field is the share --area of
the grid that it values most: by the teacher's attention, mean over heads, and by the
student's membership, likewise. Their overlap is the intersection over the union, mean
over layers and patches. The controls are fields of the same area: random, the nearest
patches, and the student's own fields on the image before. What the fields have of the
image is what they overlap beyond the last, which have all the rest: position, layer
and size. Intervals are half the 95 % interval of the mean over images, of one run each.

Prints the table and writes OUTPUT.json and OUTPUT.md. Takes a minute on two cores.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jaxtyping import Array, Bool, Float, UInt8

from benchmarks import packed
from wf_vit import grid, indicators
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained import Pretrained
from wf_vit.models.windowfree import WindowFreeViT
from wf_vit.shapes import Images

Masks = Bool[Array, "L B P P"]


def largest(score: Float[Array, "*batch P P"], count: int) -> Bool[Array, "*batch P P"]:
    """Returns the ``count`` best keys of every query."""
    _, keys = jax.lax.top_k(score, count)
    return jax.nn.one_hot(keys, score.shape[-1], dtype=bool).any(-2)


def overlap(one: Masks, other: Masks) -> Float[Array, " B"]:
    """Returns the intersection over the union, mean over layers and patches."""
    both = (one & other).sum(-1) / (one | other).sum(-1)
    return both.mean((0, 2))


@partial(jax.jit, static_argnames=("model", "count"))
def attended(params, images: Images, *, model, count: int) -> Masks:
    """Returns the fields of a model by its attention, mean over heads."""
    _, out = model.apply({"params": params}, images, record=True)
    attention = jnp.stack([record["attention"] for record in out["records"].values()])
    mean = indicators.interaction_indicator(
        attention, method="mean", num_prefix_tokens=model.num_prefix_tokens
    )
    return largest(mean, count)


@partial(jax.jit, static_argnames=("model", "count"))
def learned(params, images: Images, *, model, count: int) -> Masks:
    """Returns the fields of a window-free transformer by its membership."""
    _, out = model.apply({"params": params}, images)
    membership = [jnp.exp(f.log_membership()).mean(1) for f in out["fields"].values()]
    return largest(jnp.stack(membership), count)


def measure(
    student: Pretrained,
    teacher: Pretrained,
    images: UInt8[np.ndarray, "B height width 3"],
    *,
    area: float,
    batch_size: int,
) -> dict[str, Float[np.ndarray, " B"]]:
    """Returns each overlap with the teacher's fields, image by image.

    Raises:
      UsageError: models that cannot be compared, or images that do not fill batches.
    """
    if batch_size < 2 or not len(images) or len(images) % batch_size:
        raise UsageError(
            f"{len(images)} images do not fill batches of {batch_size}: set --images "
            "and --batch_size, of at least 2."
        )
    if not isinstance(student.model, WindowFreeViT):
        raise UsageError("--students names a model without learned fields.")
    models = (student.model, teacher.model)
    if len({(model.depth, model.grid) for model in models}) > 1:
        sizes = " and ".join(f"{m.depth} layers on {m.grid}" for m in models)
        raise UsageError(f"Student and teacher differ, {sizes}: they must be alike.")
    shape = student.model.grid
    patches = shape[0] * shape[1]
    count = round(area * patches)
    size = (student.model.depth, batch_size, patches, patches)
    near = jnp.broadcast_to(-grid.distances(shape), size)
    overlaps = []
    for place, start in enumerate(range(0, len(images), batch_size)):
        batch = images[start : start + batch_size]
        taught, own = (
            fields(run.params, run.preprocess(batch), model=run.model, count=count)
            for fields, run in ((attended, teacher), (learned, student))
        )
        noise = jax.random.uniform(jax.random.key(place), size)
        candidates = {
            "learned fields": own,
            "of the image before": jnp.roll(own, 1, axis=1),
            "nearest": largest(near, count),
            "random": largest(noise, count),
        }
        overlaps.append({n: overlap(taught, m) for n, m in candidates.items()})
    joined = {n: np.concatenate([o[n] for o in overlaps]) for n in overlaps[0]}
    joined["beyond the image before"] = (
        joined["learned fields"] - joined["of the image before"]
    )
    return joined


def summarize(values: np.ndarray) -> dict[str, float]:
    """Returns the mean over images and half its 95 % interval."""
    error = values.std(ddof=1) / len(values) ** 0.5
    return {"mean": float(values.mean()), "interval": float(1.96 * error)}


def table(results: dict) -> str:
    """Returns the results as Markdown."""
    students = results["overlap"]
    names = list(next(iter(students.values())))
    lines = [
        f"Overlap (intersection over union) with the fields of the teacher on "
        f"{results['images']} test images, each {100 * results['area']:.0f} % of the "
        f"grid; ± half the 95 % interval over images.\n",
        f"| student | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for student, values in students.items():
        cells = [f"{v['mean']:.3f} ± {v['interval']:.3f}" for v in values.values()]
        lines.append(f"| {student} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> None:
    """Measures, prints and writes."""
    del argv
    logging.set_verbosity(logging.ERROR)
    splits, _ = packed.load(Path(_DATA.value))
    images = splits["test"].images[: _IMAGES.value]
    overlaps = {}
    for path in _STUDENTS.value:
        student = pretrained.load(path)
        size = student.model.image_size
        teacher = pretrained.load(_TEACHER.value, image_size=size)
        measured = measure(
            student, teacher, images, area=_AREA.value, batch_size=_BATCH.value
        )
        overlaps[path] = {n: summarize(v) for n, v in measured.items()}
    results = {
        "images": len(images),
        "area": _AREA.value,
        "teacher": _TEACHER.value,
        "overlap": overlaps,
    }
    print(table(results))
    if _OUTPUT.value:
        output = Path(_OUTPUT.value)
        output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        output.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    _DATA = flags.DEFINE_string("data", "cifar10.npz", "From benchmarks.packed.")
    _TEACHER = flags.DEFINE_string(
        "teacher", None, "Any ViT's checkpoint.", required=True
    )
    _STUDENTS = flags.DEFINE_list(
        "students", None, "Run folders of WinfTs.", required=True
    )
    _OUTPUT = flags.DEFINE_string("output", None, "Files to write, without suffix.")
    _AREA = flags.DEFINE_float("area", 0.25, "Share of the grid that is a field.")
    _IMAGES = flags.DEFINE_integer("images", 1000, "Test images.")
    _BATCH = flags.DEFINE_integer("batch_size", 100, "Images at once.")
    app.run(main)
