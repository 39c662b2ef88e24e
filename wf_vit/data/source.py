"""What every source of examples gives: undecoded records, so that skipping is cheap."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from wf_vit.data.tensorflow import tf

Record = dict[str, tf.Tensor]

# The accelerators are JAX's: TensorFlow would otherwise reserve their memory.
tf.config.set_visible_devices([], "GPU")


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that can be read.

    Attributes:
      class_names: C names; a label is an index into them.
      count: of the examples of a split; raises UsageError if there is no such split, or
        it is empty.
      read: ``(split, shuffle_seed) -> dataset`` of records in the source's own form.
        ``split`` is whatever TFDS takes; a ``shuffle_seed`` (an int64 tensor, or
        None) also shuffles as much as is cheap, such as the order of the files.
      read_range: ``(split, begin, end, shuffle_seed, *, groups=1) -> dataset`` of the
        records from ``begin`` up to, and without, ``end``, int64 tensors or numbers.
        ``groups`` is how many ranges are read at the same time.
      load: from such a record to ``{'image', 'label', 'id'}``: the encoded bytes, an
        int64 and a string that names the example whatever the order or the split.
      identify: from such a record to ``id``, which also broken records have.
      check: looks at the files of splits, before anything is read; raises UsageError.
      damage: reads the files of a split and says which one is damaged; '' if none is.
    """

    class_names: tuple[str, ...]
    count: Callable[[Any], int]
    read: Callable[[Any, tf.Tensor | None], tf.data.Dataset]
    read_range: Callable[..., tf.data.Dataset]
    load: Callable[[Record], Record]
    identify: Callable[[Record], tf.Tensor]
    check: Callable[[Iterable[Any]], None] = lambda splits: None
    damage: Callable[[Any], str] = lambda split: ""
