"""How fast models train, and how much of that time is spent waiting for input.

    python -m benchmarks.train_loop --config=configs/cifar10.py [--config.KEY=VALUE ...]

Times, turn by turn in one process, each model's update step on a batch that is already
there ("step") and together with the input pipeline, as the training loop runs it
("loop"); then the pipeline on its own. The input-bound share is 1 - loop / step in
images per second. Prints medians, writes JSON to --output. Quote ratios: they are taken
within turns.
"""

import functools
import json
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from wf_vit.command import show_own_log
from wf_vit.train import loop, parallel, schedule, steps
from wf_vit.train.state import init_state

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py")
_MODELS = flags.DEFINE_list("models", "vit,windowfree", "Values of config.model.name.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns; medians are reported.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps of each kind in a turn.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")


# Batches fetched for each step of a turn, when the input is timed.
_DRAIN = 20


class Trainer:
    """The update step with its state, as the training loop holds it."""

    def __init__(self, config):
        experiment = loop.build(config)
        optimizer = schedule.make_optimizer(config, experiment.durations)
        self.update = parallel.map_update(
            functools.partial(
                steps.train_step,
                model=experiment.model,
                optimizer=optimizer,
                recipe=steps.make_recipe(config),
                axis=parallel.AXIS,
            )
        )
        self.state = init_state(experiment.params, optimizer, ema=config.ema_decay > 0)

    def run(self, next_batch: Callable, count: int) -> None:
        """Does ``count`` steps and waits for the last."""
        for _ in range(count):
            self.state, metrics = self.update(self.state, next_batch())
        jax.block_until_ready((self.state, metrics))


def images_per_second(work: Callable[[], None], images: int) -> float:
    """Returns the speed of one call."""
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


def measure(
    config, models: list[str], rounds: int, count: int
) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Returns images per second: step and loop by model and round, and of the input."""
    batches: Iterator[steps.Batch] = loop.train_batches(config, 0)
    batch = next(batches)
    trainers = {}
    for model in models:
        config.model.name = model
        trainers[model] = Trainer(config)
        trainers[model].run(lambda: batch, 3)  # Compiles.
    images = count * config.batch_size

    def turn(trainer: Trainer) -> dict[str, float]:
        sources = {"step": lambda: batch, "loop": lambda: next(batches)}
        return {
            kind: images_per_second(lambda: trainer.run(source, count), images)  # noqa: B023
            for kind, source in sources.items()
        }

    turns = [{m: turn(t) for m, t in trainers.items()} for _ in range(rounds)]
    speeds = {
        model: {kind: [t[model][kind] for t in turns] for kind in turns[0][model]}
        for model in models
    }
    # Last, as it empties what has been prefetched, and for longer than that lasts.
    fetch = lambda: [next(batches) for _ in range(_DRAIN * count)]  # noqa: E731
    return speeds, images_per_second(fetch, _DRAIN * images)


def main(argv: list[str]) -> None:
    """Measures the models of one config."""
    del argv
    show_own_log()
    config = _CONFIG.value
    speeds, input_speed = measure(config, _MODELS.value, _ROUNDS.value, _STEPS.value)
    first = speeds[_MODELS.value[0]]["step"]
    results = {}
    for model, kinds in speeds.items():
        results[model] = {
            "images_per_second": kinds,
            "median": {kind: statistics.median(v) for kind, v in kinds.items()},
            "input_bound_share": 1
            - _median_of(operator.truediv, kinds["loop"], kinds["step"]),
            f"step_time_over_{_MODELS.value[0]}": _median_of(
                operator.truediv, first, kinds["step"]
            ),
        }
        for name, value in results[model].items():
            if name != "images_per_second":
                print(model, name, json.dumps(value))
    print(f"input {input_speed:.0f} images/s")
    if _OUTPUT.value:
        result = {
            "batch_size": config.batch_size,
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "input_images_per_second": input_speed,
            "models": results,
        }
        Path(_OUTPUT.value).write_text(json.dumps(result, indent=2) + "\n")


def _median_of(ratio: Callable, left: list[float], right: list[float]) -> float:
    """Returns the median over turns of a ratio taken within each turn."""
    return statistics.median(map(ratio, left, right))


if __name__ == "__main__":
    app.run(main)
