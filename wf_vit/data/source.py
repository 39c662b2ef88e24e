"""What every source of examples gives: undecoded records, so that skipping is cheap."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

Record = dict[str, tf.Tensor]

# The accelerators are JAX's: TensorFlow would otherwise reserve their memory.
tf.config.set_visible_devices([], "GPU")


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that can be read.

    Attributes:
      class_names: C names; a label is an index into them.
      read: ``(split, shuffle_seed) -> dataset`` of records in the source's own form.
        ``split`` is whatever TFDS takes; a ``shuffle_seed`` (an int64 tensor, or
        None) also shuffles as much as is cheap, such as the order of the files.
      load: from such a record to ``{'image', 'label', 'id'}``: the encoded bytes, an
        int64 and a string that names the example whatever the order or the split.
    """

    class_names: tuple[str, ...]
    read: Callable[[Any, tf.Tensor | None], tf.data.Dataset]
    load: Callable[[Record], Record]

    def count(self, split: Any) -> int:
        """Returns the number of examples in a split.

        Raises:
          UsageError: there is no such split, or it is empty.
        """
        return int(self.read(split, None).cardinality())
