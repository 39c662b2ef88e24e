"""A teacher, a student and what they look at, for the tests of guidance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wf_vit.models import registry
from wf_vit.models.vit import ViT
from wf_vit.train import guidance as guiding
from wf_vit.train.teacher import Teacher

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def guide(**options):
    defaults = {
        "weight": 2.0,
        "area_weight": 0.3,
        "duration": 10,
        "indicator": "mean",
        "num_probes": 2,
        "teacher": None,
        "match": "fields",
        "per_head": False,
    }
    return guiding.Guidance(**{**defaults, **options})


def vit(**options):
    sizes = {
        "num_classes": 3,
        "image_size": (12, 20),
        "patch_size": (4, 4),
        "width": 8,
        "depth": 3,
        "mlp_dim": 8,
        "num_heads": 2,
    }
    return ViT(**{**sizes, **options})


def random_rows(seed, *shape):
    return jax.nn.softmax(2 * jax.random.normal(jax.random.key(seed), shape))


def keys(count=2):
    return jax.random.split(jax.random.key(7), count)


def images_for(model, batch=2):
    images = np.random.default_rng(9).normal(size=(batch, *model.image_size, 3))
    return jnp.asarray(images, jnp.float32)


def taught_by(model, indicator, seed=1, **options):
    teacher = Teacher(model, mean=MEAN, std=STD)
    params = jax.tree.map(lambda p: 3 * p, registry.init_params(model, seed))
    return guide(indicator=indicator, teacher=teacher, **options), params


def target(guidance, params, images, student):
    return _target(guidance, params, images, keys(), student)


@functools.partial(jax.jit, static_argnames=("guidance", "student"))
def _target(guidance, params, images, keys, student):
    normal = {"mean": MEAN, "std": STD}
    return guiding.target(guidance, params, images, keys, student=student, **normal)
