r"""What models cost: a training step, attention at high resolution, removed patches.

    python -m benchmarks.speed --output=results/speed                 # everything
    python -m benchmarks.speed --output=results/speed --only=attention \
        --fields=RUN                            # with the fields of a trained WinfT

    python -m benchmarks.speed --output=results/speed_gpu --only=steps \
        --dtype=bfloat16 --images=256 --peak_tflops=989        # on one H100

Weights are random: no time depends on them, but for hard fields. What is compared runs
turn by turn in one process. Ratios are medians over the turns: on a CPU of the CPU time
of all threads, which other work on the machine disturbs least, elsewhere of the time on
the wall. Peers that are not installed are left out. Each part writes OUTPUT/PART.json
and OUTPUT/PART.md.

  steps      forward passes and gradients of ViT and WinfT, beside a plain Linen ViT,
             the same under ``nn.scan``, and timm's; and the floor: their FLOPs at the
             speed of one large matrix product, or at --peak_tflops, which gives the
             share of the peak (MFU).
  attention  one layer with gradients, 576 to 4,096 patches: time, and the memory of
             the compiled program; 16,384 patches by shapes alone.
  training   a step of a WinfT-Ti on one image of 1024 x 1024 pixels.
  removal    forward passes of a ViT-S/14 without some of its patches.
"""

import contextlib
import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import linen as nn
from sklearn.datasets import load_sample_image

from wf_vit import measure
from wf_vit.errors import UsageError
from wf_vit.interventions import gather_patches
from wf_vit.models import attention, learned_fields, pretrained, registry
from wf_vit.models.windowfree import FieldConfig, PredictedFields
from wf_vit.verify.report import markdown


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured how, as the flags say it.

    Attributes:
      turns: medians over these are reported.
      dtype: of the steps.
      images: in a batch of the steps; 0 for a few.
      peak_tflops: of the device; 0 for the speed of a large product.
      fields: run folder of a trained WinfT, or None.
    """

    turns: int = 5
    dtype: str = "float32"
    images: int = 0
    peak_tflops: float = 0.0
    fields: str | None = None


SEED = 0
# Of hard fields: membership below which keys are dropped, and the share that is left.
THRESHOLD, AREA = 0.05, 0.1

Seconds = dict[str, dict[str, np.ndarray]]
# What ratios are of: where the device is another, the CPU only waits.
CLOCK = "cpu" if jax.default_backend() == "cpu" else "wall"


def take_turns(functions: Mapping[str, Callable[[], Any]], turns: int) -> Seconds:
    """Returns the CPU and the wall seconds of each function at each turn."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: {"cpu": [], "wall": []} for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(function())
            seconds[name]["cpu"].append(time.process_time() - cpu)
            seconds[name]["wall"].append(time.perf_counter() - wall)
    return {
        name: {clock: np.asarray(values) for clock, values in times.items()}
        for name, times in seconds.items()
    }


def summarize(seconds: Seconds, beside: str) -> dict[str, dict[str, float]]:
    """Returns medians, and ratios to one of the functions with their quartiles."""
    rows, clock = {}, CLOCK
    for name, times in seconds.items():
        ratio = times[clock] / seconds[beside][clock]
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        rows[name] = {
            "cpu_ms": 1e3 * float(np.median(times["cpu"])),
            "wall_ms": 1e3 * float(np.median(times["wall"])),
            "ratio": float(middle),
            "ratio_quartiles": [float(low), float(high)],
        }
    return rows


