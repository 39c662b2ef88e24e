"""From encoded bytes to an image of the wanted size, on the host.

A JPEG is decoded only inside the window that is kept. Everything is a pure function
of the bytes and, for training, of a two-number seed.
"""

from collections.abc import Callable

import tensorflow as tf

from wf_vit.data.config import Size, View
from wf_vit.errors import UsageError

_CROPS = ("resized", "pad", "none")


def train_view(view: View) -> Callable:
    """Returns the function that makes a training image.

    Args:
      view: what is kept of an image.

    Returns:
      ``(data, seed) -> image``: encoded bytes and an int64 ``[2]`` seed in, uint8
      ``[height, width, 3]`` out.

    Raises:
      UsageError: ``view.crop`` is unknown.
    """
    size = view.image_size
    if view.crop not in _CROPS:
        raise UsageError(
            f"config.data.crop is {view.crop!r}, expected one of {_CROPS}."
        )

    def resized(data: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        def window(shape: tf.Tensor) -> tf.Tensor:
            return _random_window(shape, seed, size=size, min_area=view.min_area)

        return _resize(_decode(data, window), size, view.resize_method)

    def central(data: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        image = _decode(data, lambda shape: _central_window(shape, size=size))
        return _resize(image, size, view.resize_method)

    def padded(data: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        margins = [[view.pad] * 2, [view.pad] * 2, [0, 0]]
        image = tf.pad(central(data, seed), margins, mode=view.pad_mode)
        return tf.image.stateless_random_crop(image, (*size, 3), seed)

    return {"resized": resized, "pad": padded, "none": central}[view.crop]


def eval_view(view: View) -> Callable:
    """Returns the function that makes an evaluation image.

    Args:
      view: what is kept of an image.

    Returns:
      ``data -> image``: encoded bytes in, uint8 ``[height, width, 3]`` out. The
      image is the largest central window of the output's shape, both sides times
      ``view.eval_resize``, resized.
    """
    size = view.image_size

    def image(data: tf.Tensor) -> tf.Tensor:
        def window(shape: tf.Tensor) -> tf.Tensor:
            return _central_window(shape, size=size, share=view.eval_resize)

        return _resize(_decode(data, window), size, view.resize_method)

    return image


def _decode(data: tf.Tensor, window: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Decodes the part of an image that ``window`` picks, as RGB.

    Args:
      data: the encoded image, a scalar string; greyscale, CMYK, palette and alpha
        become RGB, an animation gives its first frame.
      window: from the image's ``(height, width)`` to
        ``(top, left, height, width)``, int32.
    """

    def jpeg() -> tf.Tensor:
        shape = tf.io.extract_jpeg_shape(data)[:2]
        return tf.image.decode_and_crop_jpeg(
            data, window(shape), channels=3, dct_method="INTEGER_ACCURATE"
        )

    def other() -> tf.Tensor:
        image = tf.io.decode_image(data, channels=3, expand_animations=False)
        top, left, height, width = tf.unstack(window(tf.shape(image)[:2]))
        return tf.image.crop_to_bounding_box(image, top, left, height, width)

    image = tf.cond(tf.io.is_jpeg(data), jpeg, other)
    return tf.ensure_shape(image, (None, None, 3))


def _random_window(
    shape: tf.Tensor, seed: tf.Tensor, *, size: Size, min_area: float
) -> tf.Tensor:
    """Returns the Inception crop (Szegedy et al., arXiv 1409.4842, section 6).

    Its area is uniform between ``min_area`` and 1 of the image; its shape is within
    3/4 to 4/3 of the output's.
    """
    aspect = size[1] / size[0]
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.concat([shape, [3]], axis=0),
        tf.zeros((1, 0, 4)),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(aspect * 3 / 4, aspect * 4 / 3),
        area_range=(min_area, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], extent[:2]], axis=0)


def _central_window(shape: tf.Tensor, *, size: Size, share: float = 1.0) -> tf.Tensor:
    """Returns the largest central window of the output's shape, scaled by share."""
    scale = share * tf.reduce_min(tf.cast(shape, tf.float64) / size)
    extent = tf.cast(tf.round(scale * tf.constant(size, tf.float64)), tf.int32)
    extent = tf.clip_by_value(extent, 1, shape)
    return tf.concat([(shape - extent) // 2, extent], axis=0)


def _resize(image: tf.Tensor, size: Size, method: str) -> tf.Tensor:
    """Resizes with antialiasing and rounds back to uint8."""

    def resized() -> tf.Tensor:
        pixels = tf.image.resize(image, size, method=method, antialias=True)
        return tf.saturate_cast(tf.round(pixels), tf.uint8)

    same = tf.reduce_all(tf.equal(tf.shape(image)[:2], size))
    return tf.ensure_shape(tf.cond(same, lambda: image, resized), (*size, 3))
