"""How fast a config trains, and how much of that time is spent waiting for input.

    python -m benchmarks.train_loop --config=configs/cifar10.py [--config.KEY=VALUE ...]

Times, turn by turn in one process, the update step on a batch that is already there
("step"), the input pipeline on its own ("input"), and both as the training loop runs
them ("loop"). The input-bound share is 1 - loop / step in images per second. Prints a
table and writes JSON to --output. Figures of one machine compare with one another, not
with those of another machine.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from wf_vit.train import loop, parallel, report, schedule, steps
from wf_vit.train.state import init_state

_CONFIG = config_flags.DEFINE_config_file("config", "configs/cifar10.py")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns; medians are reported.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps of each kind in a turn.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")


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
                recipe=loop.make_recipe(config),
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


def measure(config, rounds: int, count: int) -> dict[str, list[float]]:
    """Returns images per second of step, input and loop, for each round."""
    trainer = Trainer(config)
    batches: Iterator[steps.Batch] = loop.train_batches(config, 0)
    batch = next(batches)
    trainer.run(lambda: batch, 3)  # Compiles.
    images = count * config.batch_size
    kinds = {
        "step": (lambda: trainer.run(lambda: batch, count), 1),
        # Longer than what has been prefetched while the others ran.
        "input": (lambda: [next(batches) for _ in range(_DRAIN * count)], _DRAIN),
        "loop": (lambda: trainer.run(lambda: next(batches), count), 1),
    }
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, (work, times) in kinds.items():
            speeds[name].append(images_per_second(work, times * images))
    return speeds


def main(argv: list[str]) -> None:
    """Measures one config."""
    del argv
    report.show_own_log()
    config = _CONFIG.value
    speeds = measure(config, _ROUNDS.value, _STEPS.value)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    share = statistics.median(
        1 - loop / step
        for loop, step in zip(speeds["loop"], speeds["step"], strict=True)
    )
    print(f"{config.model.name} on {jax.devices()[0].device_kind}")
    for name, values in speeds.items():
        print(
            f"  {name:6s} {medians[name]:9.1f} images/s"
            f"  ({min(values):.1f} to {max(values):.1f})"
        )
    print(f"  input-bound share {100 * share:.1f} %")
    if _OUTPUT.value:
        result = {
            "model": config.model.to_dict(),
            "batch_size": config.batch_size,
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "images_per_second": speeds,
            "median": medians,
            "input_bound_share": share,
        }
        Path(_OUTPUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
