"""A config made concrete: its data, its training, its evaluation."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import UInt8

from wf_vit.data.config import DataConfig
from wf_vit.data.pipeline import Dataset, open_dataset
from wf_vit.errors import UsageError
from wf_vit.shapes import Params
from wf_vit.train import parallel, steps
from wf_vit.train.config import Progress, Training, resolve
from wf_vit.train.pictures import draw_pictures

_LOG = logging.getLogger(__name__)

_START = Progress()


@dataclasses.dataclass(frozen=True)
class Run:
    """A config made concrete: its data and its training.

    Attributes:
      data: open.
      training: the rest.
      batch_size: of a step, over all devices of all processes.
      eval_batch_size: likewise, of evaluation.
      draws: whether an evaluation draws pictures, too.
      max_skipped_updates: how many updates of the run may be skipped.
      best_split: the evaluation that chooses the best checkpoint.
    """

    data: Dataset
    training: Training
    batch_size: int
    eval_batch_size: int
    draws: bool
    max_skipped_updates: int
    best_split: str

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of the model, its input and its data."""
        return {
            **self.training.meta,
            "train_examples": self.data.info.num_examples["train"],
            "best_split": [self.best_split, self.data.config.eval[self.best_split]],
        }

    def train_batches(self, examples_seen: int) -> Iterator[steps.Batch]:
        """Yields this process's sharded batches, from any example of the run on."""
        batches = self.data.train_batches(
            batch_size=self.batch_size,
            seed=self.training.objective.seed,
            start=examples_seen,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return map(parallel.shard, batches)

    def evaluate(
        self, params: Params, stopping: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Returns ``<split>/top1`` and ``<split>/loss``, every example counted once.

        Args:
          params: of the model, spread over the devices.
          stopping: asked after every batch; the result is empty once it says yes.

        Returns:
          The metrics; with ``config.data.on_error="skip"`` also
          ``<split>/examples_skipped``.

        Raises:
          UsageError: no example of a split can be read.
        """
        metrics = {}
        for split in self.data.config.eval:
            batches = self.data.eval_batches(
                split,
                batch_size=self.eval_batch_size // jax.process_count(),
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            # The device adds up in float32 within a batch, the host in float64.
            totals = collections.Counter()
            for batch in batches:
                sums = self._eval_step(params, parallel.shard(batch))
                totals.update({k: float(v) for k, v in sums.items()})
                if stopping():
                    return {}
            if not totals["count"]:
                raise UsageError(
                    f"No example of the split {split!r} of config.data.eval can be "
                    "read: repair the data set, or remove the split."
                )
            for name in ("top1", "loss"):
                metrics[f"{split}/{name}"] = totals[name] / totals["count"]
            if self.data.config.on_error == "skip":
                skipped = self.data.info.num_examples[split] - totals["count"]
                metrics[f"{split}/examples_skipped"] = skipped
        return metrics

    @functools.cached_property
    def _eval_step(self) -> Callable[[Params, steps.Batch], steps.Metrics]:
        augmentation = self.training.objective.augmentation
        return parallel.map_reduce(
            functools.partial(
                steps.eval_step,
                model=self.training.model,
                mean=augmentation.mean,
                std=augmentation.std,
                axis=parallel.AXIS,
            )
        )

    def pictures(self, params: Params) -> dict[str, np.ndarray]:
        """Returns pictures of the model, by name."""
        augmentation = self.training.objective.augmentation
        return draw_pictures(
            self.training.model,
            params,
            self.examples,
            mean=augmentation.mean,
            std=augmentation.std,
        )

    @functools.cached_property
    def examples(self) -> UInt8[np.ndarray, "B height width 3"]:
        """A few images of an evaluation, to be drawn: the first that can be read."""
        batches = self.data.eval_batches(self.best_split, batch_size=6)
        batch = next(batch for batch in batches if batch["mask"].any())
        return batch["image"][batch["mask"]]


def open_run(
    config: ml_collections.ConfigDict,
    *,
    guided: bool = True,
    done: Progress = _START,
) -> Run:
    """Opens the data and resolves the config, checking them together.

    Args:
      config: the experiment's config (``wf_vit.train.config``).
      guided: whether to open what guides; an evaluation needs no teacher.
      done: where the run resumes.

    Raises:
      UsageError: what is wrong, and what to do.
    """
    local = parallel.local_batch_size(config.batch_size, what="config.batch_size")
    parallel.local_batch_size(config.eval_batch_size, what="config.eval_batch_size")
    per_device = local // jax.local_device_count()
    if config.accumulate_steps < 1 or per_device % config.accumulate_steps:
        raise UsageError(
            f"config.accumulate_steps is {config.accumulate_steps}, but each device "
            f"has {per_device} examples a step: choose a divisor of that."
        )
    data = open_dataset(DataConfig.of(config.data))
    return Run(
        data=data,
        training=resolve(config, data.info, guided=guided, done=done),
        batch_size=config.batch_size,
        eval_batch_size=config.eval_batch_size,
        draws=config.pictures,
        max_skipped_updates=config.max_skipped_updates,
        best_split=_best_split(config.best_split, sorted(data.config.eval)),
    )


def _best_split(wanted: str, splits: list[str]) -> str:
    """Returns the evaluation that chooses the best checkpoint."""
    if not splits:
        raise UsageError(
            "config.data.eval is empty, expected at least one evaluation: name one, "
            "such as {'test': 'test'}; config.eval_epochs says how often it runs."
        )
    if wanted and wanted not in splits:
        raise UsageError(
            f"config.best_split is {wanted!r}, but config.data.eval has "
            f"{', '.join(splits)}: name one of them, or leave it empty."
        )
    if not wanted and len(splits) > 1:
        _LOG.info(
            "Of the evaluations %s, %s chooses the best checkpoint: "
            "config.best_split names another.",
            ", ".join(splits),
            splits[0],
        )
    return wanted or splits[0]
