r"""Compares finished training runs, and measures how fast models and input are.

    python -m benchmarks.training --output=results/NAME --runs=LABEL=RUN_FOLDER,...

draws the runs' curves into OUTPUT/curves.png and writes OUTPUT/runs.json: of each run
what it reached, its config and its metrics, so that every number can be traced.

    python -m benchmarks.training --output=results/NAME --models=vit,windowfree \
        --config=configs/cifar10.py [--config.KEY=VALUE ...]

measures, turn by turn in one process, each model's update step on a batch that is
already there ("step") and together with the input pipeline, as the training loop runs
it ("loop"); then the pipeline alone. The input-bound share is 1 - loop / step in images
per second. Prints medians and writes OUTPUT/throughput.json. Quote ratios: they are
taken within turns.

    python -m benchmarks.training --output=results/NAME --input=500x375,500x375@97 \
        --config=configs/windowfree.py --config.batch_size=128 [--photographs=FOLDER]

measures the training input alone, without and with config.data.fast_resize, turn by
turn, on JPEGs of these sizes and qualities. It makes them of real photographs, those of
scikit-learn and of FOLDER. CPU time over all threads, so that other work on the machine
matters little; and how far the pixels are apart. Writes OUTPUT/input.json and input.md.
"""

import functools
import json
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from benchmarks import input_speed
from wf_vit import figures
from wf_vit.data.config import DataConfig
from wf_vit.data.pipeline import open_dataset
from wf_vit.errors import UsageError
from wf_vit.train import parallel, steps
from wf_vit.train.config import Training, resolve
from wf_vit.train.reporter import read_jsonl

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_RUNS = flags.DEFINE_list("runs", [], "LABEL=RUN_FOLDER of runs to compare.")
_MODELS = flags.DEFINE_list("models", [], "Values of config.model.name to measure.")
_INPUT = flags.DEFINE_list(
    "input", [], "WIDTHxHEIGHT or WIDTHxHEIGHT@QUALITY of JPEGs."
)
_PHOTOGRAPHS = flags.DEFINE_string("photographs", "", "Folder, for --input.")
_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py")
_TURNS = flags.DEFINE_integer("turns", 5, "Medians over these are reported.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps, or batches, of a kind in a turn.")

# Batches fetched for each step of a turn, when the input is timed.
_DRAIN = 20


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns what a run reached: the last value of every loss and accuracy."""
    summary = {"steps": rows[-1]["step"]}
    for row in rows:
        summary |= {k: v for k, v in row.items() if k.endswith(("/top1", "/loss"))}
    return summary


def compare(runs: dict[str, Path], output: Path) -> None:
    """Writes the curves and the numbers of finished runs."""
    metrics = {label: read_jsonl(folder) for label, folder in runs.items()}
    lines = []
    for label, rows in metrics.items():
        summary = summarize(rows)
        config = json.loads((runs[label] / "config.json").read_text())
        run = {"summary": summary, "config": config, "metrics": rows}
        lines.append(f"{json.dumps(label)}: {json.dumps(run)}")
        print(label, json.dumps(summary))
    (output / "runs.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    with figures.style():
        figures.training_curves(metrics).savefig(output / "curves.png")


class Trainer:
    """The update step with its state, as the training loop holds it."""

    def __init__(self, training: Training):
        self.update = parallel.map_update(
            functools.partial(
                steps.train_step,
                model=training.model,
                optimizer=training.optimizer,
                objective=training.objective,
                axis=parallel.AXIS,
            ),
            training.teacher_params,
        )
        self.state = parallel.spread(training.start())

    def run(self, next_batch: Callable[[], steps.Batch], count: int) -> None:
        """Does ``count`` steps and waits for the last."""
        for _ in range(count):
            self.state, metrics = self.update(self.state, next_batch())
        jax.block_until_ready((self.state, metrics))


def images_per_second(work: Callable[[], Any], images: int) -> float:
    """Returns the speed of one call."""
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


def measure(
    config: ml_collections.ConfigDict, models: list[str], turns: int, count: int
) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Returns images per second: step and loop by model and turn, and of the input."""
    data = open_dataset(DataConfig.of(config.data))
    batches: Iterator[steps.Batch] = map(
        parallel.shard,
        data.train_batches(batch_size=config.batch_size, seed=config.seed),
    )
    batch = next(batches)
    trainers = {}
    for model in models:
        config.model.name = model
        trainers[model] = Trainer(resolve(config, data.info))
        trainers[model].run(lambda: batch, 3)  # Compiles.
    images = count * config.batch_size

    def turn(trainer: Trainer) -> dict[str, float]:
        sources = {"step": lambda: batch, "loop": lambda: next(batches)}
        return {
            kind: images_per_second(
                functools.partial(trainer.run, source, count), images
            )
            for kind, source in sources.items()
        }

    measured = [{m: turn(t) for m, t in trainers.items()} for _ in range(turns)]
    speeds = {
        model: {kind: [t[model][kind] for t in measured] for kind in ("step", "loop")}
        for model in models
    }
    # Last, as it empties what has been prefetched, and for longer than that lasts.
    fetch = lambda: [next(batches) for _ in range(_DRAIN * count)]  # noqa: E731
    return speeds, images_per_second(fetch, _DRAIN * images)


def throughput(
    config: ml_collections.ConfigDict, models: list[str], output: Path
) -> None:
    """Prints and writes the speeds of the models of one config."""
    speeds, input_speed = measure(config, models, _TURNS.value, _STEPS.value)
    first = speeds[models[0]]["step"]
    results = {}
    for model, kinds in speeds.items():
        results[model] = {
            "images_per_second": kinds,
            "median": {kind: statistics.median(v) for kind, v in kinds.items()},
            "input_bound_share": 1
            - _median_of(operator.truediv, kinds["loop"], kinds["step"]),
            f"step_time_over_{models[0]}": _median_of(
                operator.truediv, first, kinds["step"]
            ),
        }
        for name, value in results[model].items():
            if name != "images_per_second":
                print(model, name, json.dumps(value))
    print(f"input {input_speed:.0f} images/s")
    result = {
        "batch_size": config.batch_size,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "input_images_per_second": input_speed,
        "models": results,
    }
    (output / "throughput.json").write_text(json.dumps(result, indent=2) + "\n")


def _median_of(ratio: Callable, left: list[float], right: list[float]) -> float:
    """Returns the median over turns of a ratio taken within each turn."""
    return statistics.median(map(ratio, left, right))


def main(argv: list[str]) -> None:
    """Compares the runs and measures what the flags name."""
    del argv
    logging.set_verbosity(logging.ERROR)
    if not (_RUNS.value or _MODELS.value or _INPUT.value):
        raise UsageError(
            "None of --runs, --models and --input was given: name runs to compare as "
            "LABEL=RUN_FOLDER, models to measure, or files to measure the input of."
        )
    kinds = input_speed.files_of(_INPUT.value)
    output = Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    if _RUNS.value:
        pairs = (run.partition("=") for run in _RUNS.value)
        compare({label: Path(folder) for label, _, folder in pairs}, output)
    if _MODELS.value:
        throughput(_CONFIG.value, _MODELS.value, output)
    if kinds:
        result = input_speed.measure(
            _CONFIG.value,
            kinds,
            _PHOTOGRAPHS.value,
            turns=_TURNS.value,
            count=_STEPS.value,
        )
        (output / "input.json").write_text(json.dumps(result, indent=1) + "\n")
        (output / "input.md").write_text(input_speed.table(result))
        print(input_speed.table(result))


if __name__ == "__main__":
    app.run(main)
