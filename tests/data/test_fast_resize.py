"""Training images that are shrunk fast: the same picture, and only of training."""

import dataclasses
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from wf_vit.data import decode
from wf_vit.data.config import View

SEED = tf.constant([1, 2], tf.int64)


def picture(height, width):
    """Smooth, with another gradient in each channel."""
    y, x = np.mgrid[:height, :width]
    channels = [250 * x / width, 250 * y / height, 125 * (x / width + y / height)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encode(pixels, kind="JPEG", orientation=None, **options):
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return tf.constant(buffer.getvalue())


def fast(size, crop="none", **changes):
    return View(size, crop=crop, fast_resize=True, **changes)


def seen(view, data, seed=SEED):
    return decode.train_view(view)(data, seed).numpy().astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
@pytest.mark.parametrize("size", [(20, 30), (100, 150), (160, 240)])
def test_the_picture_is_that_of_the_slow_one(kind, crop, size):
    view = fast(size, crop, min_area=0.3, pad=0)
    data = encode(picture(100, 150), kind)
    image = seen(view, data)
    assert image.shape == (*size, 3)
    # The smallest image is decoded at 1/4, whose pixel is half a pixel of it.
    allowed = 9 if kind == "JPEG" and size[0] == 20 else 4
    slow = dataclasses.replace(view, fast_resize=False)
    assert np.abs(image - seen(slow, data)).max() <= allowed


def test_shrinking_takes_the_mean_of_every_box():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    means = pixels.reshape(20, 3, 30, 3, 3).mean((1, 3))
    image = seen(fast((20, 30)), encode(pixels, "PNG"))
    assert np.abs(image - means).max() <= 0.51


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos3"])
def test_enlarging_is_as_ever(method):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    view = fast((40, 60), resize_method=method)
    slow = dataclasses.replace(view, fast_resize=False)
    data = encode(pixels, "PNG")
    assert np.abs(seen(view, data) - seen(slow, data)).max() <= 1


@pytest.mark.parametrize("crop", ["resized", "none"])
def test_evaluation_does_not_change(crop):
    pixels = np.random.default_rng(0).integers(0, 256, (160, 240, 3), np.uint8)
    view = fast((20, 30), crop, eval_resize=0.875)
    slow = dataclasses.replace(view, fast_resize=False)
    data = encode(pixels)
    np.testing.assert_array_equal(
        decode.eval_view(view)(data), decode.eval_view(slow)(data)
    )


@pytest.mark.parametrize(
    ("extent", "expected"),
    [(99, 99), (199, 199), (200, 100), (399, 199), (400, 100), (801, 100)],
)
def test_a_jpeg_is_decoded_no_smaller_than_is_needed(extent, expected):
    data = encode(picture(801, 803))
    window = lambda _: tf.constant([0, 1, extent, extent])  # noqa: E731
    assert decode._decode(data, window, least=100).shape[:2] == (expected,) * 2
    assert decode._decode(data, window).shape[:2] == (extent,) * 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(40, 40), (20, 28), (10, 14)])
def test_small_jpegs_are_turned_upright(orientation, size):
    """A large JPEG that lies on its side is seen as the one that stands upright."""
    lying = encode(picture(161, 203), orientation=orientation)
    upright = encode(decode._decode(lying, _whole).numpy())
    view = fast(size, "resized", min_area=0.5)
    for index in range(4):
        seed = tf.constant([index, 3], tf.int64)
        difference = np.abs(seen(view, lying, seed) - seen(view, upright, seed))
        # Both begin at the next pixel of the smaller image, from different corners.
        assert difference.max() <= 2 + 260 / min(size)


def _whole(shape):
    return tf.concat([[0, 0], shape], axis=0)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_small_jpegs_of_other_colours_become_rgb(mode):
    buffer = io.BytesIO()
    Image.fromarray(picture(161, 203)).convert(mode).save(buffer, "JPEG", quality=95)
    data = tf.constant(buffer.getvalue())
    view = fast((20, 20))
    slow = dataclasses.replace(view, fast_resize=False)
    assert np.abs(seen(view, data) - seen(slow, data)).max() <= 9


def test_windows_of_odd_sizes_stay_within_the_small_image():
    rng = np.random.default_rng(0)
    view = tf.function(decode.train_view(fast((8, 8), "resized", min_area=0.02)))
    for index in range(60):
        height, width = rng.integers(9, 150, 2)
        data = encode(picture(height, width), progressive=index % 2 == 0)
        assert view(data, tf.constant([index, 0], tf.int64)).shape == (8, 8, 3)


def test_a_damaged_jpeg_is_refused():
    data = encode(picture(160, 240)).numpy()
    view = tf.function(decode.train_view(fast((20, 20))))
    with pytest.raises(tf.errors.InvalidArgumentError):
        view(tf.constant(data[: len(data) // 2]), SEED)
