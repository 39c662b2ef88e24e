r"""Explains photographs: figures, data and a page to explore, for any checkpoint.

    python main.py --config=configs/explain.py \
        --config.weights=CHECKPOINT --config.images=photo.jpg

The results are in runs/explain (or --workdir): open its index.html. Its README.md says
what is in the files. A call that was interrupted goes on when it is repeated, and other
photographs may be added.

Three photographs take a ViT-S/14 at 224 pixels about a minute of CPU time, start and
compilation included; results/explain has figures and measurements.
"""

import ml_collections

from wf_vit import settings
from wf_vit.settings import LARGEST_COUNT, LARGEST_SEED, Setting

KEYS = {
    "task": Setting("explain", "what is done", choices=("explain",)),
    "weights": Setting(
        "",
        "what wf_vit.models.pretrained.load opens: .npz, .safetensors, .pth, a folder "
        "with one of them, a run folder of this package, or hf://owner/name",
    ),
    **settings.OPENING,
    "images": Setting(
        "",
        "an image, a folder, which is searched with its subfolders, or several of them "
        "with commas between",
    ),
    # Cost and memory grow with the fourth power, and figures are readable up to about
    # 20 x 20 patches.
    "image_size": Setting(
        (),
        "size in pixels: 336 for a square, 224,336 for a height and a width; none for "
        "the checkpoint's own",
        items=int,
        low=1,
        high=8192,
    ),
    # "whole": where no height and width is given, the grid takes the photograph's
    # shape, with about as many patches. "crop": as much of its middle as has the
    # model's shape. "model": the rim may be cut away.
    "fit": Setting(
        "whole",
        "how a photograph comes to that size: whole (nothing is cropped), crop (to the "
        "model's shape), model (as the checkpoint's images for its evaluation)",
        choices=("whole", "crop", "model"),
    ),
    # The last one, which should be the most faithful, is that of the figures, the
    # fields and the table; the page has all of them.
    "indicators": Setting(
        ("mean", "knockout", "propagated"),
        "what is computed, names of wf_vit.measure.INDICATORS with commas between; the "
        "last is that of the figures and the table",
        items=str,
    ),
    # Probes take most of the time, about 1.4 forward passes each; the error falls with
    # the square root. A class needs no probes; the effect on its logit is signed, with
    # a map of what speaks for it.
    "target": Setting(
        "tokens",
        "of propagated: the output that is watched, all final tokens, the cls token, "
        "what the head reads (pooled), class (the predicted one), or "
        "class:NAME_OR_INDEX",
    ),
    "num_probes": Setting(16, "random probes of propagated", low=2, high=10**4),
    "layers": Setting(
        (), "numbers of the layers, from 0; none for all", items=int, low=0, high=1000
    ),
    "heads": Setting(
        False,
        "whether each head is measured on its own too, in the same passes; a "
        "window-free transformer's always are",
    ),
    # Large models listen to everything a little: fields of 0.9 are most of the image.
    "mass": Setting(
        0.5, "share of its impact that a patch's field holds", above=0, below=1
    ),
    # Choosing takes about as long as 200 forward passes.
    "removal": Setting(
        False,
        "whether to find out which patches the model can do without, before the first "
        "layer of each quarter (wf_vit.selection.select_patches), with a figure; this "
        "takes many times as long as the rest",
    ),
    "patch": Setting(
        -1,
        "patch in the figures, counted row by row from 0; -1: the most telling ones",
        low=-1,
        high=LARGEST_COUNT,
    ),
    # The data take about a byte * layers * tokens^2 for each indicator and image.
    "figures": Setting(True, "whether to draw the figures; they can be had later"),
    "pdf": Setting(
        False,
        "whether figures are written as PDF, too, not only as PNG; ten of them take "
        "about five seconds more, and can be had later",
    ),
    "page": Setting(True, "whether to build the page, likewise"),
    "page_bytes": Setting(
        25_000_000,
        "size of a page at most: it keeps fewer digits, then heads, then layers, and "
        "says so",
        low=1,
        high=LARGEST_COUNT,
    ),
    # An accelerator is faster with more; memory is about 8 times
    # wf_vit.models.recording.bytes_per_image for each.
    "batch_size": Setting(1, "images at once", low=1, high=10**7),
    "seed": Setting(0, "of the probes", low=0, high=LARGEST_SEED),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every key can be overridden."""
    return settings.config_of(KEYS).lock()
