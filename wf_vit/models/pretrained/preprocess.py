"""How the images of a published checkpoint are prepared."""

import dataclasses
import logging
import math
from collections.abc import Iterable
from dataclasses import MISSING

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from wf_vit import settings
from wf_vit.errors import UsageError
from wf_vit.settings import setting

_LOG = logging.getLogger(__name__)

Triple = tuple[float, float, float]

# Mean and standard deviation of the channels, of images in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

# What `data.resize_method` is called here: TensorFlow's names and Pillow's.
_SAME = {"lanczos3": "lanczos", "area": "box"}
# The nearest that Pillow has.
_NEAR = {"lanczos5": "lanczos", "gaussian": "bilinear", "mitchellcubic": "bicubic"}


def pillow_name(method: str) -> str:
    """Returns what Pillow calls a resize method of TensorFlow, or the nearest it has.

    A warning says where it is only the nearest.
    """
    if method in _NEAR:
        _LOG.warning(
            "The images were resized with %r, which Pillow does not have: %r is used.",
            method,
            _NEAR[method],
        )
    return (_SAME | _NEAR).get(method, method)


def tensorflow_name(interpolation: str) -> str:
    """Returns the `data.resize_method` that resizes as Pillow does, or nearly so."""
    names = {ours: theirs for theirs, ours in _SAME.items()} | {"hamming": "bilinear"}
    return names.get(interpolation, interpolation)


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """What a checkpoint expects of its images, whatever their size.

    Attributes:
      mean: of each channel, of images in [0, 1].
      std: of each channel.
      interpolation: one of ``INTERPOLATIONS``; as Pillow resizes, so antialiased.
      crop: the share of the resized image's side that a central crop keeps; None
        resizes without regard to the aspect ratio and crops nothing.
      squash: whether the resize before the crop ignores the aspect ratio too.
      floor: whether the place of the crop is rounded down, as in Hugging Face, and not
        to the nearest pixel, as in torchvision.

    Raises:
      UsageError: a value is out of its range.
    """

    mean: Triple = setting(
        MISSING, "of each channel", kind=tuple, length=3, low=-1e6, high=1e6
    )
    std: Triple = setting(
        MISSING, "of each channel", kind=tuple, length=3, low=1e-6, high=1e6
    )
    interpolation: str = setting(
        MISSING, "as Pillow names it", kind=str, choices=tuple(INTERPOLATIONS)
    )
    # A smaller share would make a huge image of every one.
    crop: float | None = setting(
        MISSING,
        "share of the side that the crop keeps",
        kind=float,
        low=0.05,
        high=1,
        optional=True,
    )
    squash: bool = setting(False, "whether the resize ignores the aspect ratio")
    floor: bool = setting(False, "whether the place of the crop is rounded down")

    def __post_init__(self):
        settings.check_fields(self, "images")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Prepares images for one model.

    Attributes:
      image_size: ``(height, width)`` of the model, in pixels.
      image_format: what the checkpoint expects.
      leftover: how many rows and columns of pixels, at the bottom and the right, an
        image is resized to have beyond that, which no patch covers: 6 where a library
        shows 384 pixels to 27 patches of 14.
    """

    image_size: tuple[int, int]
    image_format: ImageFormat
    leftover: tuple[int, int] = (0, 0)

    def __call__(
        self, images: Iterable[UInt8[np.ndarray, "_ _ 3"]]
    ) -> Float[np.ndarray, "B height width 3"]:
        """Resizes, crops and normalises images, each of any size."""
        return self.normalize(np.stack([self.fit(image) for image in images]))

    def normalize(
        self, images: UInt8[np.ndarray, "B height width 3"]
    ) -> Float[np.ndarray, "B height width 3"]:
        """Normalises images that have the model's size already."""
        if images.dtype != np.uint8 or images.shape[1:] != (*self.image_size, 3):
            raise UsageError(
                f"The images are {images.dtype} {images.shape}, expected uint8 "
                f"[B, {self.image_size[0]}, {self.image_size[1]}, 3]: call "
                "preprocess(images), which also resizes."
            )
        mean, std = (
            255 * np.asarray(x, np.float32)
            for x in (self.image_format.mean, self.image_format.std)
        )
        return (images - mean) / std

    def fit(
        self, image: UInt8[np.ndarray, "_ _ 3"]
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Resizes and crops one image to the model's size: what the model sees."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise UsageError(
                f"An image is {image.dtype} {image.shape}, expected uint8 "
                "[height, width, 3]: pass a batch or a list of RGB images in 8 bits."
            )
        size = self._resized(*image.shape[:2])
        resample = INTERPOLATIONS[self.image_format.interpolation]
        resized = Image.fromarray(image).resize(size[::-1], resample)
        place = math.floor if self.image_format.floor else round
        top, left = (
            place((have - keep) / 2)
            for have, keep in zip(size, self._shown(), strict=True)
        )
        height, width = self.image_size
        return np.asarray(resized)[top : top + height, left : left + width]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size before the crop: it covers the model's, scaled by it."""
        shown = self._shown()
        if self.image_format.crop is None:
            return shown
        # 224 / 0.875 must be 256 in spite of rounding.
        rows, columns = (int(s / self.image_format.crop + 1e-6) for s in shown)
        if self.image_format.squash:
            return rows, columns
        if rows * width >= columns * height:
            return rows, max(rows * width // height, shown[1])
        return max(columns * height // width, shown[0]), columns

    def _shown(self) -> tuple[int, int]:
        """Returns the size of what the model is shown, leftover pixels included."""
        height, width = self.image_size
        return height + self.leftover[0], width + self.leftover[1]
