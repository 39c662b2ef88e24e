"""Images as people have them."""

import os

import numpy as np
import pytest
from PIL import Image

from tests.explanation.example import NAMES, noise
from wf_vit.errors import UsageError
from wf_vit.explanation import images


def test_images_are_found_once_under_names_of_their_own(photographs, tmp_path):
    (photographs / ".hidden").mkdir(exist_ok=True)
    Image.fromarray(noise(4, 4)).save(photographs / ".hidden/c.png")
    found = images.find(str(photographs), leave_out=tmp_path)
    assert [source.name for source in found] == sorted([*NAMES, "broken.jpg"])
    assert all(source.path == photographs / source.name for source in found)
    paths = [photographs / "more", photographs / "a.png", photographs / "more/a.png"]
    found = images.find(", ".join(map(str, paths)), leave_out=tmp_path)
    assert [source.name for source in found] == ["a.png", "more/a.png"]
    found = images.find(str(photographs), leave_out=photographs / "more")
    assert "more/a.png" not in [source.name for source in found]


def test_a_file_may_have_a_comma_in_its_name_and_any_suffix(tmp_path):
    path = tmp_path / "me, myself.image"
    Image.fromarray(noise(4, 4)).save(path, format="png")
    assert images.find(str(path), leave_out=tmp_path / "x") == [(path.name, path)]


def test_a_name_that_is_no_text_becomes_one(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    (source,) = images.find(str(tmp_path), leave_out=tmp_path / "x")
    assert source.name == r"caf\xe9.png"
    assert source.path.exists()


@pytest.mark.parametrize("paths", ["nowhere", "", ","])
def test_no_images_is_an_error(paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"config\.images"):
        images.find(paths, leave_out=tmp_path)


def saved(tmp_path, image, suffix="png", **options):
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    return images.read(path)


def test_any_kind_of_image_becomes_rgb(tmp_path):
    gray = noise(5, 7, 1)[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=-1)
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(gray)), expected)
    deep = Image.fromarray(257 * gray.astype(np.uint16))
    np.testing.assert_array_equal(saved(tmp_path, deep), expected)
    palette = Image.fromarray(gray).convert("P")
    np.testing.assert_array_equal(saved(tmp_path, palette), expected)
    cmyk = saved(tmp_path, Image.new("CMYK", (7, 5), (0, 255, 0, 0)), "jpg")
    assert np.abs(cmyk.astype(int) - (255, 0, 255)).max() < 10


def test_what_is_transparent_lies_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 51, 255)
    opaque = saved(tmp_path, Image.fromarray(pixels, "RGBA"))
    np.testing.assert_array_equal(opaque[0, :, 0], [255, 204, 0])
    gray = Image.fromarray(pixels[..., 2:], "LA")
    np.testing.assert_array_equal(saved(tmp_path, gray), opaque)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(tmp_path, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # How a camera that was held so stores it: EXIF 2.32, tag 274.
    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    image = Image.fromarray(np.ascontiguousarray(turned))
    got = saved(tmp_path, image, "jpg", exif=exif, quality=95)
    assert np.abs(got.astype(int) - upright).max() < 80


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n0000"])
def test_a_broken_file_is_an_error_that_says_why(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(images.UnreadableImageError, match="Error: "):
        images.read(tmp_path / "image.png")
