"""Photographs as people have them: where they are, and their pixels."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from wf_vit.errors import UsageError

# What is taken for an image in a folder; a file that is named is read in any case.
SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


class Source(NamedTuple):
    """One image file.

    Attributes:
      name: its path below the folder that all images have in common, suffix
        included, so that no two images share a name.
      path: where it is.
    """

    name: str
    path: Path


class UnreadableImageError(ValueError):
    """A file is no image that can be decoded."""


def find(paths: str, *, leave_out: Path) -> list[Source]:
    """Lists the images that ``config.images`` stands for.

    Args:
      paths: a file, a folder, or several of them with commas between. A folder is
        searched with its subfolders, hidden files and folders aside.
      leave_out: a folder in which no image is looked for: the results.

    Returns:
      The images, each once, by name in alphabetical order.

    Raises:
      UsageError: a path does not exist, or there is no image.
    """
    given = [paths] if os.path.exists(paths) else paths.split(",")
    roots = [Path(os.path.abspath(path.strip())) for path in given if path.strip()]
    for root in roots:
        if not root.exists():
            raise UsageError(
                f"config.images names {root}, which does not exist: pass a file, a "
                "folder, or several of them with commas between."
            )
    results = Path(os.path.abspath(leave_out))
    files = {file for root in roots for file in _files(root, results)}
    if not files:
        raise UsageError(
            f"config.images is {paths!r}, in which there is no image: pass a file, or "
            f"a folder of files that end in {', '.join(SUFFIXES)}."
        )
    common = os.path.commonpath([r if r.is_dir() else r.parent for r in roots])
    return sorted(Source(_text(file.relative_to(common)), file) for file in files)


def _text(path: Path) -> str:
    """Returns a path as text that can be printed and written, whatever its bytes."""
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")


def _files(root: Path, leave_out: Path) -> Iterator[Path]:
    if not root.is_dir():
        yield root
        return
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and here / name != leave_out
        ]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield here / name


def read(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Reads an image as people see it: upright, in colour, opaque.

    The camera's orientation (EXIF) is applied, what is transparent lies on white,
    grey and palettes become RGB, 16 bits become 8, and an animation gives its first
    frame.

    Raises:
      UnreadableImageError: the file cannot be decoded; says why.
    """
    try:
        with Image.open(path) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
    # Broken files make decoders raise nearly anything, and a folder must go on.
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _as_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range, convert it first")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        gray = np.clip(levels // 257, 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))
