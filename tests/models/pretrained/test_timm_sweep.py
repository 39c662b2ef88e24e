"""Every vision transformer of timm: opened with equal logits, or refused by name."""

import json
import re

import jax
import numpy as np
import pytest

from wf_vit.errors import UsageError
from wf_vit.models import pretrained

MODULES = ("vision_transformer", "eva", "beit", "deit", "vision_transformer_relpos")

# What is refused: other blocks, other positions, other attention.
REFUSED = re.compile(
    r"_rpn_|_xp_|_18x2_|_(d|p|dp)wee_|_dlittle_|beit3_|eva02_enormous|eva02_\w+_clip_"
    r"|relpos|_rope_mixed_"
)


def architectures(timm):
    """Names of timm's plain vision transformers that are not too large to make."""
    entry_points = timm.models._registry._model_entrypoints
    # Sapiens2 has a setting for each of its layers, so two of them cannot be made.
    hybrids = re.compile(r"resnet|_r\d\d_|_mci_|hybrid|sapiens2")
    huge = re.compile(r"giga|giant|huge|so400m|_[1357]b_|intern|enormous|large")
    for name in timm.list_models():
        module = entry_points[name].__module__.rpartition(".")[2]
        if module in MODULES and not hybrids.search(name) and not huge.search(name):
            yield name


@pytest.mark.slow
def test_every_architecture_of_timm(tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    from timm.models._hub import save_for_hf

    from benchmarks.checkpoints import randomize

    seen = set()
    for name in architectures(timm):
        model = randomize(timm.create_model(name, depth=2, num_classes=7))
        size = tuple(model.patch_embed.img_size or (256, 256))
        images = torch.randn((1, 3, *size))
        folder = tmp_path / name
        save_for_hf(model, folder, model_args={"depth": 2}, safe_serialization=True)
        assert json.loads((folder / "config.json").read_text())["architecture"]
        for source in (model, folder):
            if REFUSED.search(name):
                with pytest.raises(UsageError):
                    pretrained.load(source)
                continue
            loaded = pretrained.load(source)
            height, width = loaded.model.image_size
            ours = images.permute(0, 2, 3, 1).numpy()[:, :height, :width]
            got, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, ours)
            with torch.no_grad():
                expected = model(images).numpy()
            error = np.abs(got - expected).max() / np.abs(expected).max()
            seen.add((name, bool(error < 1e-4)))
    # timm's models for its own tests have heads 32 wide; that ours are assumed is said.
    wrong = {name for name, equal in seen if not equal}
    assert {name for name in wrong if not name.startswith("test_vit")} == set()
    assert len(seen) > 100
