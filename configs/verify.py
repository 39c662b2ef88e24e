r"""Verifies an indicator on a data set, by up to seven protocols.

    python main.py --config=configs/verify.py --config.weights=CHECKPOINT \
        --config.data.name=cifar10 --config.num_images.windows=0

What the indicator chooses is compared with controls of equal size, by the protocols of
wf_vit.verify. The results are in runs/verify (or --workdir): verify.json, table.md and
figures/. A call that was interrupted goes on with the next batch when it is repeated.
results/verify has those of two CIFAR-10 models and of a DINOv2, with their cost.
"""

import ml_collections

from wf_vit import settings
from wf_vit.settings import ANY, LARGEST_COUNT, LARGEST_SEED, Setting


def _images(default: int) -> Setting:
    return Setting(default, "images, from the front; 0: all", low=0, high=LARGEST_COUNT)


KEYS = {
    "task": Setting("verify", "what is done", choices=("verify",)),
    "weights": Setting(
        "",
        "what wf_vit.models.pretrained.load opens: a run folder of this package, .npz, "
        ".safetensors, .pth, a folder with one of them, or hf://owner/name",
    ),
    **settings.OPENING,
    # Cost and memory grow with the fourth power.
    "image_size": Setting(
        None,
        "side in pixels, if not the checkpoint's own; for height and width assign it "
        "within config.ignore_type()",
        kind=tuple,
        items=int,
        length=2,
        one_or_many=True,
        low=1,
        high=8192,
    ),
    # Sizes and normalisation are the checkpoint's. Top-1 is measured if the
    # checkpoint's head has as many classes as the data set; photographs without
    # classes, in one folder of data_dir, do for the rest.
    "data": {
        "name": Setting("cifar10", "digits, folder, or a TFDS name"),
        "data_dir": Setting("", "where it lies; empty: TFDS's own folder"),
    },
    "split": Setting("test", "TFDS split specification, such as validation[:5000]"),
    "protocols": Setting(
        (),
        "some of windows, removal, pixels, class_maps, faithfulness, groups and "
        "tendency, with commas between; none for all",
        items=str,
    ),
    # Forward passes for each image of a DINOv2 ViT-S/14, beside those of the controls:
    # windows 119 for each share, removal 80 for each layer, pixels 500, class_maps 4
    # for each patch, faithfulness num_cuts for each layer, groups 10 * (5 * num_sets +
    # 5) and as many predictions; tendency only reads what is measured anyway.
    "num_images": {
        "windows": _images(0),
        "removal": _images(0),
        "pixels": _images(1000),
        "class_maps": _images(500),
        "faithfulness": _images(20),
        "groups": _images(20),
        "tendency": _images(100),
    },
    "kept": Setting(
        (0.5, 0.25, 0.1, 0.05),
        "of windows: shares of the interactions between patches that are kept",
        length=ANY,
        above=0,
        high=1,
    ),
    "removed": Setting(
        (0.25, 0.5, 0.75),
        "of removal: shares of the patches that are gathered out",
        length=ANY,
        above=0,
        below=1,
    ),
    "layers": Setting(
        (),
        "of removal: layers before which that is done; none for the first of each "
        "quarter",
        items=int,
        low=0,
        high=1000,
    ),
    "timing_turns": Setting(
        5,
        "of windows and removal: turns of the wall-clock; 0: not measured",
        low=0,
        high=1000,
    ),
    "num_cuts": Setting(
        80, "of faithfulness: real cuts for each layer and image", low=3, high=10**6
    ),
    "num_sets": Setting(
        2,
        "of groups: sets of each kind that is drawn, for each share and image",
        low=1,
        high=10**4,
    ),
    "target": Setting(
        "tokens",
        "of the propagated impact: the output that is watched, all final tokens, cls, "
        "or what the head reads (pooled)",
        choices=("tokens", "cls", "pooled"),
    ),
    "num_probes": Setting(
        8, "its random probes, about 1.4 forward passes each", low=2, high=10**4
    ),
    # Memory is about 8 times wf_vit.models.recording.bytes_per_image for each.
    "batch_size": Setting(100, "images at once", low=1, high=10**7),
    "seed": Setting(
        0, "of probes, random controls and resampling", low=0, high=LARGEST_SEED
    ),
    "bootstrap_samples": Setting(1000, "of the 95 % intervals", low=1, high=10**7),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every key can be overridden."""
    return settings.config_of(KEYS).lock()
