"""What the training input costs, and what its fast setting does to the pixels.

``python -m benchmarks.training --input`` is the command. Files of a wanted size are
made from real photographs: windows at random, resized, encoded as JPEG.
"""

import dataclasses
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_images

from wf_vit.data import decode
from wf_vit.data.config import DataConfig, View
from wf_vit.data.pipeline import open_dataset
from wf_vit.errors import UsageError

# What is measured in turn, and the value of config.data.fast_resize.
SETTINGS = {"antialiased": False, "fast_resize": True}
# Neither: as tf.image.resize does by default. No setting; pixels to compare with.
NONE = "no antialiasing"

# Of JPEG, if none is named.
QUALITY = 90
# Share of a photograph's height and width that the windows in it have at least.
_LEAST = 0.8
# Batches that are taken before a pipeline is timed.
_FIRST = 4


@dataclasses.dataclass(frozen=True)
class Files:
    """A kind of files: JPEGs of ``width`` x ``height`` pixels and a quality."""

    width: int
    height: int
    quality: int = QUALITY

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, quality {self.quality}"


def files_of(values: list[str]) -> list[Files]:
    """Returns what texts such as 500x375 or 500x375@95 say.

    Raises:
      UsageError: a text says something else.
    """
    kinds = []
    for value in values:
        match = re.fullmatch(
            r"([1-9]\d{0,4})x([1-9]\d{0,4})(?:@([1-9]\d?|100))?", value
        )
        if match is None:
            raise UsageError(
                f"--input has {value!r}, expected pixels as WIDTHxHEIGHT, and JPEG's "
                "quality if it is not 90: 500x375 or 500x375@95."
            )
        kinds.append(Files(*(int(part) for part in match.groups() if part)))
    return kinds


