"""TensorFlow Datasets as a source: any prepared image classification set, by name."""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from wf_vit.data import records
from wf_vit.data.config import ON_ERROR
from wf_vit.data.source import Record, Source
from wf_vit.data.tensorflow import tf, tfds
from wf_vit.errors import UsageError

# Read at the same time, of all groups of a split together; each holds 8 MiB.
_OPEN_FILES = 16


def open_tfds(name: str, data_dir: str, on_error: str = ON_ERROR[0]) -> Source:
    """Opens a prepared TFDS data set; never downloads one.

    Args:
      name: as ``tfds.builder`` takes it; a data set without code is opened from the
        files in ``data_dir/name``.
      data_dir: TFDS folder, gs:// paths too; '' is TFDS's default.
      on_error: one of ``ON_ERROR``.

    Raises:
      UsageError: the name is unknown, or it is no image classification set.
    """
    return builder_source(open_builder(name, data_dir), on_error)


def open_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of a TFDS data set, prepared or not; see ``open_tfds``.

    Raises:
      UsageError: the name is unknown.
    """
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        raise UsageError(_unknown(name, data_dir)) from error
    except (AssertionError, ImportError, OSError, TypeError, ValueError) as error:
        # A malformed name, an unknown version or configuration, a missing package.
        cause = str(error).splitlines()[0]
        raise UsageError(
            f"TFDS cannot open the data set {name!r}: {cause} Expected a name such as "
            "'cifar10', 'cifar10_corrupted/fog_1' or 'imagenet2012:5.1.0' (given a "
            "version, TFDS reads prepared files without its own code): correct "
            "config.data.name."
        ) from error


def builder_source(
    builder: tfds.core.DatasetBuilder, on_error: str = ON_ERROR[0]
) -> Source:
    """Returns a builder's records as a source.

    Args:
      builder: prepared, or not yet, or of mocked data.
      on_error: one of ``ON_ERROR``; "skip" puts empty records in the place of those
        that the files have lost.

    Raises:
      UsageError: the builder's features are no image with one class label.
    """
    image, label = _supervised_features(builder)
    # Only these two are parsed: segmentation masks and the like stay undecoded too.
    decoders = tfds.decode.PartialDecoding(
        {image: True, label: True}, decoders={image: tfds.decode.SkipDecoding()}
    )
    features = decoders.extract_features(builder.info.features)

    def count(split: Any) -> int:
        if not builder.is_prepared():
            return int(_mocked(builder, split, decoders).cardinality())
        return len(shards_of(split))

    def read(split: Any, shuffle_seed: tf.Tensor | None) -> tf.data.Dataset:
        if not builder.is_prepared():
            return _mocked(builder, split, decoders)
        return read_range(split, 0, count(split), shuffle_seed)

    def read_range(
        split: Any,
        begin: int | tf.Tensor,
        end: int | tf.Tensor,
        shuffle_seed: tf.Tensor | None,
        *,
        groups: int = 1,
    ) -> tf.data.Dataset:
        return shards_of(split).read(
            begin,
            end,
            seed=shuffle_seed,
            open_files=max(_OPEN_FILES // groups, 1),
            on_error=on_error,
        )

    def shards_of(split: Any) -> records.Shards:
        with _explained(builder, split):
            return records.Shards.of(builder, split)

    def load(record: Record) -> Record:
        parsed = record
        if "record" in record:
            parsed = features.deserialize_example(
                record["record"], decoders=decoders.decoders
            )
        return {
            "image": parsed[image],
            "label": parsed[label],
            "id": identify(record),
        }

    def identify(record: Record) -> tf.Tensor:
        if "tfds_id" in record:
            return record["tfds_id"]
        return records.identity(record["number"], records.file_names(builder))

    def check(splits: Iterable[Any]) -> None:
        if builder.is_prepared():
            for split in splits:
                shards_of(split)
            records.check_files(builder, splits, on_error=on_error)

    def damage(split: Any) -> str:
        return shards_of(split).damage() if builder.is_prepared() else ""

    return Source(
        class_names=tuple(builder.info.features[label].names),
        count=count,
        read=read,
        read_range=read_range,
        load=load,
        identify=identify,
        check=check,
        damage=damage,
    )


def _mocked(
    builder: tfds.core.DatasetBuilder, split: Any, decoders: Any
) -> tf.data.Dataset:
    """Reads a data set without files: of ``tfds.testing``, or none.

    Raises:
      UsageError: it is not mocked, and not prepared.
    """
    config = tfds.ReadConfig(add_tfds_id=True, try_autocache=False)
    try:
        with _explained(builder, split):
            return builder.as_dataset(
                split=split, decoders=decoders, read_config=config
            )
    except AssertionError as error:
        # The attempt is the test: `is_prepared()` is False for mocked data.
        raise UsageError(_not_prepared(builder)) from error


@contextlib.contextmanager
def _explained(builder: tfds.core.DatasetBuilder, split: Any) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(
            f"Data set {builder.name!r} cannot read the split {split!r}: {error} "
            f"It has {describe_splits(builder)}; set config.data.train and "
            "config.data.eval to specifications of these, such as 'train[:90%]'."
        ) from error


def _supervised_features(builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """Returns the names of the image and of the label."""
    features = builder.info.features
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    pair = builder.info.supervised_keys or ("image", "label")
    if pair[0] in images and pair[1] in labels:
        return pair[0], pair[1]
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    raise UsageError(
        f"Data set {builder.name!r} has the features {list(features)}, expected an "
        "image and one class label: choose an image classification set."
    )


def describe_splits(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the splits and their sizes, for messages."""
    sizes = [
        f"{str(k)!r} ({v.num_examples} examples)"
        for k, v in builder.info.splits.items()
    ]
    return ", ".join(sizes) or "no splits"


def _unknown(name: str, data_dir: str) -> str:
    known = {"digits", "folder", *tfds.list_builders(with_community_datasets=False)}
    root = data_dir or str(tfds.core.constants.DATA_DIR)
    close = difflib.get_close_matches(name, known) or ["digits", "cifar10"]
    return (
        f"Data set {name!r} is unknown: TFDS has none of this name, and there are no "
        f"prepared files in {root}/{name}. Close to it: {', '.join(close)}. Set "
        "config.data.name to one of these, config.data.data_dir to the folder that "
        f"holds {name!r}, or config.data.name='folder' with config.data.data_dir set "
        "to a folder of class folders of images."
    )


def _not_prepared(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the three steps to get a data set."""
    root = builder.data_dir_root
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        get = f"{manual_instructions(builder)} The folder is {manual_dir(builder)}"
    else:
        get = f"Make sure that {root} has room; the next step downloads into it."
    return (
        f"Data set {builder.name!r} is not prepared in {root}. Three steps get it:\n"
        f"  1. {get}\n"
        "  2. Prepare it, once: repeat this command with --config.task=prepare "
        f"--config.data.data_dir={root}\n"
        f"  3. Run this command again with --config.data.data_dir={root}"
    )


def manual_instructions(builder: tfds.core.DatasetBuilder) -> str:
    """Returns what TFDS says of files that must be downloaded by hand, or ''."""
    return " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())


def manual_dir(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the folder (TFDS: manual_dir) of files that are downloaded by hand."""
    return os.path.join(builder.data_dir_root, "downloads", "manual")
