"""The records of prepared TFDS files, any range of which can be read.

TFDS's own reader takes a range as Python's numbers, and builds its graph again for each
one, which takes a quarter of a second. Here the range is a tensor. The order of the
files and of their records is that of TFDS.
"""

import bisect
import dataclasses
import logging
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tensorflow_datasets.core import file_adapters

from wf_vit.data.config import ON_ERROR, printable
from wf_vit.data.tensorflow import tf, tfds
from wf_vit.errors import UsageError

_LOG = logging.getLogger(__name__)

# Records in a row from one file: far cheaper than TFDS's 16; the shuffle buffer is much
# longer anyway.
_BLOCK = 64

# TFRecord: length, its checksum, the data, their checksum.
_LENGTH = struct.Struct("<Q")
_HEADER, _FOOTER = 12, 4

# A record's number holds that of its file above these bits.
_RECORD_BITS = 40

_SHARD = re.compile(r"-\d{5,}-of-\d{5,}$")


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a split, and which of their records belong to it.

    Attributes:
      paths: of the files.
      skips: records before the first one, of each file.
      takes: how many records there are from that one on.
      lengths: all records of each file.
      numbers: of each file among all of the data set (``file_names``).
      file_format: TFDS's name of it.
    """

    paths: tuple[str, ...]
    skips: tuple[int, ...]
    takes: tuple[int, ...]
    lengths: tuple[int, ...]
    numbers: tuple[int, ...]
    file_format: Any

    @classmethod
    def of(cls, builder: tfds.core.DatasetBuilder, split: Any) -> "Shards":
        """Returns the files of a split.

        Raises:
          ValueError: there is no such split, or it is empty.
        """
        files = builder.info.splits[split].file_instructions
        if not files:
            raise ValueError(f"{split!r} corresponds to no data!")
        names = file_names(builder)
        return cls(
            paths=tuple(os.fspath(file.filename) for file in files),
            skips=tuple(file.skip for file in files),
            takes=tuple(file.take for file in files),
            lengths=tuple(file.examples_in_shard for file in files),
            numbers=tuple(
                bisect.bisect_left(names, os.fsencode(os.path.basename(file.filename)))
                for file in files
            ),
            file_format=builder.info.file_format or file_adapters.DEFAULT_FILE_FORMAT,
        )

    def __len__(self) -> int:
        return sum(self.takes)

    def read(
        self,
        begin: int | tf.Tensor,
        end: int | tf.Tensor,
        *,
        seed: tf.Tensor | None,
        open_files: int,
        on_error: str,
    ) -> tf.data.Dataset:
        """Reads a range of the records.

        Args:
          begin: the first record.
          end: the one after the last.
          seed: shuffles the files; None: does not.
          open_files: from how many files records are taken in turns.
          on_error: "skip": what cannot be read any more of a file becomes empty
            records, in its place.

        Returns:
          ``{'record', 'number'}``: the serialized example, and which one it is
          (``identity``), which costs less than its name.
        """
        starts = np.cumsum((0, *self.takes[:-1]))
        first, last = (
            tf.clip_by_value(tf.cast(bound, tf.int64) - starts, 0, self.takes)
            for bound in (begin, end)
        )
        paths = [os.fsencode(path) for path in self.paths]
        if on_error == "skip":
            usable = map(_is_readable, self.paths)
            paths = [p if u else b"" for p, u in zip(paths, usable, strict=True)]
        parts = {
            "path": tf.constant(paths),
            "number": tf.constant(self.numbers, tf.int64),
            "skip": first + self.skips,
            "take": last - first,
            "length": tf.constant(self.lengths, tf.int64),
        }
        used = tf.where(last > first)[:, 0]
        files = tf.data.Dataset.from_tensor_slices(
            {name: tf.gather(part, used) for name, part in parts.items()}
        )
        if seed is not None:
            files = files.shuffle(
                len(self.paths), seed=seed, reshuffle_each_iteration=False
            )
        return files.interleave(
            lambda file: self._records(file, on_error),
            cycle_length=open_files,
            block_length=_BLOCK,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )

    def _records(self, file: dict[str, tf.Tensor], on_error: str) -> tf.data.Dataset:
        adapter = file_adapters.ADAPTER_FOR_FORMAT[self.file_format]
        if on_error == "skip":
            # A file that cannot be opened would be tried again for ever.
            there = tf.io.matching_files(
                tf.strings.regex_replace(file["path"], r"([\[\]*?\\])", r"[\1]")
            )
            found = tf.data.Dataset.from_tensor_slices(there)
            lost = tf.data.Dataset.from_tensors(b"").repeat(file["length"])
            records = found.flat_map(adapter.make_tf_data).ignore_errors()
            records = records.concatenate(lost)
        else:
            records = adapter.make_tf_data(file["path"])
        records = records.skip(file["skip"]).take(file["take"])
        # A file that ends early would shift all that follows.
        records = records.apply(tf.data.experimental.assert_cardinality(file["take"]))
        first = file["number"] * 2**_RECORD_BITS + file["skip"]
        numbers = tf.data.Dataset.range(first, first + file["take"])
        return tf.data.Dataset.zip({"record": records, "number": numbers})

    def damage(self) -> str:
        """Reads all files and says which one is damaged, and how; '': none."""
        _LOG.info("Looking for the damaged one of %d files.", len(self.paths))
        adapter = file_adapters.ADAPTER_FOR_FORMAT[self.file_format]
        for path, length in zip(self.paths, self.lengths, strict=True):
            count = 0
            try:
                for _ in adapter.make_tf_data(path):
                    count += 1
            except tf.errors.OpError as error:
                return f"{printable(path)}, after {count} records: {error.message}"
            if count != length:
                return f"{printable(path)}: {count} records, where {length} belong"
        return ""


def file_names(builder: tfds.core.DatasetBuilder) -> list[bytes]:
    """Returns the names of all files of a data set; in this order they are numbered."""
    infos = builder.info.splits.values()
    return sorted(os.fsencode(name) for info in infos for name in info.filenames)


def identity(number: tf.Tensor, names: list[bytes]) -> tf.Tensor:
    """Returns what TFDS calls a record: its file's name and its number there."""
    name = tf.gather(tf.constant(names), number // 2**_RECORD_BITS)
    index = tf.strings.as_string(number % 2**_RECORD_BITS)
    return tf.strings.join([name, index], "__")


def check_files(
    builder: tfds.core.DatasetBuilder, splits: Iterable[Any], *, on_error: str
) -> None:
    """Checks that the files of some splits are there, and complete as far as is cheap.

    On this machine also their sizes are compared. With ``on_error="skip"`` a warning
    says what is wrong, as long as there is anything to read.

    Args:
      builder: of prepared data.
      splits: TFDS split specifications.
      on_error: one of ``ON_ERROR``.

    Raises:
      UsageError: a file is missing, empty, cut off, or one too many.
    """
    for name in _stored(builder, splits):
        info = builder.info.splits[name]
        paths = [os.fspath(path) for path in info.filepaths]
        here = not any("://" in path for path in paths)
        present = _present(paths)
        missing = [path for path in paths if os.path.basename(path) not in present]
        empty = [p for p in paths if here and p not in missing and not _size(p)]
        closed = [path for path in paths if not _is_readable(path)]
        unusable = len({*missing, *empty, *closed})
        problems = [
            *(f"{printable(path)} is missing" for path in missing),
            *(f"{printable(path)} is empty" for path in empty),
            *(f"{printable(path)} may not be read" for path in closed),
            *(
                f"{printable(path)} is one too many"
                for path in _surplus(paths, present)
            ),
        ]
        if here and not problems:
            problems += _cut_off(info, paths, builder.info.file_format)
        if not problems:
            continue
        text = (
            f"The split {name!r} of data set {builder.name!r} should have {len(paths)} "
            f"files with {info.num_examples} examples, but {'; '.join(problems[:5])}"
            f"{f'; and {len(problems) - 5} more' if len(problems) > 5 else ''}."
        )
        if on_error == ON_ERROR[0] or unusable == len(paths):
            raise UsageError(
                f"{text} Copy or prepare the data set again, move away what is too "
                "much, or set config.data.on_error='skip' to leave out what cannot "
                "be read."
            )
        _LOG.warning("%s config.data.on_error='skip': the rest is used.", text)


def _stored(builder: tfds.core.DatasetBuilder, splits: Iterable[Any]) -> Sequence[str]:
    """Returns the names of the stored splits that specifications take from."""
    names: dict[str, None] = {}
    for split in splits:
        spec = tfds.core.splits.AbstractSplit.from_spec(split)
        for part in spec.to_absolute(builder.info.splits):
            names[part.splitname] = None
    return list(names)


def _present(paths: Sequence[str]) -> set[str]:
    """Returns the names of all files beside those of a split."""
    names: set[str] = set()
    for folder in {os.path.dirname(path) for path in paths}:
        if tf.io.gfile.isdir(folder):
            names |= set(tf.io.gfile.listdir(folder))
    return names


def _is_readable(path: str) -> bool:
    return "://" in path or not os.path.exists(path) or os.access(path, os.R_OK)


def _size(path: str) -> int:
    """Returns the bytes of a file of this machine; 0 if it is none."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _surplus(paths: Sequence[str], present: set[str]) -> Sequence[str]:
    """Returns the files that are named like shards of a split, and are none."""
    expected = {os.path.basename(path) for path in paths}
    stems = {_SHARD.sub("", name) for name in expected if _SHARD.search(name)}
    return sorted(
        name
        for name in present - expected
        if _SHARD.search(name) and _SHARD.sub("", name) in stems
    )


def _cut_off(info: Any, paths: Sequence[str], file_format: Any) -> list[str]:
    """Returns the files whose records are not as many as TFDS wrote.

    The files are only looked into if their sizes do not add up.
    """
    overhead = (_HEADER + _FOOTER) * info.num_examples
    total = sum(map(_size, paths))
    is_tfrecord = file_format == file_adapters.FileFormat.TFRECORD
    if not is_tfrecord or not info.num_bytes or total == info.num_bytes + overhead:
        return []
    problems = []
    for path, expected in zip(paths, info.shard_lengths, strict=True):
        found = sum(1 for _ in _lengths(path))
        if found != expected:
            problems.append(
                f"{printable(path)} has {found} whole records where {expected} belong"
            )
    return problems


def _lengths(path: str) -> Iterator[int]:
    """Yields the bytes of each whole record of a TFRecord file."""
    size, position = _size(path), 0
    with open(path, "rb") as file:
        while position + _HEADER + _FOOTER <= size:
            file.seek(position)
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            position += _HEADER + length + _FOOTER
            if position > size:
                return
            yield length
