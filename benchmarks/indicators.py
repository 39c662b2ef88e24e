"""What the indicators cost, against brute force, a forward pass, NumPy and PyTorch.

    python -m benchmarks.indicators --output results/indicators

Weights are random: no cost here depends on them. Everything that is compared is
run turn by turn in one process, and ratios are medians over the turns, so that
other work on the machine slows both sides alike. PyTorch is measured where it is
installed. Prints the results and writes OUTPUT.json. Takes six minutes on two cores.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from wf_vit import indicators, measure
from wf_vit.models import registry

FUNCTIONS = ("interaction_indicator", "knockout_impact", "knockout_effect")

_OUTPUT = flags.DEFINE_string("output", None, "File to write, without suffix.")
_TURNS = flags.DEFINE_integer("turns", 15, "Medians over these are reported.")
_PEAK_MEMORY_OF = flags.DEFINE_enum(
    "peak_memory_of",
    None,
    FUNCTIONS,
    "Only print the peak memory, in KiB, of this process computing one indicator.",
)

PROBES = (8, 16)
CUTS_AT_ONCE = 16
IMAGES = 4


class Size(NamedTuple):
    """Size of a vision transformer; tokens include CLS."""

    tokens: int
    width: int
    heads: int
    layers: int = 12


VIT_S14_224 = Size(tokens=257, width=384, heads=6)
VIT_B16_384 = Size(tokens=577, width=768, heads=12)


def init(size: Size, key: jax.Array) -> dict[str, jax.Array]:
    """Returns the weights of all layers, layers in front."""
    width, heads = size.width, size.heads
    shapes = {
        "qkv": (width, 3, heads, width // heads),
        "out": (heads, width // heads, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    return {
        name: jax.random.normal(jax.random.fold_in(key, i), (size.layers, *shape))
        * width**-0.5
        for i, (name, shape) in enumerate(shapes.items())
    }


def norm(x):
    """Layer norm without scale and shift."""
    return jax.nn.standardize(x, epsilon=1e-6)


def attend(layer, x, mask):
    """Returns output, weights and values of one attention layer; True masks a key."""
    q, k, v = jnp.moveaxis(jnp.einsum("bnd,dchk->bnchk", norm(x), layer["qkv"]), 2, 0)
    logits = jnp.einsum("bqhk,bnhk->bhqn", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, -jnp.inf, logits))
    heads = jnp.einsum("bhqn,bnhk->bqhk", weights, v)
    return jnp.einsum("bqhk,hkd->bqd", heads, layer["out"]), weights, v


@partial(jax.jit, static_argnames="record")
def forward(weights, x, record=False):
    """Returns the final tokens, and on request attention and values of all layers."""

    def block(x, layer):
        moved, attention, values = attend(layer, x, False)
        x = x + moved
        x = x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
        return x, (attention, values) if record else None

    return jax.lax.scan(block, x, weights)


@jax.jit
def brute_force(layer, x, queries, keys):
    """Returns how far masking one key each moves its query, by running the layer."""
    cuts = jnp.zeros((len(queries), 1, x.shape[1], x.shape[1]), bool)
    cuts = cuts.at[jnp.arange(len(queries)), 0, queries, keys].set(True)
    before = attend(layer, x, False)[0][0, queries]
    after = attend(layer, jnp.broadcast_to(x, (len(queries), *x.shape[1:])), cuts)[0]
    return jnp.linalg.norm(before - after[jnp.arange(len(queries)), queries], axis=-1)


def take_turns(
    functions: dict[str, Callable], turns: int, clock: Callable = time.perf_counter
) -> dict[str, np.ndarray]:
    """Returns the seconds that each function took at each turn."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            seconds[name].append(clock() - start)
    return {name: np.asarray(times) for name, times in seconds.items()}


