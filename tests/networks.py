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


def is_constant(path):
    """Whether a fresh parameter is a constant: a bias or a scale."""
    return path[-1].key.endswith(("bias", "scale"))


@functools.partial(jax.jit, static_argnames="model")
def fresh_constants(model):
    """The biases and scales of fresh parameters, and zeros for the random kernels.

    To compile random numbers takes long; here the compiler leaves them out.
    """
    params = registry.init_params(model, seed=0)
    return jax.tree.map_with_path(
        lambda path, x: x if is_constant(path) else jnp.zeros_like(x), params
    )


def random_params(model, noise=0.05):
    """Fresh parameters plus noise: a head and fields would start from zeros."""
    rng = np.random.default_rng(1)

    def add_noise(path, x):
        spread = noise if is_constant(path) else 0.2 + noise
        return x + jnp.asarray(rng.normal(0, spread, x.shape), x.dtype)

    return jax.tree.map_with_path(add_noise, fresh_constants(model))


def images_for(model, batch=2):
    images = np.random.default_rng(9).normal(size=(batch, *model.image_size, 3))
    return jnp.asarray(images, jnp.float32)


@functools.partial(
    jax.jit, static_argnames=("model", "method", "record", "start", "stop", "train")
)
def apply(model, params, *inputs, **options):
    """``model.apply`` as one program: to compile it operation by operation is slow."""
    return model.apply({"params": params}, *inputs, **options)
