"""Every setting of the data, in one place: the config's keys and what they become."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from wf_vit import settings
from wf_vit.errors import UsageError
from wf_vit.settings import LARGEST_COUNT, setting

# What to do with examples that cannot be read; the first is the default.
ON_ERROR = ("stop", "skip")

Size = tuple[int, int]
Triple = tuple[float, float, float]


def _probability(meaning: str) -> Any:
    return setting(0.0, f"probability, for each image, {meaning}", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class View:
    """From a stored image to ``height x width`` pixels, on the host.

    Raises:
      UsageError: a value is out of its range.
    """

    image_size: Size = setting(
        (32, 32),
        "pixels: of the side of a square, or height and width; for a pair assign it "
        "within config.ignore_type()",
        items=int,
        length=2,
        one_or_many=True,
        low=1,
        high=8192,
    )
    crop: str = setting(
        "none",
        "of training: resized (a random window of the image, resized), pad (the image, "
        "padded, then cropped at random), none (the largest central window)",
        choices=("resized", "pad", "none"),
    )
    min_area: float = setting(
        0.08,
        "of crop=resized: the smallest window, as a share of the image",
        above=0,
        high=1,
    )
    pad: int = setting(4, "of crop=pad: pixels on each side", low=0, high=8192)
    pad_mode: str = setting(
        "reflect",
        "of crop=pad: what is on the sides; constant is black",
        choices=("reflect", "constant"),
    )
    eval_resize: float = setting(
        1.0,
        "of evaluation: share of the largest central window, along each side, that is "
        "resized to the image size; 0.875 is a resize to 256 and a crop of 224",
        low=0.05,
        high=1,
    )
    resize_method: str = setting(
        "bilinear",
        "as tf.image.ResizeMethod names it",
        choices=(
            *("bilinear", "bicubic", "nearest", "area", "gaussian", "lanczos3"),
            *("lanczos5", "mitchellcubic"),
        ),
    )
    fast_resize: bool = setting(
        False,
        "of training: shrinks by averaging boxes of pixels, and decodes a JPEG at 1/2, "
        "1/4 or 1/8 of its size where that leaves enough; resize_method is for what is "
        "enlarged. Twice as fast; pixels differ a little. Evaluation does not change",
    )

    def __post_init__(self):
        settings.check_fields(self, "config.data")
        padded = self.crop == "pad" and self.pad_mode == "reflect"
        if padded and self.pad >= min(self.image_size):
            raise UsageError(
                f"config.data.pad is {self.pad}, but of an image of "
                f"{self.image_size[0]} x {self.image_size[1]} pixels at most "
                f"{min(self.image_size) - 1} can be reflected: choose fewer, or "
                "config.data.pad_mode='constant'."
            )


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to training images on the device, inside the jitted step.

    In the order of the fields. An image is mixed up, cut and mixed, or neither.

    Raises:
      UsageError: a value is out of its range.
    """

    flip_probability: float = _probability("of a left-right flip")
    randaugment_layers: int = setting(
        0, "operations of RandAugment for each image; 2 is usual", low=0, high=16
    )
    randaugment_magnitude: float = setting(
        10.0, "of its operations; 0: none, 10: strongest", low=0, high=10
    )
    mixup_probability: float = _probability("of being mixed up")
    mixup_alpha: float = setting(
        0.8, "a of Beta(a, a), which the share of an image is from", above=0, high=1000
    )
    cutmix_probability: float = _probability("of being cut and mixed")
    cutmix_alpha: float = setting(
        1.0, "a of Beta(a, a), which the share that is cut is from", above=0, high=1000
    )
    erase_probability: float = _probability("of random erasing")
    mean: Triple = setting(
        (0.5, 0.5, 0.5),
        "of each channel, for (pixel / 255 - mean) / std in training and evaluation",
        length=3,
        low=-1e6,
        high=1e6,
    )
    std: Triple = setting(
        (0.5, 0.5, 0.5), "of each channel, likewise", length=3, low=1e-6, high=1e6
    )

    def __post_init__(self):
        settings.check_fields(self, "config.data.augment")


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What the rest of the program needs to know of a data set.

    Attributes:
      class_names: C names, in the order of the labels.
      num_examples: of "train" and of every label of ``config.data.eval``.
      image_size: ``(height, width)`` of the images, in pixels.
    """

    class_names: tuple[str, ...]
    num_examples: dict[str, int]
    image_size: Size

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read and how: ``config.data``, which also has the keys of ``View``.

    Attributes:
      view: from a stored image to pixels.
      augment: on the device.

    Raises:
      UsageError: a value is out of its range.
    """

    name: str = setting(
        "digits",
        "digits (embedded, nothing to download), folder (data_dir/class/*.jpg or "
        "data_dir/split/class/*.jpg, folders in a class included), or any TFDS name, "
        "with a version or a configuration if needed (imagenet2012:5.1.0)",
    )
    data_dir: str = setting(
        "", "where it lies, gs:// too; empty: the folder TFDS uses by default"
    )
    train: str = setting(
        "train", "TFDS split specification: train, train[:99%] or train+validation"
    )
    eval: Mapping[str, str] = setting(
        {"test": "test"},
        'TFDS split of each evaluation, by its name: {"minival": "train[99%:]", ...}',
    )
    shuffle_buffer: int = setting(
        50_000,
        "undecoded records held to shuffle from, over all processes, on top of the "
        "files'; large sets are shuffled in up to 64 groups, each with its part",
        low=1,
        high=LARGEST_COUNT,
    )
    on_error: str = setting(
        "stop",
        "what to do with an example that cannot be read or decoded, or has no class: "
        "stop with an error that names it, or skip it, which keeps its place in the "
        "order, counts for nothing, and is counted (train/examples_skipped)",
        choices=ON_ERROR,
    )
    view: View = View()
    augment: Augmentation = Augmentation()

    def __post_init__(self):
        settings.check_fields(self, "config.data")
        if "train" in self.eval:
            raise UsageError(
                "config.data.eval names an evaluation 'train', which is what the "
                "metrics of training are called: call it 'train_part', say."
            )

    @classmethod
    def of(cls, config: ConfigDict) -> "DataConfig":
        """Returns what ``config.data`` says."""
        options = config.to_dict()
        seen = {field.name: options.pop(field.name) for field in _VIEW}
        size = seen["image_size"]
        size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        view = View(**seen | {"image_size": size})
        augment = Augmentation(**options.pop("augment"))
        return cls(**options, view=view, augment=augment)


def printable(name: str | bytes) -> str:
    """Returns the name of a file as text that can be printed, whatever its bytes."""
    return os.fsencode(name).decode(errors="backslashreplace")


_VIEW = dataclasses.fields(View)

# The declarations of ``config.data``.
KEYS = {
    **settings.of(DataConfig),
    **settings.of(View),
    "augment": settings.of(Augmentation),
}


def default_config() -> ConfigDict:
    """Returns the settings that every experiment starts from: digits, unaugmented."""
    options = dataclasses.asdict(DataConfig())
    view = options.pop("view")
    return ConfigDict({**options, **view, "image_size": 32})
