"""A folder of images as a source: root/class/image or root/split/class/image.

`tfds.ImageFolder` needs the split level, reads every file before it can shuffle or
skip, and has no slices of splits; so the list of files is kept here, and TFDS's own
split arithmetic is applied to it.
"""

import collections
import hashlib
import itertools
import logging
import os
import posixpath
from typing import Any

from wf_vit.data import files
from wf_vit.data.config import ON_ERROR, printable
from wf_vit.data.source import Record, Source
from wf_vit.data.tensorflow import tf, tfds
from wf_vit.errors import UsageError

_LOG = logging.getLogger(__name__)

# Pictures that nothing here can decode: to leave them out would be no help.
_UNREADABLE = (".heic", ".heif", ".jxl")
_LAYOUT = (
    "expected root/class/image.jpg, or root/split/class/image.jpg, with config.data."
    "data_dir set to root"
)

# What TFDS calls a lone split; its 'all' means every split, and cannot be sliced.
_ONE_SPLIT = "train"

# Top folders are splits if all have such names, even if images lie beside the classes.
_SPLIT_NAMES = {
    *("train", "training", "val", "valid", "validation", "dev", "eval", "test"),
    "testing",
}

# Class name -> paths of its images, relative to the root.
_Classes = dict[str, list[str]]


def open_folder(root: str, on_error: str = ON_ERROR[0]) -> Source:
    """Opens a folder of images.

    Classes are the sorted names of the class folders; folders in them, links included,
    belong to the class (``wf_vit.data.files`` says what is an image). Without a split
    level, the one split is 'train'. In every split the classes are interleaved evenly
    and files come in a fixed pseudo-random order within a class, so that any slice
    ('train[:80%]') holds nearly the same share of every class. The log says how many
    images are used, and what is left out.

    Args:
      root: the folder; gs:// paths work too.
      on_error: one of ``ON_ERROR``; "skip" leaves out links that lead nowhere.

    Raises:
      UsageError: the folder is missing, has no images, has a class without images,
        links that lead nowhere or images in a format that cannot be decoded.
    """
    is_folder = tf.io.gfile.isdir if "://" in root else os.path.isdir
    if not root or not is_folder(root):
        raise UsageError(
            f"The folder of images '{printable(root)}' does not exist: {_LAYOUT}."
        )
    splits, lost, left_out = _find(root)
    if lost and on_error == ON_ERROR[0]:
        raise UsageError(
            f"{len(lost)} links in the folder {printable(root)} lead nowhere, such as "
            f"{printable(lost[0])}: restore what they lead to, remove them, or set "
            "config.data.on_error='skip' to leave them out."
        )
    left_out["link that leads nowhere"] += len(lost)
    left_out = +left_out
    _check(root, splits)
    class_names = sorted({name for classes in splits.values() for name in classes})
    examples = {
        split: _interleave(classes, class_names) for split, classes in splits.items()
    }
    _LOG.info(
        "Used %d images of %d classes in %s; left out: %s.",
        sum(len(paths) for paths, _ in examples.values()),
        len(class_names),
        printable(root),
        files.left_out_text(left_out),
    )
    infos = tfds.core.SplitDict(
        [
            tfds.core.SplitInfo(name=split, shard_lengths=[len(paths)], num_bytes=0)
            for split, (paths, _) in examples.items()
        ]
    )

    def examples_of(split: Any) -> tuple[list[str], list[int]]:
        paths, labels = [], []
        for part in _slices(split, infos, root):
            paths += examples[part.splitname][0][part.from_ : part.to]
            labels += examples[part.splitname][1][part.from_ : part.to]
        if not paths:
            raise UsageError(
                f"The split {split!r} of the folder {printable(root)} is empty."
            )
        return paths, labels

    def read(split: Any, shuffle_seed: tf.Tensor | None) -> tf.data.Dataset:
        return read_range(split, 0, None, shuffle_seed)

    def read_range(
        split: Any,
        begin: int | tf.Tensor,
        end: int | tf.Tensor | None,
        shuffle_seed: tf.Tensor | None,
        *,
        groups: int = 1,
    ) -> tf.data.Dataset:
        del groups
        paths, labels = examples_of(split)
        records = tf.data.Dataset.from_tensor_slices(
            {
                "path": tf.constant([os.fsencode(path) for path in paths])[begin:end],
                "label": tf.constant(labels, tf.int64)[begin:end],
            }
        )
        if shuffle_seed is None:
            return records
        # Paths are small, so the whole split is shuffled, whatever the buffer.
        return records.shuffle(
            len(paths), seed=shuffle_seed, reshuffle_each_iteration=False
        )

    def load(record: Record) -> Record:
        folder = os.fsencode(root.rstrip("/"))
        path = tf.strings.join([folder, record["path"]], "/")
        return {
            "image": tf.io.read_file(path),
            "label": record["label"],
            "id": record["path"],
        }

    return Source(
        class_names=tuple(class_names),
        count=lambda split: len(examples_of(split)[0]),
        read=read,
        read_range=read_range,
        load=load,
        identify=lambda record: record["path"],
    )