class LinenViT(nn.Module):
    """The plain way to write a ViT in Linen; the peer of ours, not a part of it.

    Attributes:
      options: of a ViT of ours, whose size it has.
      scan: whether the layers are one, under ``nn.scan``.
    """

    options: Any
    scan: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits."""
        our = self.options
        x = nn.Conv(
            our.width,
            our.patch_size,
            our.patch_size,
            padding="VALID",
            dtype=our.dtype,
        )(images)
        x = x.reshape(len(x), -1, our.width)
        shape = (1, *x.shape[1:])
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = x + positions.astype(x.dtype)
        if self.scan:
            split = {"params": True}
            stack = nn.scan(_Layer, {"params": 0}, split_rngs=split, length=our.depth)
            x, _ = stack(our.num_heads, our.mlp_dim, our.dtype)(x, None)
        else:
            for _ in range(our.depth):
                x, _ = _Layer(our.num_heads, our.mlp_dim, our.dtype)(x, None)
        x = nn.LayerNorm(dtype=our.dtype)(x).mean(1)
        return nn.Dense(our.num_classes)(x.astype(jnp.float32))


class _Layer(nn.Module):
    num_heads: int
    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x, _):
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        y = norm()(x)
        attention = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype)
        x = x + attention(y, y)
        return x + dense(x.shape[-1])(nn.gelu(dense(self.mlp_dim)(norm()(x)))), None


def create(name: str, variant: str, image_size: int, **changes: Any):
    """Returns a model for 1000 classes, which computes in float32 unless told."""
    options = {"dtype": "float32", **changes}
    config = registry.ModelConfig(name=name, variant=variant, **options)
    return registry.create_model(config, num_classes=1000, image_size=image_size)


def with_gradient(logits: Callable) -> Callable:
    """Returns loss and gradients of a classifier's parameters."""

    def loss(params, images):
        labels = jnp.arange(len(images)) % 1000
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, images), labels
        )
        return losses.mean()

    return jax.value_and_grad(loss)


def compiled(function: Callable, *inputs: Any) -> tuple[Callable, Any]:
    """Returns a function of nothing, and the program that it runs."""
    program = jax.jit(function).lower(*inputs).compile()
    return functools.partial(program, *inputs), program


# Variant, pixels, images, and what else differs.
STEPS = {
    "Ti/16 at 224": ("Ti/16", 224, 8, {}),
    "S/16 at 224": ("S/16", 224, 8, {}),
    **({} if CLOCK == "cpu" else {"B/16 at 224": ("B/16", 224, 8, {})}),
    "S/28 at 224, 64 patches": ("S/28", 224, 8, {}),
    "of configs/cifar10.py": (
        "mu/4",
        32,
        64,
        {"width": 96, "depth": 4, "mlp_dim": 384, "num_heads": 3},
    ),
    "of configs/digits.py": (
        "mu/2",
        16,
        128,
        {"width": 64, "depth": 4, "mlp_dim": 256, "num_heads": 4},
    ),
}
TIMM = {
    "Ti/16 at 224": "vit_tiny_patch16_224",
    "S/16 at 224": "vit_small_patch16_224",
}


def matrix_flops_per_second(options: Options) -> float:
    """Returns the speed of one large matrix product, or the peak that was named."""
    if options.peak_tflops:
        return options.peak_tflops * 1e12
    x = jnp.ones((2048, 2048), registry.DTYPES[options.dtype])
    product = functools.partial(jax.jit(jnp.dot), x, x)
    seconds = take_turns({"product": product}, options.turns)
    return 2 * 2048**3 / float(np.median(seconds["product"][CLOCK]))


def torch_step(name: str, images: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Returns timm's forward pass and step, or nothing where it is not installed."""
    try:
        import timm
        import torch
    except ModuleNotFoundError:
        return {}
    model = timm.create_model(name)
    batch = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    labels = torch.arange(len(batch)) % 1000

    def step():
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), labels).backward()
        return jnp.zeros(())

    def forward():
        with torch.inference_mode():
            model(batch)
        return jnp.zeros(())

    return {"forward, timm": forward, "step, timm": step}


