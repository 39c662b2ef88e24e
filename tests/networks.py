"""A small network: its sizes, random parameters and images, and its forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wf_vit.models import registry

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
    fresh = registry.init_params(model, seed=0)
    rng = np.random.default_rng(1)
    # Made on the host: to compile random numbers takes long.
    return jax.tree.map(
        lambda x: x + jnp.asarray(noise * rng.normal(size=x.shape), x.dtype), fresh
    )


def images_for(model, batch=2):
    images = np.random.default_rng(9).normal(size=(batch, *model.image_size, 3))
    return jnp.asarray(images, jnp.float32)


@functools.partial(
    jax.jit, static_argnames=("model", "method", "record", "start", "stop", "train")
)
def apply(model, params, *inputs, **options):
    """``model.apply`` as one program: to compile it operation by operation is slow."""
    return model.apply({"params": params}, *inputs, **options)
