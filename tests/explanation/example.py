"""The example of these tests: a small ViT, its config, and a folder's results."""

import numpy as np

from configs.explain import get_config
from tests.models.pretrained.checkpoints import FIXTURES

# Two layers, two heads, patches of 4 pixels, a CLS token.
VIT = FIXTURES / "timm_vit"
SIZE, GRID = (16, 24), (4, 6)
PATCHES, LAYERS, HEADS = 24, 2, 2

# The photographs that can be read, in the order of the results. Two of them would have
# one name without their suffixes.
NAMES = ["a.jpg", "a.png", "b", "more/a"]
DATA_ONLY = {"figures": False, "page": False}
RNG = np.random.default_rng(0)


def noise(height, width, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def make_config(weights=VIT, **changes):
    config = get_config()
    with config.ignore_type():
        changes = {"image_size": SIZE, "fit": "model", "num_probes": 4} | changes
        config.update(weights=str(weights), **changes)
    return config


def arrays_of(workdir, name):
    with np.load(workdir / "images" / name / "data.npz") as file:
        return dict(file)
