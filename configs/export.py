r"""Saves any checkpoint, such as a trained run, in another layout.

    python main.py --config=configs/export.py --config.weights=runs/vit \
        --config.layout=timm --workdir=exported

timm then opens it by ``timm.create_model("local-dir:exported", pretrained=True)``, and
transformers, in its layout, by ``from_pretrained("exported")``. A WinfT has only this
package's own layout, which ``wf_vit.models.pretrained.load`` opens.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every key can be overridden."""
    config = ml_collections.ConfigDict()
    config.task = "export"

    # What wf_vit.models.pretrained.load opens: a run's folder, or any published file.
    config.weights = ""
    # "timm", "hf" (transformers) or "wf_vit".
    config.layout = "wf_vit"
    # Where nothing tells the number of heads.
    config.num_heads = config_dict.placeholder(int)
    # Of a file with several state dicts, the entry that is meant, such as "student".
    config.which = ""
    # Of a state dict with several networks, what stands before the names of one.
    config.prefix = ""
    return config.lock()