def beside_forward(
    functions: dict[str, Callable], turns: int
) -> dict[str, dict[str, float]]:
    """Returns the time of each function, and its ratio to that of "forward"."""
    seconds = take_turns(functions, turns)
    cpu_seconds = take_turns(functions, turns, time.process_time)
    return {
        name: {
            "milliseconds": 1e3 * float(np.median(seconds[name])),
            "of_forward": float(np.median(seconds[name] / seconds["forward"])),
            "cpu_of_forward": float(
                np.median(cpu_seconds[name] / cpu_seconds["forward"])
            ),
        }
        for name in functions
    }


def compare_with_brute_force(turns: int) -> dict[str, float]:
    """All cuts of one ViT-S/14 layer, against running the layer once for each."""
    size = VIT_S14_224
    layer = {k: v[0] for k, v in init(size, jax.random.key(0)).items()}
    x = jax.random.normal(jax.random.key(1), (1, size.tokens, size.width))
    _, attention, values = attend(layer, x, False)
    queries, keys = np.random.default_rng(0).integers(
        size.tokens, size=(2, CUTS_AT_ONCE)
    )
    arguments = (attention[0], values[0], layer["out"])
    closed_form = partial(indicators.knockout_impact, *arguments, num_prefix_tokens=0)
    seconds = take_turns(
        {
            "closed form": closed_form,
            "brute force": lambda: brute_force(layer, x, queries, keys),
        },
        turns,
    )
    cuts = size.tokens**2
    extrapolated = seconds["brute force"] * cuts / CUTS_AT_ONCE
    expected = brute_force(layer, x, queries, keys)
    error = jnp.abs(closed_form()[queries, keys] - expected) / expected
    return {
        "cuts": cuts,
        "closed_form_seconds": float(np.median(seconds["closed form"])),
        "brute_force_seconds": float(np.median(extrapolated)),
        "times_faster": float(np.median(extrapolated / seconds["closed form"])),
        "median_relative_difference": float(jnp.median(error)),
    }


def compare_with_forward(turns: int) -> dict[str, dict[str, float]]:
    """All layers of a ViT-S/14 on a few images, against the forward pass."""
    size = VIT_S14_224
    weights = init(size, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (IMAGES, size.tokens, size.width))
    _, (attention, values) = forward(weights, x, record=True)
    cotangents = jax.random.normal(jax.random.key(2), (*values.shape[:3], size.width))
    cut = partial(
        indicators.knockout_impact,
        attention,
        values,
        weights["out"],
        num_prefix_tokens=1,
    )
    probe = partial(
        indicators.knockout_effect,
        attention,
        values,
        weights["out"],
        cotangents,
        num_prefix_tokens=1,
    )
    functions = {
        "forward": lambda: forward(weights, x),
        "mean": partial(
            indicators.interaction_indicator, attention, num_prefix_tokens=1
        ),
        "rollout": partial(
            indicators.attention_rollout, attention, num_prefix_tokens=1
        ),
        "knockout": cut,
        "knockout per head": partial(cut, per_head=True),
        "effect (one probe)": probe,
        "effect per head (one probe)": partial(probe, per_head=True),
    }
    return beside_forward(functions, turns)


def compare_propagated_with_forward(
    variant: str, image_size: int, turns: int
) -> dict[str, Any]:
    """Indicator and forward pass of a whole ViT, all layers of one image."""
    model = registry.create_model(
        registry.ModelConfig(name="vit", variant=variant),
        num_classes=0,
        image_size=image_size,
    ).clone(dtype=jnp.float32, cls_token=True)
    images = jax.random.normal(jax.random.key(0), (1, *model.image_size, 3))
    params = model.init(jax.random.key(1), images)["params"]

    def propagate(num_probes):
        knockout, _ = measure.propagate(
            model,
            params,
            images,
            target="tokens",
            key=jax.random.key(2),
            num_probes=num_probes,
        )
        return knockout.impact

    plain = jax.jit(lambda images: model.apply({"params": params}, images)[0])
    functions = {
        "forward": partial(plain, images),
        **{f"{count} probes": partial(propagate, count) for count in PROBES},
    }
    return {
        "interactions": model.depth * (model.grid[0] * model.grid[1]) ** 2,
        **beside_forward(functions, turns),
    }


