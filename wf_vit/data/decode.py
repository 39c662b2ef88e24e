"""From encoded bytes to an image of the wanted size, on the host.

The pixels are those of ``wf_vit.data.pixels``: as people see the picture. A JPEG is
decoded only inside the window that is kept. Everything is a pure function of the bytes
and, for training, of a two-number seed.
"""

import functools
from collections.abc import Callable

import numpy as np

from wf_vit.data import pixels
from wf_vit.data.config import Size, View
from wf_vit.data.tensorflow import tf

# From (height, width) to (top, left, height, width), int32.
_Window = Callable[[tf.Tensor], tf.Tensor]

# The methods whose results are means of pixels, which need not be clipped.
_MEANS = ("bilinear", "nearest", "area", "gaussian")

# The parts of its size, 1/ratio, at which libjpeg decodes.
_RATIOS = (1, 2, 4, 8)


def train_view(view: View) -> Callable:
    """Returns the function that makes a training image.

    Args:
      view: what is kept of an image.

    Returns:
      ``(data, seed) -> image``: encoded bytes and an int64 ``[2]`` seed in, uint8
      ``[height, width, 3]`` out.
    """
    size = view.image_size

    def image(data: tf.Tensor, window: _Window) -> tf.Tensor:
        if view.fast_resize:
            part = _decode(data, window, least=max(size))
            return _resize_fast(part, size, view.resize_method)
        return _resize(_decode(data, window), size, view.resize_method)

    def resized(data: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        def window(shape: tf.Tensor) -> tf.Tensor:
            return _random_window(shape, seed, size=size, min_area=view.min_area)

        return image(data, window)

    def central(data: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return image(data, lambda shape: _central_window(shape, size=size))

    def padded(data: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        margins = [[view.pad] * 2, [view.pad] * 2, [0, 0]]
        larger = tf.pad(central(data, seed), margins, mode=view.pad_mode)
        return tf.image.stateless_random_crop(larger, (*size, 3), seed)

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


def _decode(data: tf.Tensor, window: _Window, least: int | None = None) -> tf.Tensor:
    """Decodes the part of an image that ``window`` picks, upright, in colour, opaque.

    Args:
      data: the encoded image, a scalar string.
      window: from the height and width of the upright image to
        ``(top, left, height, width)``, int32.
      least: pixels. With it, a JPEG comes at 1/2, 1/4 or 1/8 of its size where both
        sides of the window keep as many; without it, always at its own size.
    """
    image = tf.cond(
        tf.io.is_jpeg(data),
        lambda: _jpeg(data, window, least),
        lambda: _cut(_other(data), window),
    )
    return tf.ensure_shape(image, (None, None, 3))


def _jpeg(data: tf.Tensor, window: _Window, least: int | None) -> tf.Tensor:
    """Decodes the window only, and turns it upright."""
    stored = tf.io.extract_jpeg_shape(data)[:2]

    def reduced(box: tf.Tensor, ratio: int) -> tf.Tensor:
        # To the next pixel of the smaller image, which no window can leave so.
        begin, extent = (box[:2] + ratio // 2) // ratio, box[2:] // ratio
        return tf.image.decode_and_crop_jpeg(
            data,
            tf.concat([begin, extent], axis=0),
            channels=3,
            ratio=ratio,
            dct_method="INTEGER_ACCURATE",
        )

    def decoded(box: tf.Tensor) -> tf.Tensor:
        if least is None:
            return reduced(box, 1)
        spare = tf.reduce_min(box[2:]) // least
        index = tf.reduce_sum(tf.cast(spare >= _RATIOS[1:], tf.int32))
        return tf.switch_case(
            index, [functools.partial(reduced, box, ratio) for ratio in _RATIOS]
        )

    def turned() -> tf.Tensor:
        swaps, flips = _turn(orientation)
        upright = tf.where(swaps, stored[::-1], stored)
        box = window(upright)
        # Where the window lies in the stored image: the way back.
        begin, extent = box[:2], box[2:]
        begin = tf.where(flips, upright - begin - extent, begin)
        begin, extent = (tf.where(swaps, x[::-1], x) for x in (begin, extent))
        image = decoded(tf.concat([begin, extent], axis=0))
        image = tf.cond(swaps, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
        return tf.reverse(image, tf.where(flips)[:, 0])

    orientation = tf.cond(
        _may_be_turned(data), lambda: _orientation(data), lambda: tf.constant(1)
    )
    return tf.cond(orientation == 1, lambda: decoded(window(stored)), turned)


# Not inlined, so that a JPEG does not pay for the operations that it does not take.
@tf.function(
    input_signature=[tf.TensorSpec((), tf.string)],
    experimental_attributes={"_noinline": True},
    autograph=False,
)
def _other(data: tf.Tensor) -> tf.Tensor:
    """Decodes what is no JPEG."""
    image = tf.case(
        [
            (_is_plain_png(data), lambda: _png(data)),
            (_is_plain_webp(data), lambda: _webp(data)),
        ],
        default=lambda: _unusual(data),
    )
    return tf.ensure_shape(image, (None, None, 3))


def _may_be_turned(data: tf.Tensor) -> tf.Tensor:
    """Says whether a JPEG may have an orientation; never no if it has one.

    What may hold it comes before the pixels, so not all bytes are searched.
    """
    # Where the three channels of the pixels begin. If there is nothing of the kind,
    # as in grey images, everything is searched, which only takes longer.
    pixels_begin = b"\xff\xda\x00\x0c\x03"
    # (tf.strings.split adds what every image would pay for.)
    head = tf.raw_ops.StringSplitV2(
        input=data[None], sep=pixels_begin, maxsplit=1
    ).values[0]
    # EXIF or XMP; or Photoshop's thumbnail, which has pixels of its own.
    return tf.strings.regex_full_match(
        head, r"(?s)\C*(?:Exif\x00|ns\.adobe\.com|Photoshop)\C*"
    )


def _turn(orientation: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns what turns a stored image upright: first to swap its axes, then to flip.

    Args:
      orientation: of EXIF, 1 to 8.

    Returns:
      Whether to swap height and width, and whether to flip each of them.
    """
    down = [3, 4, 7, 8]
    across = [2, 3, 6, 7]
    flips = [tf.reduce_any(orientation == some) for some in (down, across)]
    return orientation >= 5, tf.stack(flips)


def _is_plain_png(data: tf.Tensor) -> tf.Tensor:
    """Says whether a PNG has nothing beside its channels that changes the picture."""
    is_png = tf.strings.substr(data, 0, 8) == b"\x89PNG\r\n\x1a\n"

    def is_plain() -> tf.Tensor:
        # A colour or a palette that is transparent, EXIF in either form, XMP.
        return ~tf.strings.regex_full_match(
            data, r"(?s)\C*(?:tRNS|eXIf|Raw profile type|adobe\.xmp)\C*"
        )

    return tf.cond(is_png, is_plain, lambda: tf.constant(False))


def _png(data: tf.Tensor) -> tf.Tensor:
    """Decodes a plain PNG; what is transparent lies on the background."""
    colour_type = tf.strings.substr(data, 25, 1)  # PNG, 11.2.2: in IHDR
    has_alpha = (colour_type == b"\x04") | (colour_type == b"\x06")

    def laid_on_background() -> tf.Tensor:
        image = tf.cast(tf.io.decode_png(data, channels=4), tf.int32)
        colour, alpha = image[..., :3], image[..., 3:]
        # In whole numbers, rounded as Pillow does.
        mixed = colour * alpha + pixels.BACKGROUND * (255 - alpha) + 128
        return tf.cast((mixed + mixed // 256) // 256, tf.uint8)

    return tf.cond(
        has_alpha, laid_on_background, lambda: tf.io.decode_png(data, channels=3)
    )


def _is_plain_webp(data: tf.Tensor) -> tf.Tensor:
    """Says whether a file is the simple kind of WebP: no alpha, no EXIF, one frame."""
    return (tf.strings.substr(data, 0, 4) == b"RIFF") & (
        tf.strings.substr(data, 8, 8) == b"WEBPVP8 "
    )


def _webp(data: tf.Tensor) -> tf.Tensor:
    """Decodes the simple kind of WebP, which TensorFlow returns as one frame."""
    frames = tf.io.decode_webp(data, channels=3)
    return tf.reshape(frames, tf.shape(frames)[-3:])


def _cut(image: tf.Tensor, window: _Window) -> tf.Tensor:
    top, left, height, width = tf.unstack(window(tf.shape(image)[:2]))
    return tf.image.crop_to_bounding_box(image, top, left, height, width)


def _unusual(data: tf.Tensor) -> tf.Tensor:
    """Decodes what Pillow can read."""
    image = _by_pillow(pixels.decoded, data, tf.uint8)
    return tf.ensure_shape(image, (None, None, 3))


def _orientation(data: tf.Tensor) -> tf.Tensor:
    def read(data: bytes) -> np.int32:
        return np.int32(pixels.orientation(data))

    return tf.ensure_shape(_by_pillow(read, data, tf.int32), ())


def _by_pillow(read: Callable, data: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Calls a function of Python with bytes; TensorFlow hands them on in two forms."""
    return tf.numpy_function(
        lambda data: read(np.asarray(data, object).item()),
        [data],
        dtype,
        stateful=False,
    )


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
        return _rounded(pixels, method)

    same = tf.reduce_all(tf.equal(tf.shape(image)[:2], size))
    return tf.ensure_shape(tf.cond(same, lambda: image, resized), (*size, 3))


def _resize_fast(image: tf.Tensor, size: Size, method: str) -> tf.Tensor:
    """Resizes in a third of the time: by the means of boxes where both sides shrink.

    Elsewhere ``method`` needs no antialiasing, or little: if a side is enlarged, the
    other one shrinks by no more than their shapes differ, which is 4/3.
    """

    def boxes() -> tf.Tensor:
        return _rounded(tf.image.resize(image, size, method="area"), "area")

    def enlarged() -> tf.Tensor:
        return _rounded(tf.image.resize(image, size, method=method), method)

    shrinks = tf.reduce_all(tf.shape(image)[:2] >= size)
    return tf.ensure_shape(tf.cond(shrinks, boxes, enlarged), (*size, 3))


def _rounded(pixels: tf.Tensor, method: str) -> tf.Tensor:
    """Rounds what ``method`` made of uint8 pixels back to uint8."""
    if method in _MEANS:
        return tf.cast(tf.round(pixels), tf.uint8)
    return tf.saturate_cast(tf.round(pixels), tf.uint8)