def steps(options: Options) -> tuple[dict, str]:
    """Forward passes and gradients of whole models."""
    speed = matrix_flops_per_second(options)
    results, lines = {"flops_per_second_of_floor": speed, "sizes": {}}, []
    for label, (variant, pixels, images, changes) in STEPS.items():
        images = options.images or images
        changes = {"dtype": options.dtype, **changes}
        shape = (images, pixels, pixels, 3)
        batch = jax.random.normal(jax.random.key(SEED), shape)
        ours = create("vit", variant, pixels, **changes)
        models = {
            "ours": ours,
            "WinfT": create("windowfree", variant, pixels, **changes),
            "Linen": LinenViT(ours),
            "Linen, scan": LinenViT(ours, scan=True),
        }
        functions, flops = {}, {}
        for name, model in models.items():
            params = jax.jit(model.init)(jax.random.key(SEED), batch)["params"]

            def logits(params, batch, model=model):
                out = model.apply({"params": params}, batch)
                return out[0] if isinstance(out, tuple) else out

            for kind, of in (("forward", logits), ("step", with_gradient(logits))):
                function, program = compiled(of, params, batch)
                functions[f"{kind}, {name}"] = function
                if "scan" not in name:  # Whose loop is counted once.
                    flops[f"{kind}, {name}"] = program.cost_analysis()["flops"]
        if label in TIMM and CLOCK == "cpu":
            functions |= torch_step(TIMM[label], np.asarray(batch))
        seconds = take_turns(functions, options.turns)
        rows = {}
        for kind in ("forward", "step"):
            own = {n: s for n, s in seconds.items() if n.startswith(kind)}
            rows |= summarize(own, f"{kind}, ours")
        for name, row in rows.items():
            floor = ""
            if name in flops:
                row["floor_ms"] = 1e3 * flops[name] / speed
                floor = f"{row[f'{CLOCK}_ms'] / row['floor_ms']:.2f}"
            low, high = row["ratio_quartiles"]
            times = (f"{row['cpu_ms']:,.0f}", f"{row['wall_ms']:,.0f}")
            ratio = (f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}")
            lines.append([f"{label}, {images} images", name, *times, *ratio, floor])
        results["sizes"][label] = rows
    header = ["model", "what", "CPU ms", "wall ms", "of ours", "quartiles", "of floor"]
    return results, markdown(header, lines)


class GivenFields(nn.Module):
    """Fields that are given.

    Attributes:
      num_heads: H.
      grid: ``(GH, GW)``.
      gaussians: as in ``LearnedFields``, of all images.
      threshold: of hard fields.
    """

    num_heads: int
    grid: tuple[int, int]
    gaussians: Any
    threshold: float = 0.0

    def __call__(self, x: jax.Array, patches: None = None) -> Any:
        """Returns the fields, whatever the tokens."""
        gaussians = jnp.broadcast_to(
            self.gaussians, (len(x), *self.gaussians.shape[-3:])
        )
        return learned_fields.make_fields(
            gaussians, grid=self.grid, threshold=self.threshold
        )


