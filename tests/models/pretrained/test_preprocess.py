"""Preprocessing against Pillow, and at any size."""

import numpy as np
import pytest
from PIL import Image

from wf_vit.errors import UsageError
from wf_vit.models.pretrained.preprocess import HALF, IMAGENET, ImageFormat, Preprocess


def test_preprocessing_crops_the_centre_or_squashes():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (300, 500, 3)).astype(np.uint8)
    mean, std = (255 * np.asarray(x, np.float32) for x in IMAGENET)
    cropping = Preprocess((224, 224), ImageFormat(*IMAGENET, "bicubic", 0.875))
    # Height to 256, width to 256 * 500 / 300 = 426, then the central 224.
    resized = Image.fromarray(image).resize((426, 256), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[16:240, 101:325]
    np.testing.assert_allclose(cropping([image])[0], (expected - mean) / std)
    squashing = Preprocess((32, 64), ImageFormat(*IMAGENET, "bilinear", None))
    resized = Image.fromarray(image).resize((64, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(
        squashing([image, image])[1], (np.asarray(resized) - mean) / std
    )


@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(10, 301), (301, 10), (7, 7), (1000, 999)])
def test_preprocessing_always_fills_the_models_size(crop, shape):
    preprocess = Preprocess((28, 42), ImageFormat(*HALF, "bilinear", crop))
    images = np.full((1, *shape, 3), 255, np.uint8)
    np.testing.assert_allclose(preprocess(images), np.ones((1, 28, 42, 3)), rtol=1e-6)


def test_images_of_the_wrong_kind_are_refused():
    preprocess = Preprocess((4, 4), ImageFormat(*HALF, "bilinear", None))
    with pytest.raises(UsageError, match="expected uint8"):
        preprocess.normalize(np.zeros((1, 4, 5, 3), np.uint8))
    with pytest.raises(UsageError, match="interpolation is 'area'"):
        ImageFormat(*HALF, "area", None)
