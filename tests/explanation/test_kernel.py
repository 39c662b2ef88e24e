"""``wf_vit.explain`` in a real Jupyter kernel, with models of the peers."""

import json

import pytest

from tests.explanation.example import VIT

SETUP = """
import numpy as np, wf_vit
image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
options = {"num_probes": 2, "indicators": ("mean", "propagated")}
"""
TIMM = """
import timm
model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
"""
TRANSFORMERS = """
from transformers import Dinov2Config, Dinov2Model
config = Dinov2Config(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56
)
model = Dinov2Model._from_config(config, attn_implementation="eager").eval()
"""
TENSORS = """
import torch
pixels = torch.zeros(1, 3, 56, 56)
attentions = model(pixels, output_attentions=True).attentions
"""
CELLS = {
    "path": ("", "wf_vit.explain({path!r}, image, **options)"),
    "timm": (TIMM, "wf_vit.explain(model, image, target='class', **options)"),
    "transformers": (TRANSFORMERS, "wf_vit.explain(model, image, **options)"),
    "tensors": (
        TRANSFORMERS + TENSORS,
        "wf_vit.explain(attentions, image, num_prefix_tokens=1)",
    ),
    "page": ("", "wf_vit.explain({path!r}, image, **options).page()"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_the_first_cell_shows_the_figures_and_no_warning(name):
    nbclient = pytest.importorskip("nbclient", reason="needs the docs extra")
    nbformat = pytest.importorskip("nbformat", reason="needs the docs extra")
    for module in {"timm": ["timm"], "path": [], "page": []}.get(
        name, ["torch", "transformers"]
    ):
        pytest.importorskip(module, reason="needs the peers extra")
    before, call = CELLS[name]
    notebook = nbformat.v4.new_notebook()
    # What the peers say when they are imported is theirs.
    sources = SETUP + before, call.format(path=str(VIT))
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbclient.NotebookClient(notebook, timeout=300).execute()
    (shown,) = notebook.cells[1].outputs  # And nothing beside it, no warning.
    assert shown["output_type"] == "execute_result", json.dumps(shown)[:2000]
    if name == "page":
        assert shown["data"]["text/html"].startswith("<iframe srcdoc=")
    else:
        assert shown["data"]["image/png"].startswith("iVBORw0KGgo")
        assert "data:image/png;base64," in shown["data"]["text/html"]
    assert len(shown["data"]["text/plain"]) < 600
