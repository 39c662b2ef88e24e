"""Photographs as people have them: where they are, their pixels, and their size."""

import collections
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from wf_vit.arrays import as_array
from wf_vit.data import files, pixels
from wf_vit.data.pixels import Photograph, UnreadableImageError
from wf_vit.errors import UsageError
from wf_vit.models.pretrained.preprocess import INTERPOLATIONS, Preprocess

_LOG = logging.getLogger(__name__)

# How a photograph comes to the size that the model sees.
FITS = ("whole", "crop", "model")


class Source(NamedTuple):
    """One image file.

    Attributes:
      name: its path below the folder that all images have in common, without the
        suffix, unless two of them would then share a name.
      path: where it is.
    """

    name: str
    path: Path


def find(paths: str, *, leave_out: Path) -> list[Source]:
    """Lists the images that ``config.images`` stands for.

    Args:
      paths: a file, a folder, or several of them with commas between. A folder is
        searched with its subfolders (``wf_vit.data.files`` says what is an image).
      leave_out: a folder in which no image is looked for: the results.

    Returns:
      The images, each once, by name in alphabetical order.

    Raises:
      UsageError: a path does not exist, or there is no image.
    """
    given = [paths] if os.path.exists(paths) else paths.split(",")
    names = dict.fromkeys(os.path.abspath(p.strip()) for p in given if p.strip())
    roots = [Path(name) for name in names]
    for root in roots:
        if not root.exists():
            raise UsageError(
                f"config.images names {root}, which does not exist: pass a file, a "
                "folder, or several of them with commas between."
            )
    results = Path(os.path.abspath(leave_out))
    found = {file for root in roots for file in _files(root, results)}
    if not found:
        raise UsageError(
            f"config.images is {paths!r}, in which there is no image: pass a file, or "
            f"a folder of files that end in {', '.join(files.SUFFIXES)}."
        )
    common = os.path.commonpath([r if r.is_dir() else r.parent for r in roots])
    short = {file: file.relative_to(common).with_suffix("") for file in found}
    # A folder may have the name that a file has without its suffix.
    count = collections.Counter(short.values())
    count.update(folder for name in short.values() for folder in name.parents)

    def name(file: Path) -> str:
        return _text(
            short[file] if count[short[file]] == 1 else file.relative_to(common)
        )

    return sorted(Source(name(file), file) for file in found)


def _text(path: Path) -> str:
    """Returns a path as text that can be printed and written, whatever its bytes."""
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")


def _files(root: Path, leave_out: Path) -> Iterator[Path]:
    if not root.is_dir():
        yield root
        return
    results = {str(leave_out), os.path.realpath(leave_out)}
    found = files.find_images(str(root), leave_out=results)
    _LOG.info(
        "Used %d images in %s; left out: %s.",
        len(found.images),
        _text(root),
        files.left_out_text(found.left_out),
    )
    # What is lost is named, as an image that cannot be read.
    images = (path for path in found.lost if path.lower().endswith(files.SUFFIXES))
    yield from (root / path for path in sorted([*found.images, *images]))


