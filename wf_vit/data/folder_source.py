"""A folder of images as a source: root/class/image or root/split/class/image.

`tfds.ImageFolder` needs the split level, reads every file before it can shuffle or
skip, and has no slices of splits; so the list of files is kept here, and TFDS's own
split arithmetic is applied to it.
"""

import hashlib
import posixpath
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from wf_vit.data.source import Record, Source
from wf_vit.errors import UsageError

_READABLE = (".jpg", ".jpeg", ".png", ".gif", ".bmp")
_UNREADABLE = (".webp", ".tif", ".tiff", ".heic", ".avif", ".jp2")
_LAYOUT = (
    "expected root/class/image.jpg, or root/split/class/image.jpg, with config.data."
    "data_dir set to root"
)

# What TFDS calls a lone split; its 'all' means every split, and cannot be sliced.
_ONE_SPLIT = "train"

# Class name -> paths of its images, relative to the root.
_Classes = dict[str, list[str]]


def open_folder(root: str) -> Source:
    """Opens a folder of images.

    Classes are the sorted names of the class folders. Without a split level, the one
    split is 'train'. In every split the classes are interleaved evenly and files come
    in a fixed pseudo-random order within a class, so that any slice ('train[:80%]')
    holds nearly the same share of every class.

    Args:
      root: the folder; gs:// paths work too.

    Raises:
      UsageError: the folder is missing, has no images, has a class without images or
        images in a format that TensorFlow cannot decode.
    """
    if not root or not tf.io.gfile.isdir(root):
        raise UsageError(f"The folder of images {root!r} does not exist: {_LAYOUT}.")
    top = {name: _images(root, name) for name in _folders(root)}
    if any(top.values()):
        splits = {_ONE_SPLIT: top}
    else:
        splits = {
            split: {
                name: _images(root, posixpath.join(split, name))
                for name in _folders(posixpath.join(root, split))
            }
            for split in top
        }
        splits = {split: classes for split, classes in splits.items() if classes}
    _check(root, splits)
    class_names = sorted({name for classes in splits.values() for name in classes})
    examples = {
        split: _interleave(classes, class_names) for split, classes in splits.items()
    }
    infos = tfds.core.SplitDict(
        [
            tfds.core.SplitInfo(name=split, shard_lengths=[len(paths)], num_bytes=0)
            for split, (paths, _) in examples.items()
        ]
    )

    def read(split: Any, shuffle_seed: tf.Tensor | None) -> tf.data.Dataset:
        paths, labels = [], []
        for part in _slices(split, infos, root):
            paths += examples[part.splitname][0][part.from_ : part.to]
            labels += examples[part.splitname][1][part.from_ : part.to]
        if not paths:
            raise UsageError(f"The split {split!r} of the folder {root} is empty.")
        records = tf.data.Dataset.from_tensor_slices(
            {"path": paths, "label": tf.constant(labels, tf.int64)}
        )
        if shuffle_seed is None:
            return records
        # Paths are small, so the whole split is shuffled, whatever the buffer.
        return records.shuffle(
            len(paths), seed=shuffle_seed, reshuffle_each_iteration=False
        )

    def load(record: Record) -> Record:
        path = tf.strings.join([root.rstrip("/"), record["path"]], "/")
        return {
            "image": tf.io.read_file(path),
            "label": record["label"],
            "id": record["path"],
        }

    return Source(class_names=tuple(class_names), read=read, load=load)


def _entries(path: str) -> list[str]:
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(path))  # gs:// adds '/'
    return sorted(name for name in names if not name.startswith("."))


def _folders(path: str) -> list[str]:
    names = _entries(path)
    return [n for n in names if tf.io.gfile.isdir(posixpath.join(path, n))]


def _images(root: str, folder: str) -> list[str]:
    """Returns the paths of a folder's images, relative to the root."""
    names = _entries(posixpath.join(root, folder))
    wrong = [name for name in names if name.lower().endswith(_UNREADABLE)]
    if wrong:
        raise UsageError(
            f"{posixpath.join(root, folder)} has {len(wrong)} images that TensorFlow "
            f"cannot decode, such as {wrong[0]}: convert them to one of "
            f"{', '.join(_READABLE)}."
        )
    readable = [name for name in names if name.lower().endswith(_READABLE)]
    return [posixpath.join(folder, name) for name in readable]


def _check(root: str, splits: dict[str, _Classes]) -> None:
    if not splits:
        raise UsageError(f"The folder {root} has no class with images: {_LAYOUT}.")
    for split, classes in splits.items():
        empty = [name for name, paths in classes.items() if not paths]
        if empty:
            raise UsageError(
                f"{len(empty)} classes of the folder {root} (split {split!r}) have no "
                f"images ({', '.join(_READABLE)}), such as {empty[0]!r}: {_LAYOUT}. "
                "Add images or remove the folders."
            )


def _interleave(
    classes: _Classes, class_names: list[str]
) -> tuple[list[str], list[int]]:
    """Returns paths and labels, every class spread evenly over the list."""
    placed = []
    for name, paths in classes.items():
        # By hash: neighbours in name are often frames of one scene.
        shuffled = sorted(paths, key=lambda path: hashlib.md5(path.encode()).digest())
        for rank, path in enumerate(shuffled):
            position = (rank + 0.5) / len(paths)
            placed.append((position, path, class_names.index(name)))
    placed.sort()
    return [path for _, path, _ in placed], [label for *_, label in placed]


def _slices(split: Any, infos: tfds.core.SplitDict, root: str) -> list:
    """Returns the absolute slices that a split specification stands for."""
    try:
        if isinstance(split, str):
            split = tfds.core.ReadInstruction.from_spec(split)
        return split.to_absolute(infos)
    except (NotImplementedError, ValueError) as error:
        raise UsageError(
            f"The folder {root} cannot read the split {split!r}: {error} It has the "
            f"splits {sorted(infos)}; set config.data.train and config.data.eval to "
            "specifications of these, such as 'train[:80%]'."
        ) from error
