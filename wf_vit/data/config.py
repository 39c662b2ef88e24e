"""Every setting of the data, in one place."""

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """Returns the settings that every experiment starts from: digits, unaugmented."""
    config = ConfigDict()

    # What to read. `name` is 'digits' (embedded, nothing to download), 'folder'
    # (data_dir/class/*.jpg or data_dir/split/class/*.jpg) or any TFDS name, with
    # a version or a configuration if needed ('imagenet2012:5.1.0').
    config.name = "digits"
    # Where it lies; '' is the folder TFDS uses by default. gs:// paths work too.
    config.data_dir = ""
    # TFDS split specifications: 'train', 'train[:99%]', 'train+validation', ...
    config.train = "train"
    config.eval = ConfigDict({"test": "test"})  # label -> split

    # Host: from a stored image to height x width pixels.
    # Side in pixels. For (height, width) assign it within `config.ignore_type()`.
    config.image_size = 32
    # Training crop: 'resized' (a random window of the image, resized), 'pad' (the
    # image, padded, then cropped at random) or 'none' (the largest central window).
    config.crop = "none"
    config.min_area = 0.08  # 'resized': smallest window, as a share of the image
    config.pad = 4  # 'pad': pixels on each side
    config.pad_mode = "reflect"  # 'pad': 'reflect' or 'constant' (black)
    # Evaluation: share of the largest central window, along each side, that is
    # resized to the image size; 0.875 is a resize to 256 and a central 224.
    config.eval_resize = 1.0
    config.resize_method = "bilinear"  # or 'bicubic', ...: tf.image.ResizeMethod
    # Undecoded records held per process to shuffle from, on top of the files'.
    config.shuffle_buffer = 50_000

    # Device: inside the jitted step, in this order. Every probability is per image.
    augment = config.augment = ConfigDict()
    augment.flip_probability = 0.0  # left-right
    augment.randaugment_layers = 0  # operations per image; 2 is usual
    augment.randaugment_magnitude = 10.0  # 0 (none) to 10 (strongest)
    # An image is mixed up, cut and mixed, or neither; both shares draw from Beta(a, a).
    augment.mixup_probability = 0.0
    augment.mixup_alpha = 0.8
    augment.cutmix_probability = 0.0
    augment.cutmix_alpha = 1.0
    augment.erase_probability = 0.0
    # Normalisation, training and evaluation: (pixel / 255 - mean) / std.
    augment.mean = (0.5, 0.5, 0.5)
    augment.std = (0.5, 0.5, 0.5)
    return config
