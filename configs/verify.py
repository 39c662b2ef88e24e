r"""Verifies an indicator on a data set: windows, removal, pixels, faithfulness.

    python main.py --config=configs/verify.py --config.weights=CHECKPOINT \
        --config.data.name=cifar10 --config.num_images.windows=0

What the indicator chooses is compared with controls of equal size, by the protocols of
wf_vit.verify. The results are in runs/verify (or --workdir): verify.json, table.md and
figures/. A call that was interrupted goes on with the next batch when it is repeated.
results/verify has those of two CIFAR-10 models and of a DINOv2, with their cost.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every key can be overridden."""
    config = ml_collections.ConfigDict()
    config.task = "verify"

    # What wf_vit.models.pretrained.load opens: a run folder of this package, .npz,
    # .safetensors, .pth, a folder with one of them, or hf://owner/name.
    config.weights = ""
    # Side in pixels; None: the checkpoint's own. Cost and memory grow with the fourth
    # power. For (height, width) assign it within `config.ignore_type()`.
    config.image_size = config_dict.placeholder(int)
    # What to read, as in wf_vit.data.config: "digits", "folder" or a TFDS name. Sizes
    # and normalisation are the checkpoint's. Top-1 is measured if the checkpoint's head
    # has as many classes as the data set; photographs without classes, in one folder
    # of data_dir, do for the rest.
    config.data = ml_collections.ConfigDict({"name": "cifar10", "data_dir": ""})
    config.split = "test"  # a TFDS split specification, such as "validation[:5000]"

    # Of wf_vit.verify.PROTOCOLS: some of "windows", "removal", "pixels", "class_maps",
    # "faithfulness" and "tendency"; () for all that there are.
    config.protocols = ()
    # The images of each, from the front of the split; 0: all. For each image, windows
    # and removal cost about 70 forward passes, pixels 500, class_maps 4 for each patch;
    # faithfulness runs num_cuts for every layer; tendency only reads what is measured
    # anyway.
    config.num_images = ml_collections.ConfigDict(
        {
            "windows": 0,
            "removal": 0,
            "pixels": 1000,
            "class_maps": 500,
            "faithfulness": 20,
            "tendency": 100,
        }
    )
    # Windows: the shares of the interactions between patches that are kept.
    config.kept = (0.5, 0.25, 0.1)
    # Removal: the shares of the patches that are gathered out, and before which layers;
    # () for the first layer of each quarter.
    config.removed = (0.25, 0.5, 0.75)
    config.layers = ()
    config.timing_turns = 5  # of the wall-clock at batch 1 and 64; 0: not measured
    # Faithfulness: real cuts for each layer and image.
    config.num_cuts = 80

    # The propagated impact: the output that is watched, all final "tokens", "cls" or
    # what the head reads ("pooled"), and its random probes, two forward passes each.
    config.target = "tokens"
    config.num_probes = 8
    # Images at once; memory is about 8 times wf_vit.models.recording.bytes_per_image
    # for each.
    config.batch_size = 100
    config.seed = 0  # of probes, random controls and resampling
    config.bootstrap_samples = 1000  # of the 95 % intervals
    return config.lock()