def photographs(folder: str) -> dict[str, Image.Image]:
    """Returns the photographs of scikit-learn, and those of a folder, by name.

    Raises:
      UsageError: there is no image in the folder.
    """
    samples = load_sample_images()
    names = [Path(name).name for name in samples.filenames]
    found = dict(zip(names, map(Image.fromarray, samples.images), strict=True))
    if not folder:
        return found
    images = {}
    for path in sorted(Path(folder).glob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            images[path.name] = Image.open(path).convert("RGB")
    if not images:
        raise UsageError(f"--photographs: no .jpg and no .png in {folder}.")
    return found | images


def write_files(
    images: list[Image.Image], folder: Path, kind: Files, count: int
) -> float:
    """Writes JPEGs of random windows of the photographs.

    Args:
      images: the photographs, which take turns.
      folder: to write.
      kind: of the files.
      count: of them.

    Returns:
      The mean size of a file, in bytes.
    """
    rng = np.random.default_rng(0)
    size = (kind.width, kind.height)
    folder.mkdir(parents=True)
    for index in range(count):
        image = images[index % len(images)]
        scale = min(image.width / size[0], image.height / size[1])
        window = np.array(size) * scale * rng.uniform(_LEAST, 1)
        begin = rng.uniform(0, 1, 2) * (np.array(image.size) - window)
        part = image.resize(
            size, Image.Resampling.LANCZOS, box=(*begin, *(begin + window))
        )
        part.save(folder / f"{index:05}.jpg", quality=kind.quality)
    return statistics.mean(path.stat().st_size for path in folder.iterdir())


def cpu_seconds(config: DataConfig, batch_size: int, count: int) -> float:
    """Returns the CPU time of the process while it makes training batches.

    A new pipeline is waited for all the time, so that it makes as many batches as are
    taken; one that has time fills buffers that grow.

    Args:
      config: of the data.
      batch_size: images of a batch.
      count: batches that are timed, after others that start the pipeline.
    """
    batches = open_dataset(config).train_batches(batch_size=batch_size, seed=0)
    for _ in range(_FIRST):
        next(batches)
    start = time.process_time()
    for _ in range(count):
        next(batches)
    return time.process_time() - start


def pixels(view: View, files: list[Path], seeds: int) -> dict[str, dict[str, float]]:
    """Compares training images with the antialiased ones, window by window.

    Args:
      view: what is seen of an image.
      files: JPEGs.
      seeds: windows of each file.

    Returns:
      For ``fast_resize`` and for no antialiasing at all: ``mean_difference`` and
      ``largest_difference`` in levels of 0 to 255, and ``psnr`` in dB, over all
      windows.
    """
    size = view.image_size

    def plain(data: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        def window(shape: tf.Tensor) -> tf.Tensor:
            return decode._random_window(shape, seed, size=size, min_area=view.min_area)

        image = tf.image.resize(
            decode._decode(data, window), size, method=view.resize_method
        )
        return tf.saturate_cast(tf.round(image), tf.uint8)

    views = {
        name: decode.train_view(dataclasses.replace(view, fast_resize=fast))
        for name, fast in SETTINGS.items()
    }
    views[NONE] = plain
    views = {name: tf.function(f, autograph=False) for name, f in views.items()}
    reference, *others = views
    errors = {name: [] for name in others}
    for path in files:
        data = tf.constant(path.read_bytes())
        for index in range(seeds):
            seed = tf.constant([index, 0], tf.int64)
            images = {
                name: f(data, seed).numpy().astype(int) for name, f in views.items()
            }
            for name in others:
                error = np.abs(images[name] - images[reference])
                errors[name].append((error.mean(), error.max(), (error**2).mean()))
    result = {}
    for name, rows in errors.items():
        mean, largest, square = np.array(rows).T
        result[name] = {
            "mean_difference": float(mean.mean()),
            "largest_difference": int(largest.max()),
            "psnr": float(10 * np.log10(255**2 / square.mean())),
        }
    return result


def measure(
    config: ml_collections.ConfigDict,
    kinds: list[Files],
    folder: str,
    *,
    turns: int,
    count: int,
    num_files: int = 480,
) -> dict[str, Any]:
    """Returns CPU time and pixels of the settings, turn by turn, for each kind.

    Args:
      config: of an experiment with ``data.crop='resized'``, whose view and batches are
        used.
      kinds: of files.
      folder: of photographs beside those of scikit-learn; "" for none.
      turns: medians over these are reported.
      count: batches of each setting in a turn.
      num_files: of each kind.

    Raises:
      UsageError: the config crops in another way, or there are no photographs.
    """
    if config.data.crop != "resized":
        raise UsageError(
            f"--input measures data.crop='resized', and it is {config.data.crop!r}: "
            "name another --config, such as configs/windowfree.py."
        )
    images = photographs(folder)
    results = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as root:
            files = Path(root) / "photograph"
            mean_bytes = write_files(list(images.values()), files, kind, num_files)
            options = config.copy_and_resolve_references()
            options.data.update(name="folder", data_dir=root, train="train")
            options.data.shuffle_buffer = num_files
            with options.data.unlocked():
                options.data.eval = ml_collections.ConfigDict()
            data = {}
            for name, fast in SETTINGS.items():
                options.data.fast_resize = fast
                data[name] = DataConfig.of(options.data)
            seconds = [
                {
                    name: cpu_seconds(each, config.batch_size, count)
                    for name, each in data.items()
                }
                for _ in range(turns)
            ]
            view = data["antialiased"].view
            compared = pixels(view, sorted(files.iterdir())[: 2 * len(images)], 10)
        per_image = {
            name: [turn[name] / (count * config.batch_size) for turn in seconds]
            for name in SETTINGS
        }
        results[str(kind)] = {
            "mean_file_bytes": mean_bytes,
            "cpu_seconds_per_image": per_image,
            "images_per_second_and_core": {
                name: 1 / statistics.median(values)
                for name, values in per_image.items()
            },
            "pixels": compared,
        }
    return {
        "image_size": list(view.image_size),
        "min_area": view.min_area,
        "resize_method": view.resize_method,
        "photographs": sorted(images),
        "tensorflow": tf.__version__,
        "machine": platform.machine(),
        "files": results,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the result as Markdown."""
    lines = [
        "| files | setting | CPU time of an image, ms | images/s and core | "
        "mean difference | largest | PSNR, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, row in result["files"].items():
        files = f"{kind}: {row['mean_file_bytes'] / 1e3:.0f} kB"
        for name in (*SETTINGS, NONE):
            cells = ["", ""]
            if name in SETTINGS:
                speed = row["images_per_second_and_core"][name]
                cells = [f"{1e3 / speed:.2f}", f"{speed:.0f}"]
            difference = row["pixels"].get(name)
            if difference is None:
                cells += ["0", "0", ""]
            else:
                cells += [
                    f"{difference['mean_difference']:.2f}",
                    f"{difference['largest_difference']}",
                    f"{difference['psnr']:.1f}",
                ]
            lines.append(f"| {files} | {name} | {' | '.join(cells)} |")
    height, width = result["image_size"]
    note = (
        f"JPEG to {width} x {height} pixels, "
        f"windows of {result['min_area']:g} to 1 of the area, the whole input: "
        "reading, shuffling, decoding, resizing, batching. Medians over turns. "
        "Differences are to antialiased, in levels of 0 to 255."
    )
    return "\n".join([*lines, "", note, ""])
