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
    **settings.OPENING,
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every key can be overridden."""
    return settings.config_of(KEYS).lock()
