"""The overlap of fields, on masks whose overlap is known."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import field_overlap
from tests.networks import SMALL, random_params
from wf_vit.errors import UsageError
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import WindowFreeViT


def test_the_largest_keys_of_every_query():
    score = jnp.asarray([[[0.1, 0.3, 0.2], [3.0, 1.0, 2.0], [0.0, -1.0, -2.0]]])
    expected = [[[0, 1, 1], [1, 0, 1], [1, 1, 0]]]
    np.testing.assert_array_equal(field_overlap.largest(score, 2), np.bool_(expected))


def test_overlap_is_the_intersection_over_the_union_image_by_image():
    rows = jnp.asarray([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool)
    masks = jnp.broadcast_to(rows[None, :, None], (2, 3, 4, 4))  # [L, B, P, P]
    first = jnp.broadcast_to(rows[:1, None], masks.shape)
    overlap = field_overlap.overlap(first, masks)
    np.testing.assert_allclose(overlap, [1, 1 / 3, 0], atol=1e-6)
    # Layers count alike.
    half = first.at[1].set(~first[1])
    np.testing.assert_allclose(field_overlap.overlap(first, half), 0.5, atol=1e-6)


def loaded(cls):
    """A random model that takes images as they are."""
    model = cls(**SMALL)
    return types.SimpleNamespace(
        model=model,
        params=random_params(model, noise=0.5),
        preprocess=lambda images: jnp.asarray(images, jnp.float32) / 127.5 - 1,
    )


def test_fields_of_the_image_before_are_those_of_the_image_before():
    student, teacher = loaded(WindowFreeViT), loaded(ViT)
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 16, 3), np.uint8)
    options = {"area": 0.25, "batch_size": 2}
    found = field_overlap.measure(student, teacher, images, **options)
    assert {values.shape for values in found.values()} == {(4,)}
    # The first two of four, the other way round: each is the image before the other.
    pixels = student.preprocess(images[:2])
    taught = field_overlap.attended(
        teacher.params, pixels, model=teacher.model, count=3
    )
    own = field_overlap.learned(student.params, pixels, model=student.model, count=3)
    before = field_overlap.overlap(taught, own[:, np.array([1, 0])])
    np.testing.assert_allclose(found["of the image before"][:2], before, rtol=1e-6)
    np.testing.assert_allclose(
        found["beyond the image before"],
        found["learned fields"] - found["of the image before"],
    )
    with pytest.raises(UsageError, match="4 images do not fill batches of 3"):
        field_overlap.measure(student, teacher, images, area=0.25, batch_size=3)
    with pytest.raises(UsageError, match="without learned fields"):
        field_overlap.measure(teacher, teacher, images, **options)
