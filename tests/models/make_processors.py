"""Makes fixtures/processors.npz: what transformers' image processors compute.

    pip install -e '.[test,peers]'
    python -m tests.models.make_processors

Each case is a ``preprocessor_config.json``, whose keys are drawn at random from what
published ones hold, with the pixels that the library's processor of that type makes of
two images. Takes seconds.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "fixtures/processors.npz"
SIDE = 12
SHAPES = ((31, 23), (17, 40))
COUNT = 32


def pictures() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*s, 3)).astype(np.uint8) for s in SHAPES]


def configs(seed: int = 0) -> Iterator[dict]:
    """Yields configs that make images of SIDE x SIDE pixels, without an end."""
    generator = np.random.default_rng(seed)

    def pick(*choices):
        return choices[generator.integers(len(choices))]

    while True:
        kind = pick("ViT", "DeiT", "CLIP", "Siglip", "Bit")
        crops = pick(True, False)
        larger = pick(SIDE, 14, 15, 18)
        config = {
            "image_processor_type": f"{kind}ImageProcessor",
            "do_resize": True,
            "resample": pick(0, 1, 2, 3, 4, 5),
            "do_rescale": pick(True, True, False),
            "rescale_factor": pick(1 / 255, 1 / 127.5),
            "do_normalize": pick(True, True, False),
            "image_mean": pick([0.5, 0.5, 0.5], [0.48, 0.45, 0.4]),
            "image_std": pick([0.5, 0.5, 0.5], [0.26, 0.27, 0.25]),
            "do_center_crop": crops,
            "do_convert_rgb": pick(True, None),
        }
        if crops:
            square = {"height": larger, "width": larger}
            config["size"] = pick({"shortest_edge": larger}, square, larger)
            config["crop_size"] = pick({"height": SIDE, "width": SIDE}, SIDE)
        else:
            config["size"] = {"height": SIDE, "width": SIDE}
        yield config


def processed(config: dict, image: np.ndarray) -> np.ndarray:
    """Returns an image [height, width, 3] as transformers prepares it with Pillow."""
    import transformers

    kind = getattr(transformers, f"{config['image_processor_type']}Pil")
    processor = kind(**{k: v for k, v in config.items() if k != "image_processor_type"})
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    return pixels.transpose(1, 2, 0).astype(np.float32)


def main() -> None:
    arrays, kept = {}, []
    for config in configs():
        if len(kept) == COUNT:
            break
        for number, image in enumerate(pictures()):
            arrays[f"{len(kept)}/{number}"] = processed(config, image)
        kept.append(config)
    np.savez_compressed(FILE, configs=json.dumps(kept), **arrays)


if __name__ == "__main__":
    main()
