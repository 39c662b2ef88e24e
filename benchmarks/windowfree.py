r"""WinfT against ViT and every control: variants, seeds, and a table.

    python -m benchmarks.packed --output=cifar10.npz          # once, where TFDS is
    python -m benchmarks.windowfree --data=cifar10.npz --output=results/windowfree

All seeds of a variant train in one program on one device, at once or, on a CPU, in
turn; the images lie in its memory, and batches are drawn and augmented there. No
TensorFlow is needed. Each variant leaves OUTPUT/NAME.json when it is done, and is
skipped when that is there, so that the command can be repeated; then
OUTPUT/summary.md and summary.json are made of all there are. The variants in SAVED
leave a run folder, OUTPUT/runs/NAME, of their first seed: teachers, and whose fields
benchmarks.field_overlap looks at. Who teaches is taken from --teachers, so that a
teacher can have trained for longer than its students:

    python -m benchmarks.windowfree ... --output=results/teachers --seeds=0 \
        --variants=vit,winft --config.total_epochs=48
    python -m benchmarks.windowfree ... --teachers=results/teachers/runs

The size is that of configs/cifar10.py, every key of which can be overridden:

    python -m benchmarks.windowfree ... --config.model.width=192 \
        --config.total_epochs=100 --config.model.dtype=bfloat16 --seeds=0,1,2

For a sweep of a setting over all variants, override it and name another --output.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks import packed
from benchmarks.sweep import OnDevice, Sweep, forward_flops, on_device, save_run
from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.pretrained.runs import DIRECTORY
from wf_vit.workdir import replacing

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py")
_DATA = flags.DEFINE_string("data", "cifar10.npz", "From benchmarks.packed.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_VARIANTS = flags.DEFINE_list("variants", None, "Of VARIANTS; all by default.")
_SEEDS = flags.DEFINE_list("seeds", "0,1,2", "All are trained in one program.")
_TRAIN = flags.DEFINE_integer("train_images", 0, "Use the first so many; 0: all.")
_TEST = flags.DEFINE_integer("test_images", 0, "Use the first so many; 0: all.")
_TEACHERS = flags.DEFINE_string(
    "teachers", None, "Run folders of the teachers; OUTPUT/runs by default."
)
_MINUTES = flags.DEFINE_float("minutes", 0, "Begin no variant after these; 0: all.")

# Thresholds at which a model with fields is evaluated in hard mode, in the end.
HARD = (0.05, 0.25, 0.5)
BASELINE, UNGUIDED = "vit", "winft"
SAVED = (BASELINE, UNGUIDED, "winft_guided", "winft_guided_fields")


def _guided(teacher: str = "", **changes: Any) -> dict[str, Any]:
    """Returns guidance with a weight of 1, and changes of it."""
    changes = {"weight": 1.0, "teacher": teacher, **changes}
    return {f"guidance.{name}": value for name, value in changes.items()}


def _winft(**changes: Any) -> dict[str, Any]:
    """Returns a window-free transformer with changed fields."""
    fields = {f"model.fields.{name}": value for name, value in changes.items()}
    return {"model.name": "windowfree", **fields}


# What each variant changes in the config.
VARIANTS = {
    "vit": {"model.name": "vit"},
    **{
        f"vit_rate_{rate:g}": {"model.name": "vit", "optimizer.learning_rate": rate}
        for rate in (3e-4, 5e-4, 2e-3, 4e-3)
    },
    "relative_bias": {"model.name": "relative_bias"},
    "gaussian": {"model.name": "gaussian"},
    "learned_gaussian": {"model.name": "learned_gaussian"},
    "growing_window": {"model.name": "growing_window"},
    "static_fields": {"model.name": "static_fields"},
    "winft": _winft(),
    "winft_growth_0": _winft(growth=0.0),
    "winft_radii_1.5": _winft(extents=(1.5,), growth=0.0),
    "winft_radii_2.5": _winft(extents=(2.5,), growth=0.0),
    "winft_radii_1_2_4": _winft(extents=(1.0, 2.0, 4.0), growth=0.0),
    "winft_radii_0": _winft(extents=(0.0,)),
    "winft_softness_0.25": _winft(softness=0.25),
    "winft_softness_1": _winft(softness=1.0),
    "winft_shared": _winft(per_head=False),
    "winft_stream": _winft(source="stream"),
    "winft_queries": _winft(source="queries"),
    # Controls of guidance: targets that know no image, and a student without fields.
    "winft_random": {**_winft(), **_guided(indicator="random")},
    "winft_distance": {**_winft(), **_guided(indicator="distance")},
    "vit_guided": {"model.name": "vit", **_guided("vit")},
    "vit_guided_by_winft": {"model.name": "vit", **_guided("winft")},
    # What is matched, by whom, for how long and to which indicator.
    "winft_guided": {**_winft(), **_guided("winft")},
    "winft_guided_by_vit": {**_winft(), **_guided("vit")},
    "winft_guided_mean": {**_winft(), **_guided("winft", per_head=False)},
    "winft_guided_0.3": {**_winft(), **_guided("winft", weight=0.3)},
    "winft_guided_3": {**_winft(), **_guided("winft", weight=3.0)},
    "winft_guided_third": {
        **_winft(),
        **_guided("winft"),
        "guidance_percent": 33.0,
    },
    "winft_knockout": {**_winft(), **_guided("winft", indicator="knockout")},
    "winft_propagated": {**_winft(), **_guided("winft", indicator="propagated")},
    # Coverage with little area, in place of attention.
    "winft_area": {**_winft(), **_guided(match="fields")},
    "winft_guided_fields": {**_winft(), **_guided("winft", match="fields")},
    "winft_guided_fields_by_vit": {**_winft(), **_guided("vit", match="fields")},
    "winft_guided_fields_mean": {
        **_winft(),
        **_guided("winft", match="fields", per_head=False),
    },
}


def configure(
    base: ml_collections.ConfigDict, variant: str, teachers: Path, num_train: int
) -> ml_collections.ConfigDict:
    """Returns the config of a variant; durations in whole epochs become steps.

    Raises:
      UsageError: there is no such variant, its teacher has not been trained, or the
        data would be cropped in a way that is not done here.
    """
    if variant not in VARIANTS:
        raise UsageError(
            f"Unknown variant {variant!r}: choose from {', '.join(VARIANTS)}."
        )
    config = base.copy_and_resolve_references()
    config.update_from_flattened_dict(VARIANTS[variant])
    if config.guidance.teacher:
        run = teachers / config.guidance.teacher
        if not (run / DIRECTORY).is_dir():
            raise UsageError(
                f"{variant!r} needs the teacher {config.guidance.teacher!r}, which is "
                f"not in {run}: run that variant first, or name --teachers."
            )
        config.guidance.teacher = str(run)
    if config.data.crop != "pad":
        raise UsageError(f"data.crop is {config.data.crop!r}, expected 'pad'.")
    config.total_steps = round(config.total_epochs * (num_train // config.batch_size))
    return config


def check_settings(path: Path, config: ml_collections.ConfigDict) -> None:
    """Raises UsageError if a result is another config's; evaluations may differ."""
    earlier = json.loads(path.read_text())["config"]
    now = json.loads(config.to_json_best_effort())
    changed = [
        f"{key} was {earlier.get(key)} and is now {now.get(key)}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) != now.get(key) and not key.startswith("eval_")
    ]
    if changed:
        raise UsageError(
            f"{path} has other settings: {'; '.join(changed)}. Name another --output, "
            "or remove the file."
        )


