"""Photographs, what explain makes of them, and a trained model of our own."""

import pytest
from PIL import Image

from tests.explanation.example import DATA_ONLY, SIZE, make_config, noise
from tests.runs import small_winft, write_run
from wf_vit.errors import UsageError
from wf_vit.explanation.task import explain
from wf_vit.models import registry


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder with a subfolder, a file that is no image, and one that is broken."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "more").mkdir()
    for name in ("b.png", "a.png", "a.jpg", "more/a.png"):
        Image.fromarray(noise(30, 40)).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def run(photographs, tmp_path_factory):
    """A run over the folder in batches of two, data only."""
    workdir = tmp_path_factory.mktemp("run")
    config = make_config(images=str(photographs), batch_size=2, **DATA_ONLY)
    with pytest.raises(UsageError, match=r"(?s)1 of 5 images.*broken\.jpg: "):
        explain(config, workdir)
    return workdir


@pytest.fixture(scope="session")
def windowfree_run(tmp_path_factory):
    """The run folder of a window-free transformer whose training just starts."""
    folder = tmp_path_factory.mktemp("windowfree")
    model = small_winft(num_classes=5, image_size=SIZE)
    write_run(folder, model, registry.init_params(model, seed=0))
    return folder
