"""Configurations of real data, prepared once a session."""

import pytest

from wf_vit.data.config import default_config


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def digits(tfds_folder):
    """Digits at their own size, so that pixels tell examples apart."""
    config = default_config()
    config.data_dir = tfds_folder
    config.image_size = 8
    config.train = "train[:25%]"  # for speed
    return config


@pytest.fixture
def cifar10(shared):
    config = default_config()
    config.name = "cifar10_jpeg"
    config.data_dir = str(shared / "tfds")
    return config
