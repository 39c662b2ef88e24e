"""TensorFlow Datasets as a source: any prepared image classification set, by name."""

import difflib
import os
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from wf_vit.data.source import Record, Source
from wf_vit.errors import UsageError


def open_tfds(name: str, data_dir: str) -> Source:
    """Opens a prepared TFDS data set; never downloads one.

    Args:
      name: as ``tfds.builder`` takes it; a data set without code is opened from the
        files in ``data_dir/name``.
      data_dir: TFDS folder, gs:// paths too; '' is TFDS's default.

    Raises:
      UsageError: the name is unknown, or it is no image classification set.
    """
    return builder_source(open_builder(name, data_dir))


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


def builder_source(builder: tfds.core.DatasetBuilder) -> Source:
    """Returns a builder's records as a source.

    Raises:
      UsageError: the builder's features are no image with one class label.
    """
    image, label = _supervised_features(builder)
    # Only these two are parsed: segmentation masks and the like stay undecoded too.
    decoders = tfds.decode.PartialDecoding(
        {image: True, label: True}, decoders={image: tfds.decode.SkipDecoding()}
    )

    def read(split: Any, shuffle_seed: tf.Tensor | None) -> tf.data.Dataset:
        read_config = tfds.ReadConfig(
            shuffle_seed=shuffle_seed,
            shuffle_reshuffle_each_iteration=False,
            add_tfds_id=True,
            try_autocache=False,
            # Far cheaper than TFDS's 16; the shuffle buffer is much longer anyway.
            interleave_block_length=64,
        )
        try:
            return builder.as_dataset(
                split=split,
                shuffle_files=shuffle_seed is not None,
                decoders=decoders,
                read_config=read_config,
            )
        except AssertionError as error:
            # The attempt is the test: `is_prepared()` is False for mocked data.
            raise UsageError(_not_prepared(builder)) from error
        except ValueError as error:
            raise UsageError(
                f"Data set {builder.name!r} cannot read the split {split!r}: {error} "
                f"It has {describe_splits(builder)}; set config.data.train and "
                "config.data.eval to specifications of these, such as 'train[:90%]'."
            ) from error

    def load(record: Record) -> Record:
        return {
            "image": record[image],
            "label": record[label],
            "id": record["tfds_id"],
        }

    names = tuple(builder.info.features[label].names)
    return Source(class_names=names, read=read, load=load)


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