def run_variant(
    config: ml_collections.ConfigDict,
    seeds: list[int],
    data: dict[str, OnDevice],
    class_names: tuple[str, ...],
    folder: Path,
    name: str,
) -> dict[str, Any]:
    """Trains a variant; returns what its JSON holds."""
    started = time.perf_counter()
    sweep = Sweep(config, seeds, data["train"], data["test"], len(class_names))
    rows = []
    for row in sweep.run():
        rows.append(row)
        top1 = " ".join(f"{100 * value:.2f}" for value in row["test/top1"])
        speed = row["train_images_per_second"]
        print(f"{name}  epoch {row['epoch']}  {top1} %  {speed:.0f} images/s")
    if name in SAVED:
        save_run(folder / "runs" / name, sweep, class_names)
    fielded = config.model.name in registry.FIELD_MODELS
    hard = [sweep.hard(threshold) for threshold in HARD if fielded]
    # The first window holds the compilation.
    speeds = [row["train_images_per_second"] for row in rows[1:] or rows]
    return {
        "variant": name,
        "changes": VARIANTS[name],
        "seeds": seeds,
        "parameters": sum(x[0].size for x in jax.tree.leaves(sweep.states.params)),
        "flops": forward_flops(sweep.model),
        "train_images_per_second": statistics.median(speeds),
        "seconds": time.perf_counter() - started,
        "device": jax.devices()[0].device_kind,
        "train_images": len(data["train"].labels),
        "test_images": len(data["test"].labels),
        "rows": rows,
        "hard": hard,
        "config": json.loads(config.to_json_best_effort()),
    }


