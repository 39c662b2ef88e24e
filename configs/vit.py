r"""ViT-S/16 on ImageNet: the baseline of configs/windowfree.py, the same recipe.

    python main.py --config=configs/vit.py --config.task=prepare       # once
    python main.py --config=configs/vit.py
    python main.py --config=configs/vit.py:runlocal            # 10 steps anywhere

The source (arXiv 2205.01580) reports 76.5 % top-1 after 90 epochs, in 6 to 7 hours on
8 TPU-v3 cores; we have not run it.
"""

import ml_collections

from configs import windowfree


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """Returns the config; ``mode`` is "" or "runlocal"."""
    return windowfree.recipe("vit", mode)