def digest(path: Path) -> str:
    """Returns what tells an image file from any other.

    Raises:
      UnreadableImageError: the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def size(path: Path) -> tuple[int, int]:
    """Returns the height and width of an image as people see it, upright.

    Raises:
      UnreadableImageError: the file is no image.
    """
    return pixels.size(path)


def read(path: Path) -> Photograph:
    """Reads an image as people see it; ``wf_vit.data.pixels`` says how.

    Raises:
      UnreadableImageError: the file cannot be decoded; says why.
    """
    return pixels.read(path)


def as_photograph(image: Any) -> Photograph:
    """Returns the pixels of what people call an image.

    Args:
      image: a path; an image of Pillow; an array of NumPy, JAX or PyTorch: [H, W, 3]
        or [H, W], 8 bits or floats in [0, 1].

    Raises:
      UsageError: it is no image, or it must be changed in a way that is not ours to
        choose.
    """
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        if not path.exists():
            raise UsageError(f"There is no image at {path}: pass the path of a file.")
        try:
            return read(path)
        except UnreadableImageError as error:
            raise UsageError(f"{path} cannot be read as an image: {error}") from error
    if isinstance(image, Image.Image):
        try:
            return pixels.as_rgb(image)
        except ValueError as error:
            raise UsageError(f"The image cannot be shown: {error}.") from error
    return _array_as_rgb(np.asarray(as_array(image, "image")))


def _array_as_rgb(image: np.ndarray) -> Photograph:
    expected = "expected [height, width, 3] or [height, width]"
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[-1] not in (3, 4):
        raise UsageError(
            f"The image has the shape {image.shape}, {expected}: its channels come "
            "first, as in PyTorch. Pass image.transpose(1, 2, 0), or for a tensor "
            "image.permute(1, 2, 0)."
        )
    if image.ndim == 4:
        raise UsageError(
            f"The image has the shape {image.shape}, {expected}: pass one image, or a "
            "list of images for several."
        )
    if image.ndim != 2 and (image.ndim != 3 or image.shape[-1] != 3):
        raise UsageError(f"The image has the shape {image.shape}, {expected}.")
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        floating = np.issubdtype(image.dtype, np.floating)
        if not floating or not (math.isfinite(low + high) and 0 <= low <= high <= 1):
            raise UsageError(
                f"The image holds {image.dtype} from {low:.4g} to {high:.4g}, expected "
                "uint8, or floats from 0 to 1: pass it before it is normalised, "
                "divided by 255 if its floats go to 255."
            )
        image = np.rint(255 * image.astype(np.float32)).astype(np.uint8)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)


def seen_size(
    photograph: tuple[int, int],
    model_size: tuple[int, int],
    patch_size: tuple[int, int],
    wanted: Sequence[int],
    fit: str,
) -> tuple[int, int]:
    """Returns the size at which the model sees a photograph.

    Args:
      photograph: its height and width in pixels.
      model_size: those that the model was trained at.
      patch_size: of the model.
      wanted: two numbers, height and width, which are taken as they are; one, the side
        of a square; or none: the model's size.
      fit: "whole": where no height and width is wanted, a grid of about as many
        patches as the square has, of the photograph's shape. Else the square.

    Raises:
      UsageError: a size that is no size, or a fit that is not known.
    """
    if fit not in FITS:
        raise UsageError(f"fit is {fit!r}: choose one of {', '.join(FITS)}.")
    if len(wanted) > 2 or any(size < 1 for size in wanted):
        raise UsageError(
            f"image_size is {tuple(wanted)}, expected a height and a width in pixels, "
            "one number for a square, or nothing for the model's own size."
        )
    if len(wanted) == 2:
        return tuple(wanted)
    size = (wanted[0], wanted[0]) if wanted else model_size
    if fit != "whole":
        return size
    patches = math.prod(s / p for s, p in zip(size, patch_size, strict=True))
    shape = photograph[0] / patch_size[0], photograph[1] / patch_size[1]
    scale = math.sqrt(patches / math.prod(shape))
    return tuple(
        max(round(s * scale), 1) * p for s, p in zip(shape, patch_size, strict=True)
    )


def fitted(photograph: Photograph, preprocess: Preprocess, fit: str) -> Photograph:
    """Returns the pixels that a model sees of a photograph.

    Args:
      photograph: of any size.
      preprocess: of the model, at the size that it is to see.
      fit: "whole": the whole photograph, scaled; each side on its own if their ratio
        is another than the model's. "crop": as much of its middle as has the model's
        shape. "model": as the model's images were prepared for its evaluation, which
        for many models cuts the rim away.
    """
    if fit == "model":
        return preprocess.fit(photograph)
    image = Image.fromarray(photograph)
    resample = INTERPOLATIONS[preprocess.image_format.interpolation]
    size = preprocess.image_size[::-1]
    if fit == "crop":
        return np.asarray(ImageOps.fit(image, size, resample))
    return np.asarray(image.resize(size, resample))
