"""A small network's sizes, random parameters and images."""

import jax
import jax.numpy as jnp

SMALL = {
    "num_classes": 7,
    "image_size": (12, 16),
    "patch_size": (4, 4),
    "width": 32,
    "depth": 3,
    "mlp_dim": 64,
    "num_heads": 4,
}


def random_params(model, noise=0.05):
    """Fresh parameters plus noise: a head and fields would start from zeros."""
    images = jnp.zeros((1, *model.image_size, 3))
    params = model.init(jax.random.key(0), images)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(
        x + noise * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    )


def images_for(model, batch=2):
    return jax.random.normal(jax.random.key(9), (batch, *model.image_size, 3))
