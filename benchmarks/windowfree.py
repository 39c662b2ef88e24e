r"""WinfT against ViT and every control: variants, seeds, and a table.

    python -m benchmarks.sweep --output=cifar10.npz     # once: packs TFDS's CIFAR-10
    python -m benchmarks.windowfree --data=cifar10.npz --output=results/windowfree

All seeds of a variant train in one program on one device (``benchmarks.sweep``). No
TensorFlow is needed. A variant that is done is in OUTPUT/results.json, and is skipped;
then OUTPUT/summary.md is made of all that are there. One that is not done is saved at
each evaluation and at a stop, by SIGTERM, Ctrl-C or --minutes. The same command goes on
from there, and ends with the same figures. The exit status of a stop is 75, so that
this trains in pieces of nine minutes until all is done:

    while python -m benchmarks.windowfree ... --minutes=9; [ $? = 75 ]; do :; done

One command at a time writes to a folder. Each variant leaves a run folder,
OUTPUT/runs/NAME, of its first seed: for teachers, benchmarks.field_overlap,
benchmarks.resolution and benchmarks.segmentation. --teachers names the folder of the
teachers, so that a teacher can train for longer than its students:

    python -m benchmarks.windowfree ... --output=results/teachers --seeds=0 \
        --variants=vit,winft --config.total_epochs=48
    python -m benchmarks.windowfree ... --teachers=results/teachers/runs

The size is that of configs/cifar10.py, every key of which can be overridden:

    python -m benchmarks.windowfree ... --config.model.width=192 \
        --config.total_epochs=100 --config.model.dtype=bfloat16 --seeds=0,1,2

For a sweep of a setting over all variants, override it and name another --output.
Trainings of several lengths, each in a folder of its own, are drawn over their whole
cost, to OUTPUT/costs.png and costs.md; nothing is trained then:

    python -m benchmarks.windowfree --output=results/all --compare=results/32,results/75
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from matplotlib.ticker import LogLocator, NullLocator
from ml_collections import config_flags

from benchmarks import sweep
from wf_vit import figures, stops
from wf_vit.errors import UsageError
from wf_vit.models.pretrained.runs import DIRECTORY
from wf_vit.models.windowfree import FieldViT
from wf_vit.train.config import Training
from wf_vit.workdir import replacing

# Thresholds at which a model with fields is evaluated in hard mode, in the end.
HARD = (0.05, 0.25, 0.5)
RESULTS = "results.json"
BASELINE, UNGUIDED = "vit", "winft"


def _guided(teacher: str = "", **changes: Any) -> dict[str, Any]:
    """Returns guidance with a weight of 1, and changes of it."""
    changes = {"weight": 1.0, "teacher": teacher, **changes}
    return {f"guidance.{name}": value for name, value in changes.items()}


_WINFT = {"model.name": "windowfree"}

# What each variant changes in the config.
VARIANTS = {
    "vit": {"model.name": "vit"},
    **{
        f"vit_rate_{rate:g}": {"model.name": "vit", "optimizer.learning_rate": rate}
        for rate in (2e-3, 4e-3)
    },
    "relative_bias": {"model.name": "relative_bias"},
    "gaussian": {"model.name": "gaussian"},
    "growing_window": {"model.name": "growing_window"},
    "static_fields": {"model.name": "static_fields"},
    "winft": _WINFT,
    # Controls of guidance: targets that know no image, and a student without fields.
    "winft_random": {**_WINFT, **_guided(indicator="random")},
    "winft_distance": {**_WINFT, **_guided(indicator="distance")},
    "vit_guided": {"model.name": "vit", **_guided("vit")},
    "growing_window_guided": {
        "model.name": "growing_window",
        **_guided("growing_window"),
    },
    "vit_guided_by_winft": {"model.name": "vit", **_guided("winft")},
    "winft_guided": {**_WINFT, **_guided("winft")},
    "winft_guided_by_vit": {**_WINFT, **_guided("vit")},
    # Coverage with little area, in place of attention.
    "winft_guided_fields": {**_WINFT, **_guided("winft", match="fields")},
}


def configure(
    base: ml_collections.ConfigDict, variant: str, teachers: Path
) -> ml_collections.ConfigDict:
    """Returns the config of a variant.

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
    return config