def _find(
    root: str,
) -> tuple[dict[str, _Classes], list[str], collections.Counter[str]]:
    """Returns the images of every class of every split, what is lost and left out."""
    left_out: collections.Counter[str] = collections.Counter()
    top = _listed(root)
    below = {name: _listed(posixpath.join(root, name)) for name in _folders(top)}
    left_out += _outside(top)
    lost = _lost("", top)
    has_images = any(map(_images, below.values()))
    named_splits = {name.lower() for name in below} <= _SPLIT_NAMES
    nested = any(map(_folders, below.values()))
    if has_images and not (named_splits and nested):
        folders = {_ONE_SPLIT: {name: name for name in below}}
    else:
        folders = {
            split: {name: posixpath.join(split, name) for name in _folders(entries)}
            for split, entries in below.items()
        }
        left_out += sum(map(_outside, below.values()), collections.Counter())
        lost += itertools.chain(*itertools.starmap(_lost, below.items()))
    splits: dict[str, _Classes] = {}
    for split, classes in folders.items():
        for name, folder in classes.items():
            found = files.find_images(posixpath.join(root, folder), entries=_listed)
            _check_formats(posixpath.join(root, folder), found.left_out)
            left_out += found.left_out
            lost += [posixpath.join(folder, path) for path in found.lost]
            splits.setdefault(split, {})[name] = [
                posixpath.join(folder, path) for path in found.images
            ]
    return splits, lost, left_out


def _listed(folder: str) -> list[files.Entry]:
    """Lists a folder, here or elsewhere (gs://)."""
    if "://" not in folder:
        return sorted(files.local_entries(folder))
    entries = []
    for listed in tf.io.gfile.listdir(folder):
        name = listed.rstrip("/")
        # gs:// adds '/' to folders; to ask of every image would take minutes.
        is_folder = listed != name or (
            not name.lower().endswith(files.SUFFIXES)
            and tf.io.gfile.isdir(posixpath.join(folder, name))
        )
        if name:
            entries.append(files.Entry(name, is_folder, is_link=False))
    return sorted(entries)


def _folders(entries: list[files.Entry]) -> list[str]:
    return [e.name for e in entries if e.is_folder and not e.name.startswith(".")]


def _images(entries: list[files.Entry]) -> list[str]:
    return [
        e.name
        for e in entries
        if not (e.is_folder or files.is_lost(e) or files.reason_to_leave_out(e))
    ]


def _lost(folder: str, entries: list[files.Entry]) -> list[str]:
    return [posixpath.join(folder, e.name) for e in entries if files.is_lost(e)]


def _outside(entries: list[files.Entry]) -> collections.Counter[str]:
    """Counts what lies beside the folders of classes, by the reason to leave it out."""
    kept = [entry for entry in entries if not files.is_lost(entry)]
    reasons = map(files.reason_to_leave_out, kept)
    count = collections.Counter(reason for reason in reasons if reason)
    count["outside of a class"] = len(_images(entries))
    return +count


def _check_formats(folder: str, left_out: collections.Counter[str]) -> None:
    wrong = {suffix: left_out[suffix] for suffix in _UNREADABLE if left_out[suffix]}
    if wrong:
        raise UsageError(
            f"{printable(folder)} has {sum(wrong.values())} images that cannot be "
            f"decoded ({', '.join(wrong)}): convert them to one of "
            f"{', '.join(files.SUFFIXES)}, or move them away."
        )


def _check(root: str, splits: dict[str, _Classes]) -> None:
    if not splits:
        raise UsageError(
            f"The folder {printable(root)} has no class with images: {_LAYOUT}."
        )
    for split, classes in splits.items():
        empty = [name for name, paths in classes.items() if not paths]
        if empty:
            raise UsageError(
                f"{len(empty)} classes of the folder {printable(root)} (split "
                f"'{printable(split)}') have no images ({', '.join(files.SUFFIXES)}), "
                f"such as '{printable(empty[0])}': "
                f"{_LAYOUT}. Add images or remove the folders."
            )


def _interleave(
    classes: _Classes, class_names: list[str]
) -> tuple[list[str], list[int]]:
    """Returns paths and labels, every class spread evenly over the list."""
    placed = []
    for name, paths in classes.items():
        # By hash: neighbours in name are often frames of one scene.
        shuffled = sorted(
            paths, key=lambda path: hashlib.md5(os.fsencode(path)).digest()
        )
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
            f"The folder {printable(root)} cannot read the split {split!r}: {error} It "
            f"has the splits {sorted(infos)}; set config.data.train and "
            "config.data.eval to specifications of these, such as 'train[:80%]'."
        ) from error
