"""Every setting of the data, in one place: the config's keys and what they become."""

import dataclasses
import os
from collections.abc import Mapping

from ml_collections import ConfigDict

# What to do with examples that cannot be read; the first is the default.
ON_ERROR = ("stop", "skip")

Size = tuple[int, int]
Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class View:
    """From a stored image to ``height x width`` pixels, on the host.

    Attributes:
      image_size: ``(height, width)`` in pixels; in a config also one number for a
        square. For a pair assign it within ``config.ignore_type()``.
      crop: of training: "resized" (a random window of the image, resized), "pad" (the
        image, padded, then cropped at random) or "none" (the largest central window).
      min_area: of "resized": the smallest window, as a share of the image.
      pad: of "pad": pixels on each side.
      pad_mode: of "pad": "reflect" or "constant" (black).
      eval_resize: of evaluation: the share of the largest central window, along each
        side, that is resized to the image size. 0.875 is a resize to 256 and a
        central crop of 224.
      resize_method: "bilinear", "bicubic", ...: ``tf.image.ResizeMethod``.
    """

    image_size: Size = (32, 32)
    crop: str = "none"
    min_area: float = 0.08
    pad: int = 4
    pad_mode: str = "reflect"
    eval_resize: float = 1.0
    resize_method: str = "bilinear"


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to training images on the device, inside the jitted step.

    In the order of the attributes. Every probability is per image.

    Attributes:
      flip_probability: of a left-right flip.
      randaugment_layers: operations of RandAugment per image; 2 is usual.
      randaugment_magnitude: 0 (none) to 10 (strongest).
      mixup_probability: of being mixed up. An image is mixed up, cut and mixed, or
        neither.
      mixup_alpha: the share of an image draws from Beta(alpha, alpha).
      cutmix_probability: of being cut and mixed.
      cutmix_alpha: the share that is cut draws from Beta(alpha, alpha).
      erase_probability: of random erasing.
      mean: of each channel, for the normalisation ``(pixel / 255 - mean) / std``, in
        training and evaluation.
      std: of each channel.
    """

    flip_probability: float = 0.0
    randaugment_layers: int = 0
    randaugment_magnitude: float = 10.0
    mixup_probability: float = 0.0
    mixup_alpha: float = 0.8
    cutmix_probability: float = 0.0
    cutmix_alpha: float = 1.0
    erase_probability: float = 0.0
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)


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
      name: "digits" (embedded, nothing to download), "folder"
        (data_dir/class/*.jpg or data_dir/split/class/*.jpg, folders in a class
        included) or any TFDS name, with a version or a configuration if needed
        ("imagenet2012:5.1.0").
      data_dir: where it lies; "" is the folder TFDS uses by default. gs:// paths work
        too.
      train: TFDS split specification: "train", "train[:99%]", "train+validation", ...
      eval: likewise, of each label: {"minival": "train[99%:]", ...}.
      shuffle_buffer: undecoded records held to shuffle from, over all processes, on top
        of the shuffled files. Large sets are shuffled in up to 16 groups, each of
        which has its part of them.
      on_error: what to do with an example that cannot be read, decoded or has no
        class: "stop" with an error that names it, or "skip": it keeps its place in the
        order, counts for nothing, and the metrics count it (``train/skipped``,
        ``test/skipped``). Of a file of many examples that is missing or damaged, "skip"
        uses what can be read.
      view: from a stored image to pixels.
      augment: on the device.
    """

    name: str = "digits"
    data_dir: str = ""
    train: str = "train"
    eval: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"test": "test"}
    )
    shuffle_buffer: int = 50_000
    on_error: str = ON_ERROR[0]
    view: View = View()
    augment: Augmentation = Augmentation()

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


def default_config() -> ConfigDict:
    """Returns the settings that every experiment starts from: digits, unaugmented."""
    options = dataclasses.asdict(DataConfig())
    view = options.pop("view")
    return ConfigDict({**options, **view, "image_size": 32})
