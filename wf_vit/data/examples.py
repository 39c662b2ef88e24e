"""From records to batches of examples; what cannot be read is named, or masked."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from wf_vit.data.config import Size, printable
from wf_vit.data.source import Record, Source
from wf_vit.data.tensorflow import tf
from wf_vit.errors import UsageError

Batch = dict[str, np.ndarray]

# TensorFlow would rewrite every function that makes an example, to turn Python's `if`
# into its own. There is none on a tensor, and the rewriting takes a second.
_as_it_is = tf.autograph.experimental.do_not_convert

_HINT = (
    "repair it, remove it from the data set, or set config.data.on_error='skip' to "
    "leave out what cannot be used"
)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the records of a split become examples.

    Attributes:
      source: of the records.
      split: they are of, for messages.
      example: from the elements of a dataset of records to ``{'image', 'label'}``.
      image_size: ``(height, width)`` of the images.
      on_error: "stop" or "skip", see ``DataConfig``.
    """

    source: Source
    split: Any
    example: Callable[..., Record]
    image_size: Size
    on_error: str

    def dataset(
        self, records: tf.data.Dataset, batch_size: int, *, drop_remainder: bool
    ) -> tf.data.Dataset:
        """Returns the batches of records, to be read any number of times.

        Args:
          records: of the split.
          batch_size: B.
          drop_remainder: whether to leave out a last batch that is not full.
        """
        options = tf.data.Options()
        # Examples are decoded in parallel, so that one need not be.
        options.threading.max_intra_op_parallelism = 1
        make = self._masked if self._skips else self._mapped
        return (
            make(records)
            .batch(batch_size, drop_remainder=drop_remainder)
            .prefetch(tf.data.AUTOTUNE)
            .with_options(options)
        )

    def batches(
        self,
        dataset: tf.data.Dataset,
        records_after: Callable[[int], tf.data.Dataset],
    ) -> Iterator[Batch]:
        """Yields batches of examples, in the order of the records.

        Args:
          dataset: of `dataset`.
          records_after: returns its records that follow so many batches; they are read
            again to name one that cannot be used.

        Yields:
          ``image``, ``label`` and, with ``on_error="skip"``, ``mask`` bool ``[B]``,
          false where an example could not be read: its image and label are 0.

        Raises:
          UsageError: naming the example or the file that cannot be read.
        """
        data_error = tf.errors.OpError  # `tf` is gone at interpreter exit
        done = 0
        try:
            for batch in dataset.as_numpy_iterator():
                if not self._skips and not self._has_classes(batch["label"]):
                    raise UsageError(self._bad_label(records_after(done)))
                yield batch
                done += 1
        except data_error as error:
            raise UsageError(self._cause(error, lambda: records_after(done))) from error

    @property
    def _skips(self) -> bool:
        return self.on_error == "skip"

    def _mapped(self, records: tf.data.Dataset) -> tf.data.Dataset:
        return records.map(_as_it_is(self.example), num_parallel_calls=tf.data.AUTOTUNE)

    def _masked(self, records: tf.data.Dataset) -> tf.data.Dataset:
        """Puts zeros, and a mask of false, in the place of what cannot be read."""
        classes = len(self.source.class_names)
        nothing = {
            "image": tf.zeros((*self.image_size, 3), tf.uint8),
            "label": tf.zeros((), tf.int32),
            "mask": False,
        }

        @_as_it_is
        def whole(*record: Any) -> Record:
            found = self.example(*record)
            label = found["label"]
            check = tf.debugging.Assert((label >= 0) & (label < classes), [label])
            with tf.control_dependencies([check]):
                return {**found, "label": tf.identity(label), "mask": tf.constant(True)}

        @_as_it_is
        def one(*record: Any) -> tf.data.Dataset:
            found = tf.data.Dataset.from_tensors(record).map(whole).ignore_errors()
            return found.concatenate(tf.data.Dataset.from_tensors(nothing)).take(1)

        return records.interleave(
            one, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )

    def _has_classes(self, labels: np.ndarray) -> bool:
        known = (labels >= 0) & (labels < len(self.source.class_names))
        return bool(known.all())

    def _bad_label(self, records: tf.data.Dataset) -> str:
        """Returns a message that names the first example without a class."""
        for element in records:
            record = self._record(element)
            label = int(self.source.load(record)["label"])
            if not self._has_classes(np.array([label])):
                break
        count = len(self.source.class_names)
        return (
            f"The example {self._name(record)} has the label {label}, but there are "
            f"{count} classes, 0 to {count - 1}: {_HINT}."
        )

    def _cause(self, error: Any, records: Callable[[], tf.data.Dataset]) -> str:
        """Returns a message that names the example or the file of an error."""
        if not isinstance(error, tf.errors.InvalidArgumentError):
            damage = self.source.damage(self.split)
            if damage:
                return (
                    f"A file of the split {self.split!r} is damaged: {damage}. Copy or "
                    "prepare the data set again, or set config.data.on_error='skip' to "
                    "use what can be read."
                )
        name, error = self._first_failure(records(), error)
        return (
            f"The image {name} cannot be decoded: {_HINT}. TensorFlow says: "
            f"{printable(error.message)}"
        )

    def _first_failure(self, records: tf.data.Dataset, error: Any) -> tuple[str, Any]:
        """Returns the name of the first record of which no example can be made."""
        as_graph = tf.function(self.example)  # The failure is the same as in a batch.
        for element in records:
            arguments = element if isinstance(element, tuple) else (element,)
            try:
                as_graph(*arguments)
            except tf.errors.OpError as failure:
                return self._name(self._record(element)), failure
        return "(which one was not found)", error

    def _record(self, element: Any) -> Record:
        return element[0] if isinstance(element, tuple) else element

    def _name(self, record: Record) -> str:
        return printable(self.source.identify(record).numpy())
