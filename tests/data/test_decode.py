"""Decoding and cropping: every kind of file, and where the window lies."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from wf_vit.data import decode
from wf_vit.data.config import View

# Smooth, so that a resize can be compared; x runs in red, y in green.
GRADIENT = np.stack(
    np.broadcast_arrays(
        np.arange(0, 240, 2)[None, :], np.arange(0, 240, 3)[:, None], 100
    ),
    axis=-1,
).astype(np.uint8)  # 80 high, 120 wide


def _encode(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return tf.constant(buffer.getvalue())


def _convert(mode):
    image = Image.fromarray(GRADIENT)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("I;16", "PNG"),
        ("P", "GIF"),
        ("RGB", "BMP"),
    ],
)
@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
def test_every_kind_of_file_becomes_rgb(mode, kind, crop):
    view = View((80, 120), crop=crop, min_area=0.9, pad=0)
    source = _convert(mode)
    data = _encode(source, kind, **({"quality": 95} if kind == "JPEG" else {}))
    image = decode.train_view(view)(data, tf.constant([1, 2], tf.int64))
    assert image.dtype == tf.uint8
    assert image.shape == (80, 120, 3)
    if crop != "resized":
        expected = (_convert("L") if mode == "I;16" else source).convert("RGB")
        assert np.abs(image.numpy().astype(int) - np.asarray(expected)).mean() < 2


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = _encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    image = decode.eval_view(View(image_size=(8, 8)))(data)
    np.testing.assert_array_equal(image[0, 0], (255, 0, 0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("size", "share", "box"),
    [
        ((40, 40), 1.0, (20, 0, 100, 80)),
        ((40, 40), 0.5, (40, 20, 80, 60)),
        ((20, 40), 1.0, (0, 10, 120, 70)),
    ],
)
def test_evaluation_resizes_the_central_window(kind, size, share, box):
    view = View(image_size=size, eval_resize=share)
    exact = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = _encode(Image.fromarray(GRADIENT), kind, **exact)
    image = decode.eval_view(view)(data).numpy()
    expected = Image.fromarray(GRADIENT).crop(box)
    expected = expected.resize(size[::-1], Image.Resampling.BILINEAR)
    assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 4


def test_random_windows_keep_area_shape_and_place():
    """Decodes the window's own edges from the gradient."""
    settings = View(image_size=(64, 64), crop="resized", min_area=0.25)
    data = _encode(Image.fromarray(GRADIENT), "PNG")
    view = tf.function(decode.train_view(settings))
    areas, lefts = [], []
    for index in range(100):
        image = view(data, tf.constant([index, 0], tf.int64)).numpy()
        x = image[..., 0].astype(float) / 2
        y = image[..., 1].astype(float) / 3
        width = (x[:, -1] - x[:, 0]).mean() * 64 / 63
        height = (y[-1] - y[0]).mean() * 64 / 63
        assert 0.65 < width / height < 1.5
        areas.append(width * height / (80 * 120))
        lefts.append(x.min())
    assert 0.2 < min(areas) < 0.32
    assert max(areas) > 0.75
    assert np.ptp(lefts) > 50
    again = view(data, tf.constant([99, 0], tf.int64))
    np.testing.assert_array_equal(image, again)


def test_padding_shifts_by_at_most_pad_pixels():
    settings = View((80, 120), crop="pad", pad=4, pad_mode="constant")
    data = _encode(Image.fromarray(GRADIENT + 1), "PNG")
    view = tf.function(decode.train_view(settings))
    shifts = set()
    for index in range(60):
        image = view(data, tf.constant([index, 0], tf.int64)).numpy()
        inside = image[..., 2] > 0
        top, left = inside.argmax(axis=0).max(), inside.argmax(axis=1).max()
        bottom = inside[::-1].argmax(axis=0).max()
        right = inside[:, ::-1].argmax(axis=1).max()
        dy, dx = top - bottom, left - right
        kept = image[max(dy, 0) : 80 + min(dy, 0), max(dx, 0) : 120 + min(dx, 0)]
        original = (GRADIENT + 1)[
            max(-dy, 0) : 80 + min(-dy, 0), max(-dx, 0) : 120 + min(-dx, 0)
        ]
        np.testing.assert_array_equal(kept, original)
        shifts.add((dy, dx))
    assert {dy for dy, _ in shifts} == {dx for _, dx in shifts} == set(range(-4, 5))


def test_a_jpeg_decoded_in_part_equals_the_part_of_the_whole():
    data = _encode(Image.fromarray(GRADIENT), "JPEG")
    whole = decode._decode(data, lambda shape: tf.concat([[0, 0], shape], 0))
    part = decode._decode(data, lambda shape: tf.constant([13, 21, 30, 50]))
    np.testing.assert_array_equal(part, whole[13:43, 21:71])
