r"""WinfT and ViT on CIFAR-10, from scratch, at a size for a CPU or one small GPU.

    # Once, a download of 162 MiB:
    python main.py --config=configs/cifar10.py --config.task=prepare
    python main.py --config=configs/cifar10.py        # the window-free transformer
    python main.py --config=configs/cifar10.py:vit    # ViT, the same recipe
    # Without the download, from records that lie in DIR:
    python main.py --config=configs/cifar10.py \
        --config.data.name=NAME --config.data.data_dir=DIR

results/cifar10 has the curves of both on 15,000 images, 16 epochs, on two CPU cores,
with the command behind them.
"""

import ml_collections

from wf_vit.train.config import default_config, set_duration


def get_config(model: str = "windowfree") -> ml_collections.ConfigDict:
    """Returns the config; ``model`` is "windowfree" or "vit"."""
    config = default_config(model, "mu/4")
    config.model.update(width=96, depth=6, mlp_dim=384, num_heads=3, dtype="float32")

    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.crop = "pad"
    config.data.augment.flip_probability = 0.5

    config.batch_size = 128
    config.eval_batch_size = 500
    set_duration(config, "total", epochs=16)
    set_duration(config, "warmup", percent=10)
    config.optimizer.learning_rate = 1e-3
    config.label_smoothing = 0.1

    set_duration(config, "log", steps=50)
    set_duration(config, "eval", epochs=2)
    set_duration(config, "checkpoint", epochs=2)
    return config.lock()
