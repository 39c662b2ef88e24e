"""Augmentation on the device: from uint8 images to what a model trains on.

Pure JAX, to be called inside a jitted step. Everything is drawn per image from that
image's own key, and images are mixed in fixed pairs of neighbours of the batch. So as
long as every device holds whole pairs, the result does not depend on how many devices
and processes share the batch, and no image crosses devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, UInt8
from jaxtyping import Key as KeyArray

from wf_vit.data.config import Augmentation
from wf_vit.data.randaugment import randaugment
from wf_vit.errors import UsageError
from wf_vit.shapes import Images, Key, Labels, RawImages

# Random erasing, as DeiT (arXiv 2012.12877) takes it: noise in a box of this share of
# the image and this ratio of height to width.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)


def example_keys(
    key: Key, offset: int | Int[Array, ""], count: int
) -> KeyArray[Array, " count"]:
    """Returns one key for each of ``count`` consecutive images of the global batch.

    Args:
      key: of the step.
      offset: index of this device's first image in the global batch.
      count: how many images this device holds.
    """
    return keys_at(key, offset + jnp.arange(count))


def keys_at(key: Key, places: Int[Array, " B"]) -> KeyArray[Array, " B"]:
    """Returns the keys of images by their places in the global batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)


def normalize(
    images: Num[Array, "*batch 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "*batch 3"]:
    """Returns ``(images / 255 - mean) / std``, float32, for images of 0 to 255."""
    channels = (1,) * (images.ndim - 1) + (3,)
    mean, std = (jnp.asarray(x, jnp.float32).reshape(channels) for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def augment_batch(
    keys: KeyArray[Array, " B"],
    images: RawImages,
    labels: Labels,
    *,
    num_classes: int,
    augmentation: Augmentation,
    mask: Bool[Array, " B"] | None = None,
) -> tuple[Images, Float[Array, "B C"]]:
    """Flips, applies RandAugment, normalizes, erases and mixes.

    Args:
      keys: one per image (see ``example_keys``).
      images: 0 to 255.
      labels: class indices.
      num_classes: C.
      augmentation: what to do; static.
      mask: false where there is no image, only zeros: its partner is not mixed.

    Returns:
      Normalized float32 images, and for each the probability of every class.

    Raises:
      UsageError: a setting is out of range, or mixing has an odd batch.
    """
    _check(augmentation, len(labels))
    images = jax.vmap(lambda key, image: _augment_one(key, image, augmentation))(
        keys, images
    )
    targets = jax.nn.one_hot(labels, num_classes)
    if augmentation.mixup_probability + augmentation.cutmix_probability == 0:
        return images, targets
    weights = jax.vmap(lambda key: _own_weight(key, images.shape[1:3], augmentation))(
        keys
    )
    if mask is not None:
        partners = mask.reshape(-1, 2)[:, ::-1].reshape(-1)
        weights = jnp.where(partners[:, None, None], weights, 1.0)
    share = jnp.mean(weights, axis=(1, 2))[:, None]
    return _mix(images, weights[..., None]), _mix(targets, share)


def _check(augmentation: Augmentation, batch_size: int) -> None:
    mixing = augmentation.mixup_probability + augmentation.cutmix_probability
    if mixing > 1:
        raise UsageError(
            f"augment.mixup_probability + cutmix_probability is {mixing}, expected at "
            "most 1: an image is mixed up, cut and mixed, or neither."
        )
    if mixing and batch_size % 2:
        raise UsageError(
            f"{batch_size} images are mixed at a time, but mixup and cutmix mix pairs: "
            "choose a batch size that is even on every device, also when it is divided "
            "by accumulate_steps."
        )


def _augment_one(
    key: Key, image: UInt8[Array, "height width 3"], augmentation: Augmentation
) -> Float[Array, "height width 3"]:
    """Does everything that needs one image only."""
    flip_key, randaugment_key, erase_key = jax.random.split(key, 3)
    image = image.astype(jnp.float32)
    if augmentation.flip_probability:
        flip = jax.random.bernoulli(flip_key, augmentation.flip_probability)
        image = jnp.where(flip, image[:, ::-1], image)
    if augmentation.randaugment_layers:
        image = randaugment(
            randaugment_key,
            image,
            layers=augmentation.randaugment_layers,
            magnitude=augmentation.randaugment_magnitude,
            fill=255 * jnp.asarray(augmentation.mean),
        )
    image = normalize(image, augmentation.mean, augmentation.std)
    if augmentation.erase_probability:
        image = _erase(erase_key, image, augmentation.erase_probability)
    return image


def _box(
    shape: tuple[int, ...], centre: Float[Array, "2"], sides: Float[Array, "2"]
) -> Float[Array, "height width"]:
    """Returns 1 inside a box and 0 outside; ``(y, x)``, as shares of the image."""
    inside = []
    for extent, middle, side in zip(shape, centre, sides, strict=True):
        low = jnp.round((middle - side / 2) * extent)
        high = jnp.round((middle + side / 2) * extent)
        position = jnp.arange(extent)
        inside.append((position >= low) & (position < high))
    return (inside[0][:, None] & inside[1][None, :]).astype(jnp.float32)


def _erase(
    key: Key, image: Float[Array, "height width 3"], probability: float
) -> Float[Array, "height width 3"]:
    """Puts noise in a random box (Zhong et al., arXiv 1708.04896)."""
    use_key, area_key, aspect_key, centre_key, noise_key = jax.random.split(key, 5)
    low, high = jnp.log(jnp.asarray(_ERASED_ASPECT))
    area = jax.random.uniform(area_key, minval=_ERASED_AREA[0], maxval=_ERASED_AREA[1])
    aspect = jnp.exp(jax.random.uniform(aspect_key, minval=low, maxval=high))
    sides = jnp.minimum(jnp.sqrt(area * jnp.stack([aspect, 1 / aspect])), 1)
    # The whole box lies within the image.
    centre = sides / 2 + jax.random.uniform(centre_key, (2,)) * (1 - sides)
    box = _box(image.shape[:2], centre, sides)
    box *= jax.random.bernoulli(use_key, probability)
    noise = jax.random.normal(noise_key, image.shape)
    return jnp.where(box[..., None] > 0, noise, image)


def _own_weight(
    key: Key, shape: tuple[int, ...], augmentation: Augmentation
) -> Float[Array, "height width"]:
    """Returns the weight that an image keeps at every pixel when it is mixed.

    Mixup (Zhang et al., arXiv 1710.09412) gives all pixels one weight; CutMix (Yun et
    al., arXiv 1905.04899) gives 0 to a box and 1 to the rest.
    """
    # A child of one of `_augment_one`'s keys, none of whose own draws it repeats.
    kind_key, share_key, centre_key = jax.random.split(jax.random.fold_in(key, 1), 3)
    kind = jax.random.uniform(kind_key)
    is_mixup = kind < augmentation.mixup_probability
    is_mixed = kind < augmentation.mixup_probability + augmentation.cutmix_probability
    alpha = jnp.where(is_mixup, augmentation.mixup_alpha, augmentation.cutmix_alpha)
    share = jax.random.beta(share_key, alpha, alpha)
    sides = jnp.full(2, jnp.sqrt(1 - share))
    outside = 1 - _box(shape, jax.random.uniform(centre_key, (2,)), sides)
    return jnp.where(is_mixed, jnp.where(is_mixup, share, outside), 1.0)


def _mix(
    arrays: Float[Array, " B *rest"], weights: Float[Array, " B *weight"]
) -> Float[Array, " B *rest"]:
    """Mixes each of the arrays with its neighbour in a pair (0, 1), (2, 3), ..."""
    partners = arrays.reshape(-1, 2, *arrays.shape[1:])[:, ::-1].reshape(arrays.shape)
    return weights * arrays + (1 - weights) * partners
