"""Training and ``explain`` see the same pixels, whatever the file."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from wf_vit.data import decode, pixels
from wf_vit.data.config import View
from wf_vit.explanation import images

HEIGHT, WIDTH = 24, 40

# Each row: format, mode, options of Pillow, the tolerated difference. What is lossless
# must be the same; libraries differ in the rounding of JPEG.
EXACT, LOSSY = 0, 3
KINDS = [
    ("JPEG", "RGB", {"quality": 92}, LOSSY),
    ("JPEG", "RGB", {"quality": 92, "progressive": True}, LOSSY),
    ("JPEG", "L", {"quality": 92}, LOSSY),
    ("JPEG", "CMYK", {"quality": 92}, LOSSY),
    ("PNG", "RGB", {}, EXACT),
    ("PNG", "RGBA", {}, EXACT),
    ("PNG", "L", {}, EXACT),
    ("PNG", "LA", {}, EXACT),
    ("PNG", "P", {}, EXACT),
    ("PNG", "P", {"transparency": 3}, EXACT),
    ("PNG", "P", {"transparency": bytes(range(0, 250, 5))}, EXACT),
    ("PNG", "RGB", {"transparency": (128, 0, 64)}, EXACT),
    ("PNG", "L", {"transparency": 100}, EXACT),
    ("PNG", "1", {}, EXACT),
    ("PNG", "I;16", {}, EXACT),
    ("PNG", "I;16", {"transparency": 0}, EXACT),
    ("GIF", "P", {}, EXACT),
    ("GIF", "P", {"transparency": 3}, EXACT),
    ("GIF", "L", {}, EXACT),
    ("BMP", "RGB", {}, EXACT),
    ("BMP", "P", {}, EXACT),
    ("BMP", "RGBA", {}, EXACT),
    ("WEBP", "RGB", {"quality": 90}, EXACT),
    ("WEBP", "RGBA", {"quality": 90}, EXACT),
    ("WEBP", "RGB", {"lossless": True}, EXACT),
    ("WEBP", "RGBA", {"lossless": True}, EXACT),
    ("TIFF", "RGB", {}, EXACT),
    ("TIFF", "RGBA", {}, EXACT),
    ("TIFF", "CMYK", {}, EXACT),
    ("TIFF", "I;16", {}, EXACT),
    ("PPM", "RGB", {}, EXACT),
]
WITH_EXIF = ("JPEG", "PNG", "WEBP", "TIFF")
# From the stored pixels to the upright ones: EXIF 2.32, tag 274.
UPRIGHT = {
    None: lambda x: x,
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}
FILES = [
    (*kind, orientation)
    for kind in KINDS
    for orientation in ([None, *range(1, 9)] if kind[0] in WITH_EXIF else [None])
]


def picture(mode):
    """Smooth colours, every level of alpha, colours below what is transparent."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    channels = [6 * x, 10 * y, 3 * x + 5 * y, (13 * x + 29 * y) % 256]
    rgba = Image.fromarray(np.stack(channels, -1).astype(np.uint8), "RGBA")
    if mode == "I;16":
        levels = np.asarray(rgba.convert("L")).astype(np.uint16)
        return Image.fromarray(levels * 256 + (7 * levels) % 256)
    if mode in ("RGBA", "LA"):
        return rgba.convert(mode)
    return rgba.convert("RGB").convert(mode)


def encode(kind, mode, options, orientation=None):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
        options = {**options, "exif": exif}
    buffer = io.BytesIO()
    picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def differ_by(got, expected):
    assert got.shape == expected.shape
    return np.abs(np.asarray(got, int) - expected).max()


@pytest.mark.parametrize(("kind", "mode", "options", "tolerance", "orientation"), FILES)
def test_training_sees_what_explain_sees(
    tmp_path, kind, mode, options, tolerance, orientation
):
    path = tmp_path / "image.data"
    path.write_bytes(encode(kind, mode, options, orientation))
    expected = images.read(path)
    assert images.size(path) == expected.shape[:2]
    stored = pixels.decoded(encode(kind, mode, options))
    np.testing.assert_array_equal(expected, UPRIGHT[orientation](stored))
    data = tf.constant(path.read_bytes())
    view = decode.eval_view(View(expected.shape[:2]))
    assert differ_by(view(data).numpy(), expected) <= tolerance
    # And any part of it is that part.
    box = (3, 5, 11, 14)
    part = tf.function(lambda data: decode._decode(data, lambda _: tf.constant(box)))
    assert differ_by(part(data).numpy(), expected[3:14, 5:19]) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_random_windows_are_of_the_upright_image(orientation):
    """A window of an image that lies on its side is that of the same image upright."""
    lying = tf.constant(encode("PNG", "RGB", {}, orientation))
    upright = pixels.decoded(lying.numpy())
    seed = tf.constant([3, 4], tf.int64)
    buffer = io.BytesIO()
    Image.fromarray(upright).save(buffer, "PNG")
    view = decode.train_view(View((16, 24), crop="resized", min_area=0.2))
    np.testing.assert_array_equal(
        view(lying, seed), view(tf.constant(buffer.getvalue()), seed)
    )


def with_segments(jpeg, *segments):
    """The same JPEG with application segments of its own behind its first two bytes."""
    packed = b"".join(
        b"\xff" + marker + (len(body) + 2).to_bytes(2, "big") + body
        for marker, body in segments
    )
    return jpeg[:2] + packed + jpeg[2:]


def exif_segment(orientation, order):
    form = "<" if order == b"II" else ">"
    # One tag, 0x0112, of one 16-bit number; no second directory.
    body = struct.pack(f"{form}HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return b"\xe1", b"Exif\0\0" + order + body


XMP = (
    b"\xe1",
    b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'>"
    b'<rdf:Description tiff:Orientation="6"/></x:xmpmeta>',
)
THUMBNAIL = (b"\xed", b"Photoshop 3.0\x00 \xff\xda\x00\x0c\x03 pixels " + bytes(99))
NOISE = (b"\xe2", b"ICC_PROFILE\0" + bytes(range(256)) * 200)


@pytest.mark.parametrize(
    ("segments", "turned"),
    [
        ([exif_segment(6, b"II")], True),
        ([exif_segment(6, b"MM")], True),
        ([NOISE, exif_segment(6, b"MM")], True),
        ([THUMBNAIL, exif_segment(6, b"II")], True),
        ([XMP], None),  # Pillow reads it from JPEG since version 11.
        ([exif_segment(1, b"II"), XMP], False),
        ([exif_segment(0, b"II")], False),
        ([exif_segment(9, b"II")], False),
        ([(b"\xe1", b"Exif\0\0broken")], False),
        ([NOISE, THUMBNAIL], False),
        ([(b"\xfe", b"a comment that says Exif\0")], False),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_wherever_a_jpeg_says_how_it_was_held(segments, turned, mode):
    data = with_segments(encode("JPEG", mode, {}), *segments)
    expected = pixels.decoded(data)
    if turned is not None:
        assert expected.shape[:2] == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))
    view = decode.eval_view(View(expected.shape[:2]))
    assert differ_by(view(tf.constant(data)).numpy(), expected) <= LOSSY


def test_what_is_no_image_is_refused_as_a_wrong_argument():
    """What the pipeline names the file by."""
    view = tf.function(decode.eval_view(View((8, 8))))
    whole = encode("TIFF", "RGB", {})
    for data in (b"", b"no image", whole[: len(whole) // 2], b"\xff\xd8\xff"):
        with pytest.raises(tf.errors.InvalidArgumentError):
            view(tf.constant(data))
