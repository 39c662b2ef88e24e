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
import tensorflow as tf
import tensorflow_datasets as tfds

from wf_vit.data import decode
from wf_vit.data.config import DataConfig, DataInfo
from wf_vit.data.digits import prepared_builder
from wf_vit.data.folder_source import open_folder
from wf_vit.data.order import Order, Share, count_groups
from wf_vit.data.source import Record, Source
from wf_vit.data.stream import shuffled_for_ever
from wf_vit.data.tfds_source import builder_source, open_tfds
from wf_vit.errors import UsageError

Batch = dict[str, np.ndarray]


def open_source(name: str, data_dir: str) -> Source:
    """Opens what ``config.data.name`` and ``config.data.data_dir`` say.

    Raises:
      UsageError: there is no such data set, or it cannot be read.
    """
    if name == "folder":
        return open_folder(data_dir)
    if name == "digits":
        return builder_source(prepared_builder(data_dir))
    return open_tfds(name, data_dir)


def open_dataset(config: DataConfig) -> "Dataset":
    """Opens a data set and counts its examples, once for all who read it.

    Args:
      config: what to read and how.

    Raises:
      UsageError: the data set is unknown or not prepared, or a split or the crop is
        wrong.
    """
    source = open_source(config.name, config.data_dir)
    splits = {**config.eval, "train": config.train}
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

        Raises:
          UsageError: the processes cannot share the batch (at once), or an image cannot
            be decoded (when its turn comes).
        """
        if batch_size < 1 or batch_size % process_count:
            raise UsageError(
                f"The batch size is {batch_size}, which {process_count} processes "
                f"cannot share evenly: choose a multiple of {process_count}."
            )
        share = Share(batch_size, start, process_index, process_count)
        num_examples = self.info.num_examples["train"]
        records = shuffled_for_ever(
            self.source,
            self.config.train,
            Order(num_examples, count_groups(num_examples)),
            share,
            seed=seed,
            buffer=self.config.shuffle_buffer,
        )
        image = decode.train_view(self.config.view)

        def example(record: Record, epoch_seed: tf.Tensor) -> Record:
            record = self.source.load(record)
            seed = [tf.strings.to_hash_bucket_fast(record["id"], 2**63 - 1), epoch_seed]
            return {
                "image": image(record["image"], tf.stack(seed)),
                "label": tf.cast(record["label"], tf.int32),
            }

        place = share.places.astype(np.int32)
        batches = _decoded(
            self.source, records, example, len(place), drop_remainder=True
        )
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
          ``mask`` bool ``[B]``, false where an example is padding.

        Raises:
          UsageError: there is no such label, or an image cannot be decoded.
        """
        if label not in self.config.eval:
            raise UsageError(
                f"config.data.eval has no split {label!r}, expected one of "
                f"{sorted(self.config.eval)}."
            )
        split = self.config.eval[label]
        image = decode.eval_view(self.config.view)

        def example(record: Record) -> Record:
            record = self.source.load(record)
            return {
                "image": image(record["image"]),
                "label": tf.cast(record["label"], tf.int32),
            }

        # Parts are given out from the first process on: that of process 0 is largest.
        largest = self.source.count(_part(split, 0, process_count))
        batches: Iterator[Batch] = iter(())
        if process_index < self.info.num_examples[label]:
            part = _part(split, process_index, process_count)
            records = self.source.read(part, None)
            batches = _decoded(
                self.source, records, example, batch_size, drop_remainder=False
            )
        empty = {
            "image": np.zeros((0, *self.config.view.image_size, 3), np.uint8),
            "label": np.zeros((0,), np.int32),
        }
        return (
            _padded(next(batches, empty), batch_size)
            for _ in range(math.ceil(largest / batch_size))
        )


def _part(split: str, index: int, count: int) -> Any:
    """Returns one of ``count`` consecutive parts; the first ones are the largest."""
    return tfds.even_splits(split, count)[index]


def _decoded(
    source: Source,
    records: tf.data.Dataset,
    example: Callable[..., Record],
    batch_size: int,
    *,
    drop_remainder: bool,
) -> Iterator[Batch]:
    """Yields batches of ``example(record)``; an image that cannot be decoded is named.

    Raises:
      UsageError: naming that image.
    """
    options = tf.data.Options()
    # Examples are decoded in parallel, so that one need not be.
    options.threading.max_intra_op_parallelism = 1
    batches = (
        records.map(example, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size, drop_remainder=drop_remainder)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(options)
    )
    decode_error = tf.errors.InvalidArgumentError  # `tf` is gone at interpreter exit
    done = 0
    try:
        for batch in batches.as_numpy_iterator():
            yield batch
            done += 1
    except decode_error as error:
        rest = records.skip(done * batch_size)
        raise UsageError(
            f"The image {_first_failure(source, rest, example)} cannot be decoded: "
            f"repair it, or remove it from the data set. TensorFlow says: {error}"
        ) from error


def _first_failure(
    source: Source, records: tf.data.Dataset, example: Callable[..., Record]
) -> str:
    """Returns the ``id`` of the first record on which ``example`` fails."""
    as_graph = tf.function(example)  # So that the failure is the same as in a batch.
    for element in records:
        arguments = element if isinstance(element, tuple) else (element,)
        try:
            as_graph(*arguments)
        except tf.errors.InvalidArgumentError:
            return (
                source.load(arguments[0])["id"]
                .numpy()
                .decode(errors="backslashreplace")
            )
    return "(which one was not found)"


def _padded(batch: Batch, batch_size: int) -> Batch:
    """Pads a batch with zeros and marks its own examples in ``mask``."""
    missing = batch_size - len(batch["label"])
    padded = {
        name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        for name, array in batch.items()
    }
    return {**padded, "mask": np.arange(batch_size) < batch_size - missing}
