r"""WinfT on scikit-learn's digits: the first run, on embedded data.

python main.py                                   # the window-free transformer
python main.py --config=configs/digits.py:vit    # ViT, the same recipe
"""

import ml_collections

from wf_vit.train.config import default_config, set_duration


def get_config(model: str = "windowfree") -> ml_collections.ConfigDict:
    """Returns the config; ``model`` is "windowfree" or "vit"."""
    config = default_config(model, "mu/2")
    config.model.update(width=64, depth=4, mlp_dim=256, num_heads=4, dtype="float32")

    config.data.name = "digits"
    config.data.image_size = 16
    config.data.crop = "pad"
    config.data.pad = 2
    config.data.pad_mode = "constant"

    config.batch_size = 128
    config.eval_batch_size = 120
    set_duration(config, "total", epochs=30)
    set_duration(config, "warmup", percent=10)
    config.optimizer.learning_rate = 2e-3
    config.label_smoothing = 0.1

    set_duration(config, "log", steps=25)
    set_duration(config, "eval", epochs=10)
    set_duration(config, "checkpoint", epochs=10)
    return config.lock()
