r"""Fine-grained recognition: fine-tuning a published ViT, or our own checkpoint.

    python main.py --config=configs/finetune.py:DATASET --config.task=prepare    # once
    python main.py --config=configs/finetune.py:DATASET --config.init_from=CHECKPOINT

DATASET is caltech_birds2011 (the default), stanford_dogs, cars196 or
oxford_flowers102. CHECKPOINT is what wf_vit.models.pretrained.load opens: an .npz or
.safetensors file, a run folder of ours, or hf://owner/name; it brings its architecture.
With --config.model.name=windowfree a ViT becomes a window-free transformer: it starts
with fields that cover the grid, so that its output is unchanged, and then learns them.
Guided by what the ViT itself attends to, and from narrow fields, it takes a few hundred
steps until they follow objects: results/finetune has the command.
At 448 px, a ViT-B/16 pretrained on ImageNet-21k is reported at 90.3 % (birds), 93.7 %
(cars) and 91.7 % (dogs) top-1 in the literature; we have not run it.
"""

import ml_collections

from wf_vit.train.config import default_config, set_duration

# The evaluation split of each data set; all train on 'train'.
DATASETS = {
    "caltech_birds2011": "test",
    "cars196": "test",
    "oxford_flowers102": "test",
    "stanford_dogs": "test",
}


def get_config(dataset: str = "caltech_birds2011") -> ml_collections.ConfigDict:
    """Returns the config; ``dataset`` is a fine-grained TFDS data set."""
    if dataset not in DATASETS:
        raise ValueError(
            f"The config's argument is {dataset!r}, expected one of {list(DATASETS)}."
        )
    config = default_config("vit", "B/16")
    config.model.drop_path = 0.1
    config.model.fields.extents = (0.0,)  # a ViT at first
    # A teacher that attends as this model does at first has only its fields to teach.
    config.guidance.match = "fields"

    config.data.name = dataset
    config.data.eval = {"test": DATASETS[dataset]}
    config.data.image_size = 448
    config.data.crop = "resized"
    config.data.min_area = 0.3
    config.data.eval_resize = 0.875
    config.data.augment.flip_probability = 0.5

    config.batch_size = 64
    config.eval_batch_size = 64
    set_duration(config, "total", epochs=40)
    set_duration(config, "warmup", percent=5)
    config.optimizer.learning_rate = 1e-4
    config.optimizer.layer_decay = 0.75
    config.optimizer.weight_decay = 0.05
    config.label_smoothing = 0.1

    set_duration(config, "log", steps=20)
    set_duration(config, "eval", epochs=5)
    set_duration(config, "checkpoint", epochs=5)
    return config.lock()
