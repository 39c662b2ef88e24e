r"""Saves any checkpoint, such as a trained run, in another layout.

    python main.py --config=configs/export.py --config.weights=runs/vit \
        --config.layout=timm --workdir=exported

timm then opens it by ``timm.create_model("local-dir:exported", pretrained=True)``, and
transformers, in its layout, by ``from_pretrained("exported")``. A WinfT has only this
package's own layout, which ``wf_vit.models.pretrained.load`` opens.
"""

import ml_collections

from wf_vit import settings
from wf_vit.settings import Setting

KEYS = {
    "task": Setting("export", "what is done", choices=("export",)),
    "weights": Setting(
        "",
        "what wf_vit.models.pretrained.load opens: a run's folder, or any published "
        "file",
    ),
    "layout": Setting(
        "wf_vit",
        "for timm, for transformers (hf), or for this package",
        choices=("timm", "hf", "wf_vit"),
    ),
    "num_heads": Setting(
        None, "of the model, where nothing tells it", kind=int, low=1, high=2**16
    ),
    "which": Setting(
        "", "of a file with several state dicts, the one that is meant, such as student"
    ),
    "prefix": Setting(
        "",
        "of a state dict with several networks, what stands before the names of one",
    ),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every key can be overridden."""
    return settings.config_of(KEYS).lock()
