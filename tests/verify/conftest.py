"""A small model in a run folder, and what verifies it on embedded digits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import verify as verify_config
from tests.runs import small_winft, write_run
from wf_vit.verify.bootstrap import intervals
from wf_vit.verify.subject import Case, Subject

BATCH_SIZE, NUM_PROBES = 6, 2
IMAGE_SIZE = 16


def noisy_params(model):
    """Parameters that are all noise, made on the host: nothing is compiled."""
    images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), shapes
    )


def write_digits_run(folder, num_classes):
    """Writes the folder of a WinfT run for digits; returns model and parameters."""
    model = small_winft(num_classes=num_classes, image_size=IMAGE_SIZE)
    params = noisy_params(model)
    write_run(folder, model, params)
    return model, params


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a run, with a head for the digits."""
    folder = tmp_path_factory.mktemp("digits_run")
    write_digits_run(folder, num_classes=10)
    return folder


@pytest.fixture(scope="session")
def headless_run(tmp_path_factory):
    """The folder of a run of a model that knows no classes."""
    folder = tmp_path_factory.mktemp("headless_run")
    write_digits_run(folder, num_classes=0)
    return folder


@pytest.fixture
def config(digits_run):
    """All protocols on a few digits, in two batches of which the last is not full."""
    config = verify_config.get_config()
    config.weights = str(digits_run)
    config.data.name = "digits"
    config.num_images = {
        "windows": 10,
        "removal": 7,
        "pixels": 3,
        "class_maps": 2,
        "faithfulness": 1,
        "groups": 2,
        "tendency": 4,
    }
    config.kept = (0.5, 0.25)
    config.removed = (0.5,)
    config.layers = (0, 1)
    config.num_cuts = 4
    config.num_sets = 1
    config.num_probes = NUM_PROBES
    config.batch_size = BATCH_SIZE
    config.bootstrap_samples = 20
    config.timing_turns = 0
    return config


@pytest.fixture(scope="session")
def case():
    """A batch of the model of ``digits_run``, compiled once for all tests."""
    model = small_winft(num_classes=10, image_size=IMAGE_SIZE)
    subject = Subject(
        model=model,
        params=noisy_params(model),
        labelled=True,
        num_probes=NUM_PROBES,
    )
    rng = np.random.default_rng(1)
    shape = (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return Case(subject, images, jnp.arange(BATCH_SIZE), jax.random.key(0))


@pytest.fixture(scope="session")
def estimate():
    """Means over images with the intervals of 200 resamples."""
    return partial(intervals, seed=0, samples=200)