def settings_of(
    config: ml_collections.ConfigDict, seeds: list[int], data: dict[str, sweep.OnDevice]
) -> dict[str, Any]:
    """Returns what decides how a variant ends, in terms of JSON."""
    return {
        "seeds": seeds,
        "train_images": len(data["train"].labels),
        "test_images": len(data["test"].labels),
        "config": json.loads(config.to_json_best_effort()),
    }


def check_settings(
    name: str, earlier: dict[str, Any], now: dict[str, Any], remedy: str
) -> None:
    """Raises UsageError if something was done with other settings.

    How often and in which batches it is evaluated may differ.

    Args:
      name: of the variant.
      earlier: ``settings_of`` what was done.
      now: likewise, of what is to be done.
      remedy: what to do besides naming another folder.
    """
    before, after = (
        {**{k: s[k] for k in now if k != "config"}, **s["config"]}
        for s in (earlier, now)
    )
    changed = [
        f"{key} was {before.get(key)} and is now {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith("eval_")
    ]
    if changed:
        raise UsageError(
            f"{name!r} was run with other settings: {'; '.join(changed)}. Name another "
            f"--output, or {remedy}."
        )


def run_variant(
    config: ml_collections.ConfigDict,
    seeds: list[int],
    data: dict[str, sweep.OnDevice],
    class_names: tuple[str, ...],
    folder: Path,
    name: str,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Trains a variant, from where it was stopped; returns what its JSON holds.

    Args:
      config: of the variant.
      seeds: all are trained.
      data: by split, "train" and "test".
      class_names: of the data.
      folder: where the variant leaves its run folder, and what it needs to go on.
      name: of the variant.
      stopping: is asked after each epoch whether to stop.

    Returns:
      None if it was stopped.

    Raises:
      UsageError: it was stopped with other settings.
    """
    started = time.perf_counter()
    settings = settings_of(config, seeds, data)
    runs = sweep.Sweep(config, seeds, data["train"], data["test"], class_names)
    unfinished = folder / "unfinished" / name
    rows, seconds = [], 0.0
    if saved := sweep.newest(unfinished):
        check_settings(name, saved.meta, settings, f"remove {unfinished}")
        runs.restore(saved)
        rows, seconds = saved.meta["rows"], saved.meta["seconds"]

    def spent() -> float:
        return seconds + time.perf_counter() - started

    for epoch, row in runs.run():
        if row:
            rows.append(row)
            top1 = " ".join(f"{100 * value:.2f}" for value in row["test/top1"])
            speed = row["train_images_per_second"]
            print(f"{name}  epoch {epoch}  {top1} %  {speed:.0f} images/s", flush=True)
        stop = stopping()
        if row or stop:
            meta = {**settings, "rows": rows, "seconds": spent()}
            runs.save(unfinished, meta)
        if stop:
            print(f"{name}  epoch {epoch}  stopped, and saved in {unfinished}.")
            return None
    runs.save_run(folder / "runs" / name)
    fielded = isinstance(runs.training.model, FieldViT)
    hard = [runs.hard(threshold) for threshold in HARD if fielded]
    # The first window holds the compilation.
    speeds = [row["train_images_per_second"] for row in rows[1:] or rows]
    return {
        "variant": name,
        "changes": VARIANTS[name],
        "parameters": sum(x[0].size for x in jax.tree.leaves(runs.states.params)),
        "flops": sweep.forward_flops(runs.training.model),
        "training_flops": training_flops(runs.training, config),
        "train_images_per_second": statistics.median(speeds),
        "seconds": spent(),
        "device": jax.devices()[0].device_kind,
        "rows": rows,
        "hard": hard,
        **settings,
    }


def training_flops(
    training: Training, config: ml_collections.ConfigDict
) -> float | None:
    """Returns the floating-point operations of a whole training, of one seed.

    An image costs three forward passes, and one of the teacher as long as it teaches.
    To that comes what the teacher's own training cost, by the results that are beside
    its run; None if it is not there.

    Args:
      training: of the variant.
      config: likewise; it names the teacher's run.
    """
    images = training.durations.total * config.batch_size
    total = 3 * sweep.forward_flops(training.model) * images
    guidance = training.objective.guidance
    if guidance is None or guidance.teacher is None:
        return total
    taught = min(guidance.duration / training.durations.total, 1)
    total += sweep.forward_flops(guidance.teacher.model) * images * taught
    run = Path(config.guidance.teacher)
    trained = read_results(run.parents[1] / RESULTS).get(run.name, {})
    before = trained.get("training_flops")
    return None if before is None else total + before


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
            "training_flops": result.get("training_flops"),
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
        f"training, TFLOPs | steps to {UNGUIDED}'s top-1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        slower = base["train_images_per_second"] / row["train_images_per_second"]
        total = row["training_flops"]
        cost = "" if total is None else f"{total / 1e12:,.1f}"
        share = row.get("steps_to_unguided")
        reached = "" if share is None else f"{100 * share:.0f} %"
        lines.append(
            f"| {row['variant']} | {_percent(row)} | {row['seeds']} | "
            f"{row['parameters']:,} | {row['gflops']:.4f} | {slower:.2f} | {cost} | "
            f"{reached} |"
        )
    note = (
        "Mean ± standard deviation over seeds. Step time: relative to "
        f"{base['variant']}, on {base['device']}. GFLOPs: a forward pass on one image. "
        "Training: of one seed, three forward passes for each image, and all that its "
        "teacher costs, whose own training is part of it."
    )
    return "\n".join([*lines, "", note, ""])


def compare(folders: Sequence[Path], output: Path) -> str:
    """Writes the top-1 of each variant over the whole cost of its training.

    Args:
      folders: each with the results of trainings of one length.
      output: folder for costs.png, and for costs.md, a table.

    Returns:
      The table.

    Raises:
      UsageError: a folder has no results, or they are of other images.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    images = {}
    for folder in folders:
        results = read_results(folder / RESULTS)
        if not results:
            raise UsageError(f"{folder} has no {RESULTS}: train something there first.")
        for row in summarize(results):
            result = results[row["variant"]]
            if row["training_flops"] is None:
                raise UsageError(
                    f"{folder} does not say what {row['variant']!r} cost: there were "
                    "no results of its teacher. Train it again beside them."
                )
            images[folder] = (result["train_images"], result["test_images"])
            row["epochs"] = result["rows"][-1]["epoch"]
            rows.setdefault(row["variant"], []).append(row)
    if len(set(images.values())) > 1:
        raise UsageError(
            "These were trained or tested on different numbers of images, which cannot "
            f"be compared by cost: {', '.join(f'{k}: {v}' for k, v in images.items())}."
        )
    lines = [
        "| variant | epochs | training, TFLOPs | test top-1, % | seeds |",
        "|---|---|---|---|---|",
    ]
    curves = {}
    for variant in filter(rows.__contains__, VARIANTS):
        found = sorted(rows[variant], key=lambda row: row["training_flops"])
        lines += [
            f"| {variant} | {row['epochs']:g} | {row['training_flops'] / 1e12:,.1f} | "
            f"{_percent(row)} | {row['seeds']} |"
            for row in found
        ]
        costs = np.array([row["training_flops"] / 1e12 for row in found])
        mean = np.array([row["top1"] for row in found])
        deviation = np.array([row["deviation"] or 0 for row in found])
        name = variant.replace("_", " ")
        curves[name] = figures.Curve(costs, mean, mean - deviation, mean + deviation)
    note = (
        "Mean ± standard deviation over seeds. The cost is that of one seed: three "
        "forward passes for each image, and all that its teacher costs, whose own "
        "training is part of it."
    )
    written = "\n".join([*lines, "", note, ""])
    output.mkdir(parents=True, exist_ok=True)
    (output / "costs.md").write_text(written)
    own = [name for name in curves if name.startswith(UNGUIDED)]
    with figures.style():
        figure = figures.evidence(
            {"": curves}, "whole training, TFLOPs", own=own, ylabel="test top-1, %"
        )
        axis = figure.axes[0].xaxis
        figure.axes[0].set_xscale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
        figure.savefig(output / "costs.png")
    return written


def _percent(row: dict[str, Any]) -> str:
    spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
    return f"{row['top1']:.2f}{spread}"


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Returns what is done, by variant; nothing if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Writes results.json, a line for each variant."""
    lines = (f"{json.dumps(n)}: {json.dumps(r)}" for n, r in results.items())
    with replacing(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(argv: list[str]) -> None:
    """Runs the variants that are not done, and sums up."""
    del argv
    logging.set_verbosity(logging.ERROR)
    started = time.perf_counter()
    folder = Path(_OUTPUT.value)
    if _COMPARE.value:
        print(compare([Path(name) for name in _COMPARE.value], folder))
        return
    folder.mkdir(parents=True, exist_ok=True)
    teachers = Path(_TEACHERS.value or folder / "runs")
    seeds = [int(seed) for seed in _SEEDS.value]
    splits, class_names = sweep.load(Path(_DATA.value))
    data = {
        "train": sweep.on_device(splits["train"], _TRAIN.value),
        "test": sweep.on_device(splits["test"], _TEST.value),
    }
    path = folder / RESULTS
    results = read_results(path)

    def stopping() -> bool:
        spent = time.perf_counter() - started
        return bool(stops.asked()) or 0 < 60 * _MINUTES.value < spent

    stopped = trained = False
    try:
        with stops.handled(), stops.deferred("What was finished is kept."):
            for name in _VARIANTS.value or VARIANTS:
                config = configure(_CONFIG.value, name, teachers)
                if name in results:
                    now = settings_of(config, seeds, data)
                    remedy = f"take the variant out of {path}"
                    check_settings(name, results[name], now, remedy)
                    print(f"{name}: done, in {path}.")
                    continue
                # Each call trains for an epoch at least, or nothing would ever end.
                stopped = stopped or bool(stops.asked()) or (trained and stopping())
                if stopped:
                    print(f"{name}: left for the next time.")
                    continue
                result = run_variant(
                    config, seeds, data, class_names, folder, name, stopping
                )
                stopped, trained = result is None, True
                if result is not None:
                    results[name] = result
                    write_results(path, results)
                    shutil.rmtree(folder / "unfinished" / name)
            if results:
                summary = table(summarize(results))
                (folder / "summary.md").write_text(summary)
                print(summary)
    except stops.Stopped as stop:
        stopped = True
        print(stop)
    if stopped:
        sys.exit(stops.STATUS)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py")
    _DATA = flags.DEFINE_string("data", "cifar10.npz", "From benchmarks.sweep.")
    _OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
    _VARIANTS = flags.DEFINE_list("variants", None, "Of VARIANTS; all by default.")
    _SEEDS = flags.DEFINE_list("seeds", "0,1,2", "All are trained in one program.")
    _TRAIN = flags.DEFINE_integer("train_images", 0, "Use the first so many; 0: all.")
    _TEST = flags.DEFINE_integer("test_images", 0, "Use the first so many; 0: all.")
    _TEACHERS = flags.DEFINE_string(
        "teachers", None, "Run folders of the teachers; OUTPUT/runs by default."
    )
    _COMPARE = flags.DEFINE_list(
        "compare", None, "Draw these results over their cost; train nothing."
    )
    _MINUTES = flags.DEFINE_float(
        "minutes", 0, "Stop after these, to go on later; 0: never."
    )
    app.run(main)
