"""What the pixels of an image file are: as people see the picture.

Pure Pillow, for any file. The training decoder (``wf_vit.data.decode``) reads the usual
kinds of file faster and gives the same pixels; what is unusual it reads here.
"""

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

# Of any size; a function may take one size and return another.
Photograph = UInt8[np.ndarray, "_ _ 3"]

# What transparent pixels lie on, in every channel.
BACKGROUND = 255


class UnreadableImageError(ValueError):
    """A file is no image that can be decoded."""


def read(path: str | os.PathLike) -> Photograph:
    """Reads an image file as people see the picture; see ``decoded``.

    Raises:
      UnreadableImageError: the file cannot be read or decoded; says why.
    """
    # Not left to Pillow, which maps some TIFF files into memory, lying on their side.
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
    return decoded(data)


def decoded(data: bytes) -> Photograph:
    """Decodes an image as people see it: upright, in colour, opaque.

    The camera's orientation (EXIF) is applied, what is transparent lies on white,
    grey and palettes become RGB, of 16 bits the upper 8 are kept, and an animation
    gives its first frame.

    Args:
      data: the encoded image.

    Raises:
      UnreadableImageError: it cannot be decoded; says why.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return as_rgb(image)
    # Broken files make decoders raise nearly anything, and a folder must go on.
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def orientation(data: bytes) -> int:
    """Returns the orientation of an encoded image, 1 (upright) to 8: EXIF's tag 274.

    Raises:
      UnreadableImageError: it is no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _orientation(image)
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def size(path: str | os.PathLike) -> tuple[int, int]:
    """Returns the height and width of an image as people see it, upright.

    Raises:
      UnreadableImageError: the file is no image.
    """
    try:
        # As a file: what Pillow maps into memory it does not turn.
        with open(path, "rb") as file, Image.open(file) as image:
            if image.format == "TIFF":  # Pillow turns these itself, some earlier.
                image.load()
            return image.size if _orientation(image) >= 5 else image.size[::-1]
    except Exception as error:
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def as_rgb(image: Image.Image) -> Photograph:
    """Returns the pixels of an image of Pillow; see ``decoded``.

    Raises:
      ValueError: its pixels are floats.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range, convert it first")
    # A colour that stands for "transparent" is known by all its bits.
    key = image.info.get("transparency") if image.mode.startswith("I") else None
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        gray = np.clip(levels >> 8, 0, 255).astype(np.uint8)
        if key is not None:
            gray[levels == key] = BACKGROUND
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (BACKGROUND,) * 3 + (255,))
        image = Image.alpha_composite(ground, image)
    return np.asarray(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(2, 9) else 1
