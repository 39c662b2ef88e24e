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
    masks = jnp.broadcast_to(rows[None, :, None, None], (2, 3, 2, 4, 4))  # [L B H P P]
    first = jnp.broadcast_to(rows[:1, None, None], masks.shape)
    expected = np.array([1, 1 / 3, 0])
    overlap = field_overlap.overlap(first, masks)
    np.testing.assert_allclose(overlap, [expected, expected], atol=1e-6)
    # Layers are apart; heads count alike.
    other = first.at[1].set(~first[1]).at[0, :, 1].set(~first[0, :, 1])
    overlap = field_overlap.overlap(first, other)
    np.testing.assert_allclose(overlap, [[0.5] * 3, [0.0] * 3], atol=1e-6)


def test_share_on_the_object_is_of_its_patches_only():
    objects = np.array([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    masks = np.zeros((1, 3, 1, 4, 4), bool)
    masks[..., 0, :2] = True  # All on the first image's object,
    masks[..., 1, 1:] = True  # a third,
    masks[..., 2:, 3] = True  # and what the background looks at does not count.
    share = field_overlap.share_on(objects, jnp.asarray(masks))
    np.testing.assert_allclose(share, [[(1 + 1 / 3) / 2, 1, np.nan]], rtol=1e-6)


@pytest.mark.parametrize("sign", [-1, 1])
def test_objects_are_found_whatever_the_sign_of_the_component(sign):
    generator = np.random.default_rng(0)
    objects = np.zeros((2, 4, 5), bool)
    objects[0, 1:3, 1:4] = objects[1, 0:3, 2:4] = True
    direction = sign * generator.standard_normal(16)
    features = objects.reshape(2, 20, 1) * direction
    features = features + 0.1 * generator.standard_normal((2, 20, 16)) + 3
    found = field_overlap.objects_in(features, (4, 5))
    np.testing.assert_array_equal(found, objects.reshape(2, 20))


def loaded(cls):
    """A random model that takes images as they are."""
    model = cls(**SMALL)
    return types.SimpleNamespace(
        model=model,
        params=random_params(model, noise=0.5),
        preprocess=lambda images: jnp.asarray(images, jnp.float32) / 127.5 - 1,
    )


@pytest.mark.parametrize("per_head", [False, True])
def test_fields_of_the_image_before_are_those_of_the_image_before(per_head):
    student, teacher = loaded(WindowFreeViT), loaded(ViT)
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 16, 3), np.uint8)
    options = {"area": 0.25, "batch_size": 2, "per_head": per_head}
    found, shares = field_overlap.measure(student, teacher, images, **options)
    depth = student.model.depth
    assert {values.shape for values in found.values()} == {(depth, 4)}
    assert shares.keys() - found.keys() == {field_overlap.TAUGHT}
    # The first two of four, the other way round: each is the image before the other.
    pixels = student.preprocess(images[:2])
    options = {"count": 3, "per_head": per_head}
    taught, _ = field_overlap.attended(
        teacher.params, pixels, model=teacher.model, **options
    )
    own = field_overlap.learned(student.params, pixels, model=student.model, **options)
    assert taught.shape == own.shape
    assert own.shape[2] == (student.model.num_heads if per_head else 1)
    before = field_overlap.overlap(taught, own[:, np.array([1, 0])])
    np.testing.assert_allclose(found["of the image before"][:, :2], before, rtol=1e-6)
    np.testing.assert_allclose(
        found["beyond that image"],
        found["learned fields"] - found["of the image before"],
    )


def test_what_cannot_be_compared_is_named():
    student, teacher = loaded(WindowFreeViT), loaded(ViT)
    images = np.zeros((4, 12, 16, 3), np.uint8)
    options = {"area": 0.25, "batch_size": 2}
    with pytest.raises(UsageError, match="4 images do not fill batches of 3"):
        field_overlap.measure(student, teacher, images, area=0.25, batch_size=3)
    with pytest.raises(UsageError, match="without learned fields"):
        field_overlap.measure(teacher, teacher, images, **options)
    teacher.model = teacher.model.clone(num_heads=1)
    with pytest.raises(UsageError, match="4 and 1 heads: leave out --per_head"):
        field_overlap.measure(student, teacher, images, **options, per_head=True)


def test_the_table_shows_images_heads_and_layers():
    values = np.array([[0.2, 0.4, np.nan], [0.4, 0.6, 0.1]])
    own = field_overlap.summarize(values)
    assert own["mean"] == pytest.approx(0.4)
    assert own["layers"] == [0.3, 0.5]
    results = {"images": 3, "area": 0.25, "per_head": True, "teacher": "vit"}
    results["overlap"] = {"runs/winft": {field_overlap.BEYOND: own}}
    text = field_overlap.table(results)
    assert "head by head" in text
    assert "| runs/winft | 0.400 ± 0.196 |" in text
    assert "| runs/winft | 0.300 | 0.500 |" in text
    assert "object" not in text
