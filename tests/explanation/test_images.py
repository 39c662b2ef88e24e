"""Images as people have them."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.explanation.example import NAMES, noise
from wf_vit.errors import UsageError
from wf_vit.explanation import images
from wf_vit.models.pretrained.preprocess import IMAGENET, ImageFormat, Preprocess


def test_images_are_found_once_under_names_of_their_own(photographs, tmp_path):
    (photographs / ".hidden").mkdir(exist_ok=True)
    Image.fromarray(noise(4, 4)).save(photographs / ".hidden/c.png")
    found = images.find(str(photographs), leave_out=tmp_path)
    assert [source.name for source in found] == sorted([*NAMES, "broken"])
    assert found[-1].path == photographs / "more/a.png"
    paths = [photographs / "more", photographs / "a.png", photographs / "more/a.png"]
    found = images.find(", ".join(map(str, paths)), leave_out=tmp_path)
    assert [source.name for source in found] == ["a", "more/a"]
    found = images.find(str(photographs), leave_out=photographs / "more")
    assert "more/a" not in [source.name for source in found]


def test_a_file_does_not_take_the_name_of_a_folder(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("cat.png", "cat/1.png"):
        Image.fromarray(noise(4, 4)).save(tmp_path / name)
    found = images.find(str(tmp_path), leave_out=tmp_path / "x")
    assert [source.name for source in found] == ["cat.png", "cat/1"]


def test_a_file_may_have_a_comma_in_its_name_and_any_suffix(tmp_path):
    path = tmp_path / "me, myself.image"
    Image.fromarray(noise(4, 4)).save(path, format="png")
    assert images.find(str(path), leave_out=tmp_path / "x") == [("me, myself", path)]


def test_a_name_that_is_no_text_becomes_one(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    (source,) = images.find(str(tmp_path), leave_out=tmp_path / "x")
    assert source.name == r"caf\xe9"
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
    assert images.size(tmp_path / "image.jpg") == (16, 32)
    assert np.abs(got.astype(int) - upright).max() < 80


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n0000"])
def test_a_broken_file_is_an_error_that_says_why(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    for look in (images.read, images.size):
        with pytest.raises(images.UnreadableImageError, match="Error: "):
            look(tmp_path / "image.png")


def tensor_like(array):
    """What stands in for a tensor of PyTorch, which is not always there."""

    class Tensor:
        shape, dtype = array.shape, array.dtype

        def detach(self):
            return self

        def cpu(self):
            return self

        def numpy(self):
            return array

    return Tensor()


def test_people_pass_images_of_any_kind(tmp_path):
    pixels = noise(6, 8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    shares = pixels / np.float32(255)
    for image in (
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        Image.fromarray(pixels),
        pixels,
        shares,
        jnp.asarray(shares),
        tensor_like(shares.astype(np.float64)),
    ):
        np.testing.assert_array_equal(images.as_photograph(image), pixels)
    gray = np.repeat(pixels[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(images.as_photograph(pixels[..., 0]), gray)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "no image at nowhere"),
        (noise(6, 8).transpose(2, 0, 1), r"channels come first.*permute"),
        (noise(6, 8)[None], "one image, or a list"),
        (noise(6, 8, 4), r"shape \(6, 8, 4\)"),
        (np.zeros((6, 8, 3), np.int32), "holds int32"),
        (np.full((6, 8, 3), 255.0), "divided by 255"),
        (np.full((6, 8, 3), -1.0), "before it is normalised"),
        (np.full((6, 8, 3), np.nan), "holds float64"),
    ],
)
def test_an_image_that_is_none_is_an_error(image, message):
    with pytest.raises(UsageError, match=message):
        images.as_photograph(image)


def test_the_size_that_a_model_sees():
    def size(photograph, wanted, fit):
        return images.seen_size(photograph, (224, 224), (14, 14), wanted, fit)

    # As many patches as 16 x 16, in the shape of the photograph.
    assert size((300, 451), (), "whole") == (13 * 14, 20 * 14)
    assert size((451, 300), (), "whole") == (20 * 14, 13 * 14)
    assert size((400, 400), (), "whole") == (224, 224)
    assert size((300, 451), (448,), "whole") == (26 * 14, 39 * 14)
    assert size((10, 9000), (), "whole") == (14, 480 * 14)
    assert size((300, 451), (), "crop") == size((300, 451), (), "model") == (224, 224)
    assert size((300, 451), (28, 42), "whole") == (28, 42)
    with pytest.raises(UsageError, match="choose one of whole, crop, model"):
        size((300, 451), (), "pad")
    with pytest.raises(UsageError, match=r"image_size is \(1, 2, 3\)"):
        size((300, 451), (1, 2, 3), "whole")


def test_nothing_is_cropped_unless_asked():
    # A frame around the photograph: what is cropped has lost it.
    photograph = np.full((90, 120, 3), 200, np.uint8)
    photograph[[0, 1, -2, -1]] = photograph[:, [0, 1, -2, -1]] = 0
    image_format = ImageFormat(*IMAGENET, "bicubic", 0.8)
    square = Preprocess((45, 45), image_format)
    whole, crop, model = (images.fitted(photograph, square, f) for f in images.FITS)
    assert whole.shape == crop.shape == model.shape == (45, 45, 3)
    assert whole[[0, -1]].max() < 80
    assert whole[:, [0, -1]].max() < 80
    assert crop[[0, -1]].max() < 80
    assert crop[10, [0, -1]].min() > 150
    assert model[0, 20].min() > 150