def compare_with_peers(turns: int) -> dict[str, dict[str, float]]:
    """The fused attention-only indicators, on 12 layers and 8 images of a ViT-S/14."""
    size = VIT_S14_224
    shape = (size.layers, 8, size.heads, size.tokens, size.tokens)
    attention = jax.nn.softmax(jax.random.normal(jax.random.key(0), shape))
    array = np.asarray(attention)
    functions = {}
    for method in ("mean", "max", "std"):
        ours = partial(
            indicators.interaction_indicator, method=method, num_prefix_tokens=1
        )
        functions[f"{method}, ours"] = partial(jax.jit(ours), attention)
        functions[f"{method}, ours with input checks"] = partial(ours, attention)
        functions[f"{method}, numpy"] = partial(
            getattr(array[..., 1:, 1:], method), axis=-3
        )
    try:
        import torch
    except ModuleNotFoundError:
        print("PyTorch is not installed: compared with NumPy only.")
    else:
        tensor = torch.from_numpy(array.copy())[..., 1:, 1:]
        functions["mean, torch"] = lambda: tensor.mean(-3)
        functions["max, torch"] = lambda: tensor.amax(-3)
        functions["std, torch"] = lambda: tensor.std(-3, correction=0)
    seconds = take_turns(functions, turns)
    return {
        name: {
            "milliseconds": 1e3 * float(np.median(times)),
            "of_ours": float(np.median(times / seconds[name.split(",")[0] + ", ours"])),
        }
        for name, times in sorted(seconds.items())
    }


def peak_memory(function: str) -> float:
    """Returns the peak GiB of a process that computes one indicator, inputs included.

    All layers of a ViT-B/16 at 384 pixels, batch 8.
    """
    module = ["-m", "benchmarks.indicators", f"--peak_memory_of={function}"]
    result = subprocess.run(
        [sys.executable, *module], check=True, capture_output=True, text=True
    )
    return float(result.stdout) / 2**20


def run_at_full_size(function: str) -> None:
    """Computes one indicator and prints the peak KiB of this process."""
    size = VIT_B16_384
    layers, batch, heads = size.layers, 8, size.heads
    attention = jnp.full(
        (layers, batch, heads, size.tokens, size.tokens), 1 / size.tokens
    )
    values = jnp.ones((layers, batch, size.tokens, heads, size.width // heads))
    kernel = jnp.ones((layers, heads, size.width // heads, size.width))
    arrays = {
        "interaction_indicator": (),
        "knockout_impact": (values, kernel),
        "knockout_effect": (
            values,
            kernel,
            jnp.ones((layers, batch, size.tokens, size.width)),
        ),
    }[function]
    compute = getattr(indicators, function)
    jax.block_until_ready(compute(attention, *arrays, num_prefix_tokens=1))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main(argv: list[str]) -> None:
    """Prints the results and writes them."""
    del argv
    if _PEAK_MEMORY_OF.value:
        run_at_full_size(_PEAK_MEMORY_OF.value)
        return
    # First: a process counts what its parent held when it was started.
    peak_gib = {function: peak_memory(function) for function in FUNCTIONS}
    results = {
        "command": " ".join(["python -m benchmarks.indicators", *sys.argv[1:]]),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.machine(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        },
        "brute_force": compare_with_brute_force(_TURNS.value),
        "forward": compare_with_forward(_TURNS.value),
        "forward_images": IMAGES,
        "propagated": {
            f"ViT-{variant} at {size}": compare_propagated_with_forward(
                variant, size, turns
            )
            for variant, size, turns in (
                ("S/14", 224, _TURNS.value),
                ("B/16", 384, min(_TURNS.value, 3)),
            )
        },
        "peers": compare_with_peers(_TURNS.value),
        "peak_gib": peak_gib,
    }
    text = json.dumps(results, indent=2)
    print(text)
    if _OUTPUT.value:
        output = Path(_OUTPUT.value).with_suffix(".json")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


if __name__ == "__main__":
    app.run(main)
