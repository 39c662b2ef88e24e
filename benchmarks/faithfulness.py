"""How well each indicator ranks what happens when an interaction is really cut.

    python -m benchmarks.faithfulness --output results/faithfulness

The protocol ``wf_vit.verify.faithfulness`` on a real DINOv2 ViT-S/14 and on photographs
that come with scikit-image. It draws interactions at random from all pairs of patches,
cuts each in all heads, and runs the rest of the network. The cuts run in float64: the
weakest ones in early layers move the CLS token by little more than the rounding of
float32. The indicators are computed in float32. In the last layer no cut between
patches can reach the CLS token, so the figures for CLS leave that layer out.

Prints the tables and writes OUTPUT.json and OUTPUT.md. Takes twelve minutes on two
cores.
"""

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
from absl import app, flags

from wf_vit import indicators, measure, verify
from wf_vit.models import pretrained
from wf_vit.models.parameters import head_gain
from wf_vit.shapes import Key

_WEIGHTS = flags.DEFINE_string(
    "weights", "../shared/weights/dinov2_s14.safetensors", "Any checkpoint with CLS."
)
_PHOTOGRAPHS = flags.DEFINE_integer("photographs", 5, "How many of the five.")
_LAYERS = flags.DEFINE_list("layers", ["0", "3", "6", "9", "11"], "Layers to cut in.")
_INTERACTIONS = flags.DEFINE_integer("interactions", 80, "Cuts per layer and photo.")
_PROBES = flags.DEFINE_integer("probes", 16, "Of the propagated indicator.")
_PROBE_SEEDS = flags.DEFINE_integer("probe_seeds", 3, "Repeats with other probes.")
_SEED = flags.DEFINE_integer("seed", 0, "Of interactions, probes and baselines.")
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
IN_LAYER = ("mean", "max", "std", "odds", "knockout")


def impacts(
    loaded: pretrained.Pretrained,
    image: jax.Array,
    layers: tuple[int, ...],
    key: Key,
) -> dict[str, np.ndarray]:
    """Returns every indicator of one image, ``[L, P, P]``, repeats in front."""
    model, params = loaded.model, loaded.params
    chosen = np.array(layers)
    recording = measure.record(model, params, image, layers=layers)
    options = {"layers": layers, "recording": recording}

    def of(indicator: str, key: Key | None = None) -> jax.Array:
        found = measure.impact(model, params, image, indicator, key=key, **options)
        return found.impact[:, 0]

    found = {indicator: of(indicator) for indicator in IN_LAYER}
    whole = measure.record(model, params, image)
    stretch = indicators.expected_stretch(
        whole.attention, head_gain(model, params), whole.scale
    )[chosen, 0, model.num_prefix_tokens :, None]
    found["knockout, stretched"] = stretch * found["knockout"]
    keys = jax.random.split(key, _PROBE_SEEDS.value)
    for target, shrink in itertools.product(("tokens", "cls"), (True, False)):
        repeats = [
            measure.propagate(
                model,
                params,
                image,
                target=target,
                key=key,
                num_probes=_PROBES.value,
                shrink=shrink,
            )[0].impact[chosen, 0]
            for key in keys
        ]
        name = f"propagated {target}" + ("" if shrink else ", not shrunk")
        found[name] = jnp.stack(repeats)
    found["distance"] = of("distance")
    found["random"] = jnp.stack([of("random", key) for key in keys])
    return {name: np.asarray(impact) for name, impact in found.items()}


def correlations(
    loaded: pretrained.Pretrained,
    images: Sequence[jax.Array],
    layers: tuple[int, ...],
) -> dict[str, dict[str, dict]]:
    """Returns the summary of the correlations by target and indicator."""
    key = jax.random.key(_SEED.value)
    results = []
    for place, image in enumerate(images):
        cuts, probes = jax.random.split(jax.random.fold_in(key, place))
        results.append(
            verify.faithfulness(
                verify.cut(loaded.params, image, layers=layers, model=loaded.model),
                impacts(loaded, image, layers, probes),
                layers,
                key=cuts,
                num_prefix_tokens=loaded.model.num_prefix_tokens,
                num_interactions=_INTERACTIONS.value,
            ).correlation
        )
        print(f"{place + 1} of {len(images)} photographs", flush=True)
    return {
        target: {
            name: summarize(np.stack([r[target][name] for r in results], -2), layers)
            for name in results[0][target]
        }
        for target in verify.TARGETS
    }


def summarize(correlation: np.ndarray, layers: tuple[int, ...]) -> dict:
    """Means over the layers where ``[seeds..., photographs, layers]`` is defined."""
    correlation = correlation.reshape(-1, *correlation.shape[-2:])
    defined = np.isfinite(correlation).all((0, 1))
    correlation, layers = correlation[..., defined], np.array(layers)[defined]
    by_photograph = correlation.mean((0, -1))
    return {
        "mean": float(by_photograph.mean()),
        "standard_error_over_photographs": standard_error(by_photograph),
        "range_over_seeds": np.ptp(correlation.mean((1, 2))).item(),
        "by_photograph": by_photograph.tolist(),
        "by_layer": dict(
            zip(layers.tolist(), correlation.mean((0, 1)).tolist(), strict=True)
        ),
    }


def standard_error(samples: Sequence[float]) -> float | None:
    """Returns the standard error of a mean; None for a single sample."""
    if len(samples) < 2:
        return None
    return float(np.std(samples, ddof=1)) / len(samples) ** 0.5


def tables(results: dict) -> str:
    """Returns the results as Markdown, one table for each target."""
    names = ", ".join(results["photographs"])
    parts = [
        f"Spearman's rank correlation with real cuts (`{results['command']}`): mean "
        f"over layers and photographs ± standard error over photographs ({names}), "
        f"{results['interactions']} cuts for each layer and photograph; then the mean "
        "over photographs by layer.\n"
    ]
    for target, summaries in results["correlation"].items():
        layers = results["layers"]
        rows = [[f"effect on {target}", "mean", *(f"layer {n}" for n in layers)]]
        rows.append(["---"] * len(rows[0]))
        for name, summary in summaries.items():
            mean = f"{summary['mean']:.3f}"
            error = summary["standard_error_over_photographs"]
            mean += "" if error is None else f" ± {error:.3f}"
            by_layer = summary["by_layer"]
            values = (f"{by_layer[n]:.3f}" if n in by_layer else "" for n in layers)
            rows.append([name, mean, *values])
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(parts)


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    del argv
    layers = tuple(sorted(int(layer) for layer in _LAYERS.value))
    loaded = pretrained.load(_WEIGHTS.value, image_size=IMAGE_SIZE)
    names = list(PHOTOGRAPHS)[: _PHOTOGRAPHS.value]
    images = [loaded.preprocess([PHOTOGRAPHS[name]()]) for name in names]
    results = {
        "command": " ".join(["python -m benchmarks.faithfulness", *sys.argv[1:]]),
        "machine": {
            "cpus": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        },
        "weights": Path(_WEIGHTS.value).name,
        "image_size": IMAGE_SIZE,
        "photographs": names,
        "layers": layers,
        "interactions": _INTERACTIONS.value,
        "seed": _SEED.value,
        "probes": _PROBES.value,
        "probe_seeds": _PROBE_SEEDS.value,
        "correlation": correlations(loaded, images, layers),
    }
    print(tables(results), flush=True)
    if _OUTPUT.value:
        output = Path(_OUTPUT.value)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        output.with_suffix(".md").write_text(tables(results))


if __name__ == "__main__":
    app.run(main)