def summarize(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each variant: top-1 in %, its spread over seeds, the costs."""
    summary = []
    for name in (variant for variant in VARIANTS if variant in results):
        result = results[name]
        top1 = [100 * value for value in result["rows"][-1]["test/top1"]]
        row = {
            "variant": name,
            "top1": statistics.mean(top1),
            "deviation": statistics.stdev(top1) if len(top1) > 1 else None,
            "seeds": len(top1),
            "parameters": result["parameters"],
            "gflops": result["flops"] / 1e9,
            "train_images_per_second": result["train_images_per_second"],
            "device": result["device"],
        }
        if UNGUIDED in results:
            row["steps_to_unguided"] = share_to_reach(result, results[UNGUIDED])
        summary.append(row)
    return summary


def share_to_reach(result: dict[str, Any], reference: dict[str, Any]) -> float | None:
    """Returns after which share of its run a variant is where another ends, if it is.

    Both by the mean over seeds, at the epochs that were evaluated.
    """
    goal = statistics.mean(reference["rows"][-1]["test/top1"])
    for row in result["rows"]:
        if statistics.mean(row["test/top1"]) >= goal:
            return row["epoch"] / result["rows"][-1]["epoch"]
    return None


def table(summary: list[dict[str, Any]]) -> str:
    """Returns the summary as Markdown."""
    base = next((row for row in summary if row["variant"] == BASELINE), summary[0])
    lines = [
        "| variant | test top-1, % | seeds | parameters | GFLOPs | step time | "
        f"steps to {UNGUIDED}'s top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        slower = base["train_images_per_second"] / row["train_images_per_second"]
        share = row.get("steps_to_unguided")
        reached = "" if share is None else f"{100 * share:.0f} %"
        lines.append(
            f"| {row['variant']} | {row['top1']:.2f}{spread} | {row['seeds']} | "
            f"{row['parameters']:,} | {row['gflops']:.4f} | {slower:.2f} | {reached} |"
        )
    note = (
        "Mean ± standard deviation over seeds. Step time: relative to "
        f"{base['variant']}, on {base['device']}. GFLOPs: a forward pass on one image."
    )
    return "\n".join([*lines, "", note, ""])


def write_summary(folder: Path) -> None:
    """Makes summary.json and summary.md of the results that there are."""
    paths = {name: folder / f"{name}.json" for name in VARIANTS}
    results = {n: json.loads(p.read_text()) for n, p in paths.items() if p.exists()}
    if not results:
        return
    summary = summarize(results)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "summary.md").write_text(table(summary))
    print(table(summary))


def main(argv: list[str]) -> None:
    """Runs the variants that are not done, and sums up."""
    del argv
    logging.set_verbosity(logging.ERROR)
    folder = Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    teachers = Path(_TEACHERS.value or folder / "runs")
    seeds = [int(seed) for seed in _SEEDS.value]
    splits, class_names = packed.load(Path(_DATA.value))
    data = {
        "train": on_device(splits["train"], _TRAIN.value),
        "test": on_device(splits["test"], _TEST.value),
    }
    started = time.perf_counter()
    for name in _VARIANTS.value or VARIANTS:
        path = folder / f"{name}.json"
        config = configure(_CONFIG.value, name, teachers, len(data["train"].labels))
        if path.exists():
            check_settings(path, config)
            print(f"{name}: done, in {path}.")
            continue
        if _MINUTES.value and time.perf_counter() - started > 60 * _MINUTES.value:
            print(f"{name}: left for the next time.")
            continue
        result = run_variant(config, seeds, data, class_names, folder, name)
        with replacing(path) as partial:
            partial.write_text(json.dumps(result) + "\n")
    write_summary(folder)


if __name__ == "__main__":
    app.run(main)
