"""RandAugment's operations against Pillow's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from wf_vit.data import randaugment

FILL = (10, 120, 200)


@pytest.fixture(scope="module")
def photo():
    """A smooth image with noise whose channels do not span all levels."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :60]
    waves = [np.sin(x / 9 + y / 17), np.cos(x / 21 - y / 5), np.sin(y / 7)]
    image = 120 + 60 * np.stack(waves, axis=-1) + rng.normal(0, 8, (40, 60, 3))
    return np.clip(image, 20, 235).astype(np.uint8)


@jax.jit
def _apply(image, operation, severity):
    return randaugment.apply(image, operation, severity, jnp.asarray(FILL, jnp.float32))


def _ours(photo, name, severity):
    result = _apply(
        jnp.asarray(photo, jnp.float32),
        jnp.asarray(randaugment.OPERATIONS.index(name)),
        jnp.asarray(severity, jnp.float32),
    )
    np.testing.assert_array_equal(result, np.round(result))
    assert 0 <= result.min() <= result.max() <= 255
    return np.asarray(result)


def _enhance(kind):
    return lambda image, severity: kind(image).enhance(1 + 0.9 * severity)


PILLOW = {
    "identity": lambda image, severity: image,
    "autocontrast": lambda image, severity: ImageOps.autocontrast(image),
    "equalize": lambda image, severity: ImageOps.equalize(image),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 * (1 - abs(s))),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "sharpness": _enhance(ImageEnhance.Sharpness),
}


@pytest.mark.parametrize("severity", [0.5, -0.75, 1.0])
@pytest.mark.parametrize("name", PILLOW)
def test_colour_operations_equal_pillow_within_rounding(photo, name, severity):
    expected = np.asarray(PILLOW[name](Image.fromarray(photo), severity), np.float32)
    if name != "identity":
        assert np.abs(expected - photo).max() >= 3  # the operation does something
    assert np.abs(_ours(photo, name, severity) - expected).max() <= 1


def _affine(image, a, b, c, d, e, f):
    coefficients = (a, b, c, d, e, f)
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )


# The translations are whole numbers of pixels: 0.45 of a side, times the severity.
WARPS = {
    "rotate": lambda image, s: image.rotate(30 * s, Image.Resampling.BILINEAR),
    "shear_x": lambda image, s: _affine(image, 1, 0.3 * s, -0.3 * s * 20, 0, 1, 0),
    "shear_y": lambda image, s: _affine(image, 1, 0, 0, 0.3 * s, 1, -0.3 * s * 30),
    "translate_x": lambda image, s: _affine(image, 1, 0, 27 * s, 0, 1, 0),
    "translate_y": lambda image, s: _affine(image, 1, 0, 0, 0, 1, 18 * s),
}


@pytest.mark.parametrize("severity", [1.0, -1.0])
@pytest.mark.parametrize("name", WARPS)
def test_warps_equal_pillow_inside_and_fill_outside(photo, name, severity):
    expected = np.asarray(WARPS[name](Image.fromarray(photo), severity), np.float32)
    white = Image.fromarray(np.full_like(photo, 255))
    covered = np.asarray(WARPS[name](white, severity))[..., 0]
    # Pillow repeats the border for half a pixel; look past that.
    near = np.stack([np.roll(covered, s, axis) for s in (-1, 0, 1) for axis in (0, 1)])
    rows, columns = np.mgrid[:40, :60]
    frame = (rows % 39 == 0) | (columns % 59 == 0)
    inside = (near.min(axis=0) == 255) & ~frame
    outside = (near.max(axis=0) == 0) & ~frame
    ours = _ours(photo, name, severity)
    assert inside.mean() > 0.4
    assert outside.mean() > 0.01
    assert np.abs(ours - expected)[inside].max() <= 2
    np.testing.assert_array_equal(ours[outside], np.tile(FILL, (outside.sum(), 1)))


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_severity_zero_changes_nothing_but_histogram_operations(photo, name):
    changed = not np.array_equal(_ours(photo, name, 0.0), photo)
    assert changed == (name in ("autocontrast", "equalize"))


def test_constant_image_survives_autocontrast_and_equalize():
    flat = np.full((8, 8, 3), 77, np.uint8)
    for name in ("autocontrast", "equalize"):
        np.testing.assert_array_equal(_ours(flat, name, 1.0), flat)


def test_layers_draw_all_operations_and_depend_on_the_key_only(photo):
    image = jnp.asarray(photo, jnp.float32)
    fill = jnp.asarray(FILL, jnp.float32)

    @jax.jit
    @jax.vmap
    def augmented(key):
        return randaugment.randaugment(key, image, layers=1, magnitude=9.0, fill=fill)

    keys = jax.random.split(jax.random.key(0), 300)
    results = np.asarray(augmented(keys))
    # Another batch size is another program, which may round to the next level.
    np.testing.assert_allclose(results[5:7], augmented(keys[5:7]), atol=1)
    severities = {0.9: range(14), -0.9: range(5, 14)}
    possible = [
        _ours(photo, randaugment.OPERATIONS[index], severity)
        for severity, indices in severities.items()
        for index in indices
    ]
    distances = np.asarray([[np.abs(r - p).max() for p in possible] for r in results])
    assert distances.min(axis=1).max() <= 1  # each result is one operation's
    assert set(distances.argmin(axis=1)) == set(range(len(possible)))
