r"""Do learned fields follow the image? Their overlap with the fields of a teacher.

    python -m benchmarks.field_overlap --data=cifar10.npz --teacher=RUN/vit \
        --students=RUN/winft,RUN/winft_guided --output=results/windowfree/field_overlap

On test images, which no model was trained on. A patch's field is the share --area of
the grid that it values most: by the teacher's attention, and by the student's
membership; both mean over heads, or, with --per_head, each head's against that of the
same index. Without --teacher each student is compared with its own attention, which its
fields are a part of. Their overlap is the intersection over the union, mean over
layers, heads and patches. The controls are fields of the same area: random, the nearest
patches, and the student's own fields on the image before. What the fields have of the
image is what they overlap beyond the last, which have all the rest: position, layer and
size.

With --objects it is also measured which share of the fields of an object's patches lies
on the object. An object is where the first principal component of the teacher's patch
features over all images is above its mean, which is how DINOv2 (arXiv 2304.07193)
tells objects from backgrounds; its sign is such that borders are background.

Intervals are half the 95 % interval of the mean over images, of one run each. Prints
the tables and writes OUTPUT.json and OUTPUT.md. Takes a minute on two cores.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jaxtyping import Array, Bool, Float, UInt8

from benchmarks import sweep
from wf_vit import grid as geometry
from wf_vit import indicators
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained import Pretrained
from wf_vit.models.windowfree import WindowFreeViT
from wf_vit.shapes import Images

Masks = Bool[Array, "L B H P P"]
Measured = dict[str, Float[np.ndarray, "L B"]]

OWN, BEFORE, BEYOND = "learned fields", "of the image before", "beyond that image"
TAUGHT = "teacher's"


def largest(score: Float[Array, "*batch P P"], count: int) -> Bool[Array, "*batch P P"]:
    """Returns the ``count`` best keys of every query."""
    _, keys = jax.lax.top_k(score, count)
    return jax.nn.one_hot(keys, score.shape[-1], dtype=bool).any(-2)


def overlap(one: Masks, other: Masks) -> Float[Array, "L B"]:
    """Returns the intersection over the union, mean over heads and patches."""
    both = (one & other).sum(-1) / (one | other).sum(-1)
    return both.mean((2, 3))


def share_on(objects: Bool[np.ndarray, "B P"], masks: Masks) -> Float[Array, "L B"]:
    """Returns which share of an object's patches' fields lies on it; nan without one.

    The mean over heads and the object's patches.
    """
    hit = jnp.einsum("lbhpq,bq->lbhp", masks.astype(jnp.float32), objects)
    share = (hit / masks.sum(-1)).mean(2)
    return jnp.einsum("lbp,bp->lb", share, objects) / objects.sum(-1)[None]


def objects_in(
    features: Float[np.ndarray, "B P D"], grid: geometry.Grid
) -> Bool[np.ndarray, "B P"]:
    """Returns where the first principal component of all patches tells an object."""
    centred = features - features.mean((0, 1))
    flat = centred.reshape(-1, centred.shape[-1])
    _, directions = np.linalg.eigh(flat.T @ flat)
    component = centred @ directions[:, -1]
    inner = np.zeros(grid, bool)
    inner[1:-1, 1:-1] = True
    inner = inner.ravel()
    outward = component[:, inner].mean() < component[:, ~inner].mean()
    return (-component if outward else component) > 0


@partial(jax.jit, static_argnames=("model", "count", "per_head"))
def attended(
    params, images: Images, *, model, count: int, per_head: bool
) -> tuple[Masks, Float[Array, "B P D"]]:
    """Returns the fields of a model by its attention, and its patch features."""
    _, out = model.apply({"params": params}, images, record=True)
    attention = jnp.stack([record["attention"] for record in out["records"].values()])
    prefix = model.num_prefix_tokens
    impact = indicators.interaction_indicator(
        attention, method="mean", num_prefix_tokens=prefix, per_head=per_head
    )
    heads = impact if per_head else impact[:, :, None]
    return largest(heads, count), out["tokens"][:, prefix:]


@partial(jax.jit, static_argnames=("model", "count", "per_head"))
def learned(params, images: Images, *, model, count: int, per_head: bool) -> Masks:
    """Returns the fields of a window-free transformer by its membership."""
    _, out = model.apply({"params": params}, images)
    heads = [jnp.exp(fields.log_membership()) for fields in out["fields"].values()]
    heads = jnp.stack(heads)
    return largest(heads if per_head else heads.mean(2, keepdims=True), count)


def measure(
    student: Pretrained,
    teacher: Pretrained,
    images: UInt8[np.ndarray, "B height width 3"],
    *,
    area: float,
    batch_size: int,
    per_head: bool = False,
) -> tuple[Measured, Measured]:
    """Returns each overlap with the teacher's fields, and each share on the object.

    Raises:
      UsageError: models that cannot be compared, or images that do not fill batches.
    """
    if batch_size < 2 or not len(images) or len(images) % batch_size:
        raise UsageError(
            f"{len(images)} images do not fill batches of {batch_size}: set "
            "--test_images and --batch_size, of at least 2."
        )
    if not isinstance(student.model, WindowFreeViT):
        raise UsageError("--students names a model without learned fields.")
    models = (student.model, teacher.model)
    if len({(model.depth, model.grid) for model in models}) > 1:
        sizes = " and ".join(f"{m.depth} layers on {m.grid}" for m in models)
        raise UsageError(f"Student and teacher differ, {sizes}: they must be alike.")
    if per_head and len({model.num_heads for model in models}) > 1:
        counts = " and ".join(str(model.num_heads) for model in models)
        raise UsageError(
            f"Student and teacher have {counts} heads: leave out --per_head."
        )
    shape = student.model.grid
    patches = shape[0] * shape[1]
    options = {"count": round(area * patches), "per_head": per_head}
    batches = images.reshape(-1, batch_size, *images.shape[1:])

    def look(fields, run):
        def apply(batch):
            return fields(run.params, run.preprocess(batch), model=run.model, **options)

        return [jax.device_get(apply(batch)) for batch in batches]

    taught, features = zip(*look(attended, teacher), strict=True)
    objects = objects_in(np.concatenate(features), shape)
    objects = objects.reshape(len(batches), batch_size, patches)
    overlaps, shares = [], []
    for place, own in enumerate(look(learned, student)):
        near = jnp.broadcast_to(-geometry.distances(shape), own.shape)
        noise = jax.random.uniform(jax.random.key(place), own.shape)
        candidates = {
            OWN: own,
            BEFORE: jnp.roll(own, 1, axis=1),
            "nearest": largest(near, options["count"]),
            "random": largest(noise, options["count"]),
        }
        overlaps.append({n: overlap(taught[place], m) for n, m in candidates.items()})
        candidates[TAUGHT] = taught[place]
        shares.append({n: share_on(objects[place], m) for n, m in candidates.items()})
    return _joined(overlaps), _joined(shares)


def _joined(batches: list[dict[str, Float[Array, "L B"]]]) -> Measured:
    """Returns the batches as one, and what is beyond the image before."""
    whole = {n: np.concatenate([b[n] for b in batches], axis=1) for n in batches[0]}
    return {**whole, BEYOND: whole[OWN] - whole[BEFORE]}


def summarize(values: Float[np.ndarray, "L B"]) -> dict[str, float | list[float]]:
    """Returns the mean over images, half its 95 % interval, and the mean by layer.

    Images without a value, nan, are left out.
    """
    values = values[:, ~np.isnan(values).any(0)]
    mean = values.mean(0)
    error = mean.std(ddof=1) / len(mean) ** 0.5
    return {
        "mean": float(mean.mean()),
        "interval": float(1.96 * error),
        "layers": [round(float(layer), 4) for layer in values.mean(1)],
    }


def table(results: dict) -> str:
    """Returns the results as Markdown."""
    area = f"{100 * results['area']:.0f} % of the grid"
    heads = "head by head" if results["per_head"] else "mean over heads"
    lines = [
        f"On {results['images']} test images; a field is the {area} that a patch "
        f"values most, {heads}; ± half the 95 % interval over images.",
    ]
    titles = {
        "overlap": "Overlap (intersection over union) with the fields of the teacher",
        "objects": "Share of the fields of an object's patches that lies on the object",
    }
    for key, title in titles.items():
        if key not in results:
            continue
        students = results[key]
        names = list(next(iter(students.values())))
        lines += ["", f"## {title}", "", f"| student | {' | '.join(names)} |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for student, values in students.items():
            cells = [f"{v['mean']:.3f} ± {v['interval']:.3f}" for v in values.values()]
            lines.append(f"| {student} | {' | '.join(cells)} |")
        depth = max(len(v[BEYOND]["layers"]) for v in students.values())
        layers = " | ".join(str(layer) for layer in range(depth))
        lines += ["", f"| {BEYOND}, by layer | {layers} |", "|---" * (depth + 1) + "|"]
        for student, values in students.items():
            cells = [f"{mean:.3f}" for mean in values[BEYOND]["layers"]]
            lines.append(f"| {student} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> None:
    """Measures, prints and writes."""
    del argv
    logging.set_verbosity(logging.ERROR)
    splits, _ = sweep.load(Path(_DATA.value))
    images = splits["test"].images[: _TEST.value]
    results = {
        "images": len(images),
        "area": _AREA.value,
        "per_head": _PER_HEAD.value,
        "teacher": _TEACHER.value or "each student",
        "overlap": {},
        **({"objects": {}} if _OBJECTS.value else {}),
    }
    for path in _STUDENTS.value:
        student = pretrained.load(path)
        size = student.model.image_size
        teacher = pretrained.load(_TEACHER.value or path, image_size=size)
        measured = measure(
            student,
            teacher,
            images,
            area=_AREA.value,
            batch_size=_BATCH.value,
            per_head=_PER_HEAD.value,
        )
        for key, found in zip(("overlap", "objects"), measured, strict=True):
            if key in results:
                results[key][path] = {n: summarize(v) for n, v in found.items()}
    print(table(results))
    if _OUTPUT.value:
        output = Path(_OUTPUT.value)
        output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        output.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    _DATA = flags.DEFINE_string("data", "cifar10.npz", "From benchmarks.sweep.")
    _TEACHER = flags.DEFINE_string(
        "teacher", "", "Any ViT's checkpoint; '': each student is its own."
    )
    _STUDENTS = flags.DEFINE_list(
        "students", None, "Run folders of WinfTs.", required=True
    )
    _OUTPUT = flags.DEFINE_string("output", None, "Files to write, without suffix.")
    _AREA = flags.DEFINE_float("area", 0.25, "Share of the grid that is a field.")
    _PER_HEAD = flags.DEFINE_bool("per_head", False, "Compare head by head.")
    _OBJECTS = flags.DEFINE_bool("objects", False, "Also the share on objects.")
    _TEST = flags.DEFINE_integer("test_images", 1000, "Use the first so many.")
    _BATCH = flags.DEFINE_integer("batch_size", 100, "Images at once.")
    app.run(main)
