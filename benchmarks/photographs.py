"""What the benchmarks on photographs share: the images, the model, the report."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import skimage.data
from absl import flags

from wf_vit.models import pretrained

_WEIGHTS = flags.DEFINE_string(
    "weights", "../shared/weights/dinov2_s14.safetensors", "Any checkpoint with CLS."
)
_PHOTOGRAPHS = flags.DEFINE_integer("photographs", 5, "How many of the five.")
_OUTPUT = flags.DEFINE_string("output", None, "Files to write, without suffix.")

IMAGE_SIZE = 224
# All colour photographs that come with scikit-image's package.
PHOTOGRAPHS = {
    "astronaut": skimage.data.astronaut,
    "chelsea": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
}


def load() -> tuple[pretrained.Pretrained, dict[str, jax.Array]]:
    """Returns the model, and the normalised photographs ``[1, ...]`` by name."""
    loaded = pretrained.load(_WEIGHTS.value, image_size=IMAGE_SIZE)
    names = list(PHOTOGRAPHS)[: _PHOTOGRAPHS.value]
    return loaded, {n: loaded.preprocess([PHOTOGRAPHS[n]()]) for n in names}


def setting(benchmark: str, photographs: Sequence[str]) -> dict:
    """Returns what a reader must know to repeat the results."""
    return {
        "command": " ".join([f"python -m benchmarks.{benchmark}", *sys.argv[1:]]),
        "machine": {
            "cpus": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        },
        "weights": Path(_WEIGHTS.value).name,
        "image_size": IMAGE_SIZE,
        "photographs": list(photographs),
    }


def report(results: dict, markdown: Callable[[dict], str]) -> None:
    """Prints the results, and writes them if asked to."""
    print(markdown(results), flush=True)
    if _OUTPUT.value:
        output = Path(_OUTPUT.value)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        output.with_suffix(".md").write_text(markdown(results))
