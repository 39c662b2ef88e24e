"""Augmentation: what each part does, and that devices do not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit.data import augment
from wf_vit.data.config import Augmentation
from wf_vit.errors import UsageError


def _config(**settings):
    return Augmentation(**settings)


def _batch(size=8, height=12, width=16):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, height, width, 3), np.uint8)
    return jnp.asarray(images), jnp.arange(size, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def _jitted(keys, images, labels, num_classes, config):
    return augment.augment_batch(
        keys, images, labels, num_classes=num_classes, augmentation=config
    )


def _augment(config, images, labels, seed=0, num_classes=10):
    keys = augment.example_keys(jax.random.key(seed), 0, len(labels))
    return _jitted(keys, images, labels, num_classes, config)


EVERYTHING = {
    "flip_probability": 0.5,
    "randaugment_layers": 2,
    "erase_probability": 0.5,
    "mixup_probability": 0.4,
    "cutmix_probability": 0.4,
}


def test_without_augmentation_it_only_normalizes():
    images, labels = _batch()
    config = _config(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    result, targets = _augment(config, images, labels)
    expected = (np.asarray(images) / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_array_equal(targets, np.eye(10)[:8])


def test_normalize_takes_floats_too():
    pixels = jnp.asarray([[0.0, 127.5, 255.0]])
    result = augment.normalize(pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    np.testing.assert_allclose(result, [[-1.0, 0.0, 1.0]], atol=1e-6)


def test_flip_mirrors_about_half_of_the_images():
    images, labels = _batch(64)
    plain, _ = _augment(_config(), images, labels)
    result, _ = _augment(_config(flip_probability=0.5), images, labels)
    kept = np.isclose(result, plain, atol=1e-5).all(axis=(1, 2, 3))
    flipped = np.isclose(result, plain[:, :, ::-1], atol=1e-5).all(axis=(1, 2, 3))
    assert (kept != flipped).all()
    assert 16 < flipped.sum() < 48


def test_four_devices_equal_one():
    images, labels = _batch(16)
    config = _config(**EVERYTHING)
    whole, whole_targets = _augment(config, images, labels)

    def step(key, images, labels):
        offset = jax.lax.axis_index("batch") * len(labels)
        keys = augment.example_keys(key, offset, len(labels))
        return augment.augment_batch(
            keys, images, labels, num_classes=10, augmentation=config
        )

    if jax.device_count() < 4:
        pytest.skip("needs four devices (JAX_NUM_CPU_DEVICES=4)")
    shards = jax.pmap(step, "batch", in_axes=(None, 0, 0))(
        jax.random.key(0), images.reshape(4, 4, 12, 16, 3), labels.reshape(4, 4)
    )
    np.testing.assert_allclose(shards[0].reshape(whole.shape), whole, atol=1e-6)
    np.testing.assert_allclose(shards[1].reshape(16, 10), whole_targets, atol=1e-6)


def test_images_of_a_batch_are_treated_differently():
    image = jnp.broadcast_to(_batch(1)[0], (8, 12, 16, 3))
    config = _config(
        **{**EVERYTHING, "mixup_probability": 0.0, "cutmix_probability": 0.0}
    )
    result, _ = _augment(config, image, _batch()[1])
    assert len({r.tobytes() for r in np.asarray(result)}) > 5


def test_the_key_matters():
    config = _config(erase_probability=1.0)
    results = [_augment(config, *_batch(), seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_mixup_mixes_images_and_labels_with_one_weight():
    images, labels = _batch()
    plain, _ = _augment(_config(), images, labels)
    result, targets = _augment(_config(mixup_probability=1.0), images, labels)
    own = np.asarray(targets)[np.arange(8), np.arange(8)]
    assert np.ptp(own) > 0.1
    np.testing.assert_allclose(np.sum(targets, axis=1), 1, atol=1e-6)
    partner = np.arange(8) ^ 1
    np.testing.assert_allclose(
        np.asarray(targets)[np.arange(8), partner], 1 - own, atol=1e-6
    )
    share = own[:, None, None, None]
    expected = share * plain + (1 - share) * np.asarray(plain)[partner]
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_cutmix_labels_are_the_shares_of_pixels():
    images, labels = _batch(32)
    plain, _ = _augment(_config(), images, labels)
    config = _config(cutmix_probability=1.0)
    result, targets = _augment(config, images, labels, num_classes=32)
    result, plain, targets = map(np.asarray, (result, plain, targets))
    partner = np.arange(32) ^ 1
    is_own = np.isclose(result, plain).all(axis=-1)
    is_partners = np.isclose(result, plain[partner]).all(axis=-1)
    assert (is_own ^ is_partners).all()
    own = is_own.mean(axis=(1, 2))
    np.testing.assert_allclose(targets[np.arange(32), np.arange(32)], own, atol=1e-6)
    assert own.min() < 0.4
    assert own.max() > 0.8
    cut = ~is_own
    boxes = cut.any(axis=2)[:, :, None] & cut.any(axis=1)[:, None, :]
    np.testing.assert_array_equal(cut, boxes)  # what is cut is a rectangle


def test_erasing_puts_noise_of_the_stated_area_in_a_box():
    images, labels = _batch(64, 32, 32)
    labels = labels % 10
    plain, _ = _augment(_config(), images, labels)
    result, targets = _augment(_config(erase_probability=0.5), images, labels)
    # Two programs: what is left alone may differ by a rounding error.
    changed = ~np.isclose(result, plain, atol=1e-5).all(axis=-1)
    area = changed.mean(axis=(1, 2))
    assert 16 < (area > 0).sum() < 48
    assert area[area > 0].min() > 0.01
    assert 0.25 < area.max() < 0.37
    boxes = changed.any(axis=2)[:, :, None] & changed.any(axis=1)[:, None, :]
    np.testing.assert_array_equal(changed, boxes)
    noise = np.asarray(result)[changed]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    np.testing.assert_array_equal(targets, np.eye(10)[np.asarray(labels)])


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"mixup_probability": 0.7, "cutmix_probability": 0.7}, 8, "1.4"),
        ({"flip_probability": -0.5}, 8, "flip_probability"),
        ({"randaugment_magnitude": 15.0}, 8, "randaugment_magnitude"),
        ({"mixup_probability": 0.5}, 7, "even"),
    ],
)
def test_wrong_settings_are_named(settings, size, message):
    with pytest.raises(UsageError, match=message):
        _augment(_config(**settings), *_batch(size))


def test_an_image_whose_partner_is_missing_is_not_mixed():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (4, 8, 8, 3), np.uint8))
    labels = jnp.arange(4)
    keys = augment.example_keys(jax.random.key(0), 0, 4)
    mixing = Augmentation(mixup_probability=0.5, cutmix_probability=0.5)

    def mixed(images, mask, augmentation):
        return augment.augment_batch(
            keys,
            images,
            labels,
            num_classes=4,
            augmentation=augmentation,
            mask=None if mask is None else jnp.array(mask),
        )

    plain_images, plain_targets = mixed(images, None, Augmentation())
    whole_images, whole_targets = mixed(images, None, mixing)
    masked = images.at[1].set(0)
    got_images, got_targets = mixed(masked, [True, False, True, True], mixing)
    np.testing.assert_array_equal(got_images[0], plain_images[0])
    np.testing.assert_array_equal(got_targets[0], plain_targets[0])
    np.testing.assert_array_equal(got_images[2:], whole_images[2:])
    np.testing.assert_array_equal(got_targets[2:], whole_targets[2:])
    assert (np.asarray(whole_images[0]) != np.asarray(plain_images[0])).any()
