"""A data set of small images in one file, to be read without TensorFlow.

    python -m benchmarks.packed --name=cifar10 --output=cifar10.npz [--data_dir=DIR]

The file holds the encoded images of the splits "train" and "test" as they are in TFDS.
CIFAR-10 with its images as JPEG takes 18 MB.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags
from jaxtyping import Int, UInt8
from PIL import Image

from wf_vit.errors import UsageError

SPLITS = ("train", "test")


class Split(NamedTuple):
    """Decoded images and their classes."""

    images: UInt8[np.ndarray, "B height width 3"]
    labels: Int[np.ndarray, " B"]


def pack(name: str, data_dir: str, output: Path) -> None:
    """Writes the encoded images and the labels of a prepared TFDS data set."""
    from wf_vit.data.tfds_source import open_tfds

    source = open_tfds(name, data_dir)
    arrays = {"class_names": np.array(source.class_names)}
    for split in SPLITS:
        records = source.read(split, None).map(source.load).as_numpy_iterator()
        encoded, labels = zip(*((r["image"], r["label"]) for r in records), strict=True)
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{split}_lengths"] = np.array([len(e) for e in encoded], np.int32)
        arrays[f"{split}_labels"] = np.array(labels, np.int32)
    np.savez_compressed(output, **arrays)


def load(path: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Returns the splits and the names of the classes.

    Raises:
      UsageError: there is no such file.
    """
    if not path.exists():
        raise UsageError(
            f"There is no {path}: make it with python -m benchmarks.packed "
            f"--name=cifar10 --output={path}."
        )
    splits = {}
    with np.load(path) as arrays:
        for split in SPLITS:
            ends = np.cumsum(arrays[f"{split}_lengths"])[:-1]
            encoded = np.split(arrays[f"{split}_bytes"], ends)
            images = [Image.open(io.BytesIO(e)).convert("RGB") for e in encoded]
            splits[split] = Split(
                np.stack([np.asarray(image) for image in images]),
                arrays[f"{split}_labels"],
            )
        return splits, tuple(map(str, arrays["class_names"]))


def main(argv: list[str]) -> None:
    """Packs the data set that the flags name."""
    del argv
    output = Path(_OUTPUT.value)
    pack(_NAME.value, _DATA_DIR.value, output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    _NAME = flags.DEFINE_string("name", "cifar10", "Name of a prepared TFDS data set.")
    _DATA_DIR = flags.DEFINE_string("data_dir", "", "TFDS folder; '' is the default.")
    _OUTPUT = flags.DEFINE_string("output", "cifar10.npz", "File to write.")
    app.run(main)
