"""A small model in a run folder, and what verifies it on embedded digits."""

import pytest

from configs import verify as verify_config
from tests.networks import random_params
from tests.runs import small_winft, write_run


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a run: a WinfT for digits with random parameters."""
    folder = tmp_path_factory.mktemp("digits_run")
    model = small_winft(num_classes=10, image_size=16)
    write_run(folder, model, random_params(model, noise=0.2))
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
        "faithfulness": 1,
    }
    config.kept = (0.5, 0.25)
    config.removed = (0.5,)
    config.layers = (0, 1)
    config.num_cuts = 4
    config.num_probes = 2
    config.batch_size = 6
    config.bootstrap_samples = 20
    config.timing_turns = 0
    return config