def trained_gaussians(run: str, side: int, num_heads: int) -> np.ndarray:
    """Returns the fields of a trained WinfT's last layer, for a larger grid.

    They are those of scikit-learn's photograph of China. Centres and widths grow with
    the grid; each field is that of the block of patches that a patch of the small grid
    becomes.
    """
    trained = pretrained.load(run)
    model = trained.model
    images = trained.preprocess([load_sample_image("china.jpg")])
    recording = measure.record(model, trained.params, images, layers=[model.depth - 1])
    gaussians = recording.gaussians
    if gaussians is None:
        raise UsageError(f"--fields is {run}, which has no fields: name a WinfT's run.")
    rows, columns = model.grid
    if side % rows or side % columns:
        raise UsageError(
            f"--fields has a grid of {rows} x {columns}, expected sides that divide "
            f"{side}."
        )
    square = np.asarray(gaussians[0, 0]).reshape(-1, rows, columns, 4)
    square = square.repeat(side // rows, 1).repeat(side // columns, 2)
    square = np.resize(square, (num_heads, side, side, 4)) * (side / rows)
    return square.reshape(num_heads, side * side, 4)


class _LinenAttention(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x):
        return (nn.MultiHeadDotProductAttention(self.num_heads)(x, x),)


def attention_layers(side: int, run: str | None) -> dict[str, Callable[[], nn.Module]]:
    """Returns the makers of one attention layer of S/16, by what they are called."""
    heads, grid = 6, (side, side)
    # What is above the threshold is a disc, and ``AREA`` of the grid.
    radius = (AREA * side**2 / np.pi) ** 0.5
    width = radius / (-2 * np.log(THRESHOLD)) ** 0.5
    extents = (float(width * (2 * np.log(2)) ** 0.5),)

    def predicted(threshold: float) -> functools.partial:
        config = FieldConfig(extents=extents, growth=0.0, threshold=threshold)
        return functools.partial(PredictedFields, grid=grid, config=config, layer=0)

    def layer(field: Any = None) -> nn.Module:
        return attention.SelfAttention(num_heads=heads, field=field, grid=grid)

    layers = {
        "Linen": functools.partial(_LinenAttention, heads),
        "ViT, whole logits": functools.partial(layer),
        "WinfT soft, whole logits": functools.partial(layer, predicted(0.0)),
        "ViT": functools.partial(layer),
        "WinfT soft": functools.partial(layer, predicted(0.0)),
        "WinfT hard, 10 % fields": functools.partial(layer, predicted(THRESHOLD)),
    }
    if run:
        gaussians = trained_gaussians(run, side, heads)
        given = functools.partial(
            GivenFields, grid=grid, gaussians=gaussians, threshold=THRESHOLD
        )
        layers["WinfT hard, trained fields"] = functools.partial(layer, given)
    return layers


@contextlib.contextmanager
def blocked_from(tokens: int) -> Iterator[None]:
    """Attention is in blocks from so many tokens on, however small its logits are."""
    limits = attention.BLOCKED_FROM, attention.WHOLE_LOGITS
    attention.BLOCKED_FROM = learned_fields.BLOCKED_FROM = tokens
    attention.WHOLE_LOGITS = 0
    try:
        yield
    finally:
        attention.BLOCKED_FROM, attention.WHOLE_LOGITS = limits
        learned_fields.BLOCKED_FROM = limits[0]


# Sides of the grid, and the largest that is timed.
SIDES, TIMED = (24, 32, 64, 128), 64


def attention_at_high_resolution(options: Options) -> tuple[dict, str]:
    """One layer with gradients: time and memory."""
    results, lines = {}, []
    for side in SIDES:
        key, tokens = jax.random.key(SEED), side**2
        x = jax.random.normal(key, (1, tokens, 384))
        functions, memory = {}, {}
        for name, make in attention_layers(side, options.fields).items():
            whole = "whole" in name
            if (whole or name == "Linen") and side > TIMED:
                continue
            layer = make()
            params = jax.jit(layer.init)(key, x)["params"]

            def pulled(params, x, cotangent, layer=layer):
                def output(params, x):
                    return layer.apply({"params": params}, x)[0]

                output, pull_back = jax.vjp(output, params, x)
                return output, pull_back(cotangent)

            with blocked_from(tokens + 1 if whole else 1):
                function, program = compiled(pulled, params, x, x[:, ::-1])
            functions[name] = function
            memory[name] = program.memory_analysis().temp_size_in_bytes / 1e6
        if side <= TIMED:
            rows = summarize(take_turns(functions, options.turns), "Linen")
        else:
            rows = {name: {} for name in functions}
        for name, row in rows.items():
            row["temporary_mb"] = memory[name]
            times = ["", "", ""]
            if "ratio" in row:
                times = [f"{row[f'{clock}_ms']:,.0f}" for clock in ("cpu", "wall")]
                times.append(f"{row['ratio']:.3f}")
            lines.append([f"{tokens:,}", name, *times, f"{memory[name]:,.0f}"])
        results[f"{tokens} patches"] = rows
    header = ["patches", "layer", "CPU ms", "wall ms", "of Linen", "temporary MB"]
    return results, markdown(header, lines)


def training_at_high_resolution(options: Options) -> tuple[dict, str]:
    """A whole step on one large image."""
    rows, lines = {}, []
    batch = jax.random.normal(jax.random.key(SEED), (1, 1024, 1024, 3))
    for label, threshold in (("soft", 0.0), ("hard", THRESHOLD)):
        model = create(
            "windowfree", "Ti/16", 1024, fields=FieldConfig(threshold=threshold)
        )
        params = registry.init_params(model, SEED)

        def logits(params, batch, model=model):
            return model.apply({"params": params}, batch)[0]

        function, program = compiled(with_gradient(logits), params, batch)
        seconds = take_turns({label: function}, options.turns)
        loss, _ = function()
        row = summarize(seconds, label)[label] | {
            "temporary_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
            "loss": float(loss),
        }
        rows[label] = row
        cells = (row["cpu_ms"] / 1e3, row["wall_ms"] / 1e3, row["temporary_mb"])
        lines.append([f"WinfT-Ti/16, {label}", *(f"{cell:,.1f}" for cell in cells)])
    header = ["step on 1 image of 1024 x 1024", "CPU s", "wall s", "temporary MB"]
    return rows, markdown(header, lines)


# Pixels and images; the largest takes minutes, so once is enough.
REMOVAL = {(224, 1): 9, (224, 64): 3, (518, 1): 5, (518, 64): 1}
REMOVED_BEFORE, KEPT = (0, 4), (0.75, 0.5, 0.25)


def removal(options: Options) -> tuple[dict, str]:
    """Forward passes without some patches, which are gathered out."""
    results, lines = {}, []
    for (pixels, images), most in REMOVAL.items():
        model = create("vit", "S/14", pixels).clone(cls_token=True)
        params = registry.init_params(model, SEED)
        shape = (images, pixels, pixels, 3)
        batch = jax.random.normal(jax.random.key(SEED), shape)
        count = model.grid[0] * model.grid[1]

        def shortened(params, batch, layer, kept, model=model, count=count):
            variables = {"params": params}
            run = functools.partial(model.apply, variables)
            tokens = run(batch, method="embed")
            tokens, _ = run(tokens, stop=layer, method="encode")
            order = np.random.default_rng(SEED).permutation(count)[:kept]
            patches = jnp.broadcast_to(jnp.sort(order), (len(batch), kept))
            tokens = gather_patches(
                tokens, patches, num_prefix_tokens=model.num_prefix_tokens
            )
            tokens, _ = run(tokens, start=layer, patches=patches, method="encode")
            return run(tokens, method="readout")[0]

        def whole(params, batch, model=model):
            return model.apply({"params": params}, batch)[0]

        functions = {"all patches": compiled(whole, params, batch)[0]}
        for layer in REMOVED_BEFORE:
            for share in KEPT:
                run = functools.partial(
                    shortened, layer=layer, kept=round(share * count)
                )
                name = f"{share:.0%} from layer {layer} on"
                functions[name] = compiled(run, params, batch)[0]
        rows = summarize(take_turns(functions, min(options.turns, most)), "all patches")
        for name, row in rows.items():
            per_image = row["wall_ms"] / images
            cells = (f"{per_image:,.1f}", f"{1 / row['ratio']:.2f}")
            lines.append([f"{pixels}, {images}", name, *cells])
        results[f"{pixels} pixels, {images} images"] = rows
    header = ["pixels, images", "patches", "wall ms an image", "times faster (CPU)"]
    return results, markdown(header, lines)


PARTS = {
    "steps": steps,
    "attention": attention_at_high_resolution,
    "training": training_at_high_resolution,
    "removal": removal,
}


def measure_parts(options: Options, parts: Sequence[str], output: Path) -> None:
    """Measures some of ``PARTS``, prints and writes what comes out.

    Raises:
      UsageError: there is no such part.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise UsageError(
            f"--only names {', '.join(sorted(unknown))}: choose from "
            f"{', '.join(PARTS)}."
        )
    output.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "platform": platform.machine(),
        "jax": jax.__version__,
    }
    for name in parts:
        results, table = PARTS[name](options)
        found = {
            "machine": machine,
            "turns": options.turns,
            "results": results,
        }
        (output / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        (output / f"{name}.md").write_text(table + "\n")
        print(table)


def main(argv: list[str]) -> None:
    """Measures the parts that the flags name."""
    del argv
    logging.set_verbosity(logging.ERROR)
    options = Options(
        turns=_TURNS.value,
        dtype=_DTYPE.value,
        images=_IMAGES.value,
        peak_tflops=_PEAK.value,
        fields=_FIELDS.value,
    )
    measure_parts(options, _ONLY.value or list(PARTS), Path(_OUTPUT.value))


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
    _ONLY = flags.DEFINE_list("only", [], "Of the parts; all by default.")
    _TURNS = flags.DEFINE_integer("turns", 5, "Medians over these are reported.")
    _DTYPE = flags.DEFINE_enum("dtype", "float32", registry.DTYPES, "Of the steps.")
    _IMAGES = flags.DEFINE_integer("images", 0, "In a batch of the steps; 0: a few.")
    _PEAK = flags.DEFINE_float(
        "peak_tflops", 0, "Of the device; 0: of a large product."
    )
    _FIELDS = flags.DEFINE_string("fields", None, "Run folder of a trained WinfT.")
    app.run(main)
