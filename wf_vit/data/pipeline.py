"""Batches of uint8 images: shuffled for training, each example once for evaluation.

The order of the records is a pure function of the seed and the epoch
(``wf_vit.data.order``), and the random crop one of the seed, the example and the epoch.
So a stream can be resumed anywhere, bit for bit, with any number of processes and any
batch size, by skipping undecoded records of the current epoch.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wf_vit.data import decode
from wf_vit.data.config import ON_ERROR, DataConfig, DataInfo
from wf_vit.data.digits import prepared_builder
from wf_vit.data.examples import Batch, Reading
from wf_vit.data.folder_source import open_folder
from wf_vit.data.order import Order, Share, count_groups
from wf_vit.data.source import Record, Source
from wf_vit.data.stream import epoch_of, epoch_seed, shuffled_for_ever
from wf_vit.data.tensorflow import tf, tfds
from wf_vit.data.tfds_source import builder_source, open_tfds
from wf_vit.errors import UsageError


def open_source(name: str, data_dir: str, on_error: str = ON_ERROR[0]) -> Source:
    """Opens what ``config.data.name``, ``data_dir`` and ``on_error`` say.

    Raises:
      UsageError: there is no such data set, or it cannot be read.
    """
    if name == "folder":
        return open_folder(data_dir, on_error)
    if name == "digits":
        return builder_source(prepared_builder(data_dir), on_error)
    return open_tfds(name, data_dir, on_error)


def open_dataset(config: DataConfig) -> "Dataset":
    """Opens a data set and counts its examples, once for all who read it.

    Args:
      config: what to read and how.

    Raises:
      UsageError: the data set is unknown or not prepared, a split or the crop is
        wrong, or files are missing.
    """
    if config.on_error not in ON_ERROR:
        raise UsageError(
            f"config.data.on_error is {config.on_error!r}, expected one of {ON_ERROR}."
        )
    source = open_source(config.name, config.data_dir, config.on_error)
    splits = {**config.eval, "train": config.train}
    source.check(splits.values())
    info = DataInfo(
        class_names=source.class_names,
        num_examples={label: source.count(split) for label, split in splits.items()},
        image_size=config.view.image_size,
    )
    return Dataset(config, info, source)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set that is open, and how its images are seen.

    Attributes:
      config: what is read, and how.
      info: what the rest of the program needs to know of it.
      source: its records.
    """

    config: DataConfig
    info: DataInfo
    source: Source
    # What evaluations read, which takes longer to make than a small split to read.
    _opened: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Yields this process's part of every training batch, for ever.

        Every epoch uses each example exactly once; a batch may straddle two epochs, so
        none is dropped. The batches do not depend on the number of processes.

        Args:
          batch_size: B, examples a batch over all P processes, a multiple of P.
          seed: of the order and the crops.
          start: how many examples all processes have taken already, in batches of any
            size; reads what this epoch has given so far again, but decodes none of it.
          process_index: whose part it is.
          process_count: P.

        Yields:
          ``image`` uint8 ``[B/P, height, width, 3]``, ``label`` int32 ``[B/P]`` and
          ``place`` int32 ``[B/P]``, the index in the whole batch. Neighbours of the
          whole batch, 2m and 2m + 1, are neighbours here if B is a multiple of 2P.
          With ``config.on_error="skip"`` also ``mask`` bool ``[B/P]``, false where an
          example could not be read: its image and label are 0.

        Raises:
          UsageError: the processes cannot share the batch (at once), or an example
            cannot be read (when its turn comes).
        """
        if batch_size < 1 or batch_size % process_count:
            raise UsageError(
                f"The batch size is {batch_size}, which {process_count} processes "
                f"cannot share evenly: choose a multiple of {process_count}."
            )
        share = Share(batch_size, start, process_index, process_count)
        num_examples = self.info.num_examples["train"]
        order = Order(num_examples, count_groups(num_examples))

        def records_after(batches: int) -> tf.data.Dataset:
            return shuffled_for_ever(
                self.source,
                self.config.train,
                order,
                dataclasses.replace(share, start=start + batches * batch_size),
                seed=seed,
                buffer=self.config.shuffle_buffer,
            )

        image = decode.train_view(self.config.view)

        def example(record: Record, stamp: tf.Tensor) -> Record:
            record = self.source.load(record)
            name = tf.strings.to_hash_bucket_fast(record["id"], 2**63 - 1)
            crop_seed = tf.stack([name, epoch_seed(seed, epoch_of(stamp))])
            return {
                "image": image(record["image"], crop_seed),
                "label": tf.cast(record["label"], tf.int32),
            }

        place = share.places.astype(np.int32)
        reading = self._reading(self.config.train, example)
        dataset = reading.dataset(records_after(0), len(place), drop_remainder=True)
        batches = reading.batches(dataset, records_after)
        return ({**batch, "place": place} for batch in batches)

    def eval_batches(
        self,
        label: str,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Yields every example of an evaluation split once, in full batches.

        All processes yield the same number of batches, padded with zeros.

        Args:
          label: of the split, a key of ``config.data.eval``.
          batch_size: B, examples a batch on this process.
          process_index: which part of the split to read.
          process_count: how many parts there are.

        Yields:
          ``image`` uint8 ``[B, height, width, 3]``, ``label`` int32 ``[B]`` and
          ``mask`` bool ``[B]``, false where an example is padding, or could not be
          read (``DataConfig.on_error``).

        Raises:
          UsageError: there is no such label, or an example cannot be read.
        """
        if label not in self.config.eval:
            raise UsageError(
                f"config.data.eval has no split {label!r}, expected one of "
                f"{sorted(self.config.eval)}."
            )
        split = self.config.eval[label]
        # Parts are given out from the first process on: that of process 0 is largest.
        largest = self.source.count(_part(split, 0, process_count))
        batches: Iterator[Batch] = iter(())
        if process_index < self.info.num_examples[label]:
            part = _part(split, process_index, process_count)
            batches = self._evaluated(split, part, batch_size)
        empty = {
            "image": np.zeros((0, *self.config.view.image_size, 3), np.uint8),
            "label": np.zeros((0,), np.int32),
        }
        return (
            _padded(next(batches, empty), batch_size)
            for _ in range(math.ceil(largest / batch_size))
        )

    def _evaluated(self, split: str, part: Any, batch_size: int) -> Iterator[Batch]:
        """Yields the batches of a part of an evaluation split."""
        key = (str(part), batch_size)
        if key not in self._opened:
            image = decode.eval_view(self.config.view)

            def example(record: Record) -> Record:
                record = self.source.load(record)
                return {
                    "image": image(record["image"]),
                    "label": tf.cast(record["label"], tf.int32),
                }

            records = self.source.read(part, None)
            reading = self._reading(split, example)
            dataset = reading.dataset(records, batch_size, drop_remainder=False)
            self._opened[key] = reading, records, dataset
        reading, records, dataset = self._opened[key]
        return reading.batches(dataset, lambda done: records.skip(done * batch_size))

    def _reading(self, split: str, example: Callable[..., Record]) -> Reading:
        return Reading(
            source=self.source,
            split=split,
            example=example,
            image_size=self.config.view.image_size,
            on_error=self.config.on_error,
        )


def _part(split: str, index: int, count: int) -> Any:
    """Returns one of ``count`` consecutive parts; the first ones are the largest."""
    return tfds.even_splits(split, count)[index]


def _padded(batch: Batch, batch_size: int) -> Batch:
    """Pads a batch with zeros and marks its own examples in ``mask``."""
    missing = batch_size - len(batch["label"])
    padded = {
        name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        for name, array in batch.items()
    }
    own = np.arange(batch_size) < batch_size - missing
    return {**padded, "mask": own & padded.get("mask", True)}
