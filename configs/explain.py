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


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every key can be overridden."""
    config = ml_collections.ConfigDict()
    config.task = "explain"

    # What wf_vit.models.pretrained.load opens: .npz, .safetensors, .pth, a folder with
    # one of them, a run folder of this package, or hf://owner/name.
    config.weights = ""
    # An image, a folder, which is searched with its subfolders, or several of them
    # with commas between.
    config.images = ""
    # Size in pixels: "336" for a square, "224,336" for a height and a width; empty for
    # the checkpoint's own. Cost and memory grow with the fourth power, and figures are
    # readable up to about 20 x 20 patches.
    config.image_size = ()
    # How a photograph comes to that size. "whole": nothing is cropped; where no height
    # and width is given, the grid takes the photograph's shape, with about as many
    # patches. "crop": as much of its middle as has the model's shape. "model": as the
    # checkpoint's images are prepared for its evaluation, which may cut the rim away.
    config.fit = "whole"

    # The indicators to compute, names of wf_vit.measure.INDICATORS.
    # The last one, which should be the most faithful, is that of the figures, the
    # fields and the table; the page has all of them.
    config.indicators = ("mean", "knockout", "propagated")
    # "propagated": the output that is watched, all final "tokens", the "cls" token or
    # what the head reads ("pooled"), and the number of random probes. Two forward
    # passes a probe take most of the time; the error falls with the square root.
    # "class", the class that the model predicts, or "class:NAME_OR_INDEX": the signed
    # effect on its logit, which needs no probes, with a map of what speaks for it.
    config.target = "tokens"
    config.num_probes = 16
    # Numbers of the layers, from 0; empty for all.
    config.layers = ()
    # Whether each head is measured on its own too, in the same backward passes. A
    # window-free transformer's heads, which have learned fields, always are.
    config.heads = False
    # Share of its impact that a patch's responsive field holds. Large models listen to
    # everything a little, so that fields of 0.9 are most of the image.
    config.mass = 0.5
    # The patch in the figures, counted row by row from 0; -1: the most telling ones.
    config.patch = -1

    # Whether to draw the figures and to build the page. They can be had later from the
    # data, which takes about a byte * layers * tokens^2 for each indicator and image.
    config.figures = True
    config.page = True
    # Size of a page at most. Where it is too little, the page keeps fewer digits, then
    # fewer heads, then fewer layers, and says so.
    config.page_bytes = 25_000_000
    # Images at once. An accelerator is faster with more; memory is about 8 times
    # wf_vit.models.recording.bytes_per_image for each.
    config.batch_size = 1
    config.seed = 0  # of the probes
    return config.lock()
