r"""How long a pod would spend on the gradient, on paper: nothing is run.

    python -m benchmarks.pods --output=results/pods \
        --configs=configs/windowfree.py,configs/vit.py --variants=S/16,B/16

An update reduces its gradients and metrics over all devices (wf_vit/train/steps.py).
The bytes of that are counted in the traced step of each config, so they are those of
the program. Of n devices in a ring, each sends 2 (n - 1) / n times as many. Both times
below are bounds from published figures, which ``MACHINES`` cites:

    communication = 2 (n - 1) / n * bytes / bandwidth
    computation   = 3 * forward FLOPs * images of a device / (MFU * peak FLOPs)

Where hosts are slower to reach than devices, a ring within each host comes first. A
backward pass counts as two forward passes. The share of a step is what communication
takes if nothing overlaps: communication / (communication + computation). XLA can
overlap the two. Latencies, the optimizer and the input are left out. --mfu, the share
of the peak FLOPs that is reached, is an assumption: by the same count, a ViT-S/16 that
takes 6 to 7 hours for 90 epochs on 8 TPU-v3 cores (arXiv 2205.01580) reaches 25 to
30 %. It falls where a device has few images. Prints a table, and writes it to
OUTPUT/pods.md with all numbers in OUTPUT/pods.json.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags

from benchmarks import sweep
from wf_vit.data.config import DataInfo
from wf_vit.errors import UsageError
from wf_vit.train import parallel, steps
from wf_vit.train.config import Training, resolve

# What a reduction over the devices is called in a traced program.
_REDUCTIONS = ("psum", "psum_invariant")


def _sent(reduced: int, members: int) -> float:
    """Returns the bytes that a member of a ring sends: it scatters, then gathers."""
    return 2 * (members - 1) / members * reduced


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of device with the link over which it reduces.

    Attributes:
      name: of both.
      peak: bfloat16 FLOPs per second of a device, dense.
      bandwidth: bytes per second that a member of the ring sends.
      sources: of the figures.
      host: devices of a host, which share its link and are one member of the ring.
      within: bytes per second that a device sends to those of its host, if several.
    """

    name: str
    peak: float
    bandwidth: float
    sources: str
    host: int = 1
    within: float | None = None

    def seconds(self, reduced: int, devices: int) -> float:
        """Returns the time of an all-reduce of so many bytes over so many devices."""
        local = min(devices, self.host)
        across = _sent(reduced, devices // local) / self.bandwidth
        if self.within is None:
            return across
        return across + _sent(reduced, local) / self.within


def _tpu(
    name: str, peak: float, pod: float, chips: int, axes: int, url: str
) -> Machine:
    """Returns a TPU: Google gives the all-reduce bandwidth of a pod.

    A chip's is its part. Of the axes of the torus, one ring uses one.
    """
    sources = (
        f"{url}: {peak / 1e12:g} TFLOPs a chip; all-reduce bandwidth {pod / 1e12:g} "
        f"TB/s of {chips} chips in a torus of {axes} axes, of which a ring uses one"
    )
    return Machine(name, peak, pod / chips / axes, sources)


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
MACHINES = (
    _tpu("TPU v3", 123e12, 340e12, 1024, 2, _DOCS + "v3"),
    _tpu("TPU v4", 275e12, 1.1e15, 4096, 3, _DOCS + "v4"),
    _tpu("TPU v5e", 197e12, 51.2e12, 256, 2, _DOCS + "v5e"),
    Machine(
        "H100, NVLink",
        989e12,
        450e9,
        f"{_H100} (SXM): 1,979 TFLOPs with sparsity, half of that dense; NVLink 900 "
        "GB/s in both directions together. More than 8 GPUs need NVLink switches "
        "between the hosts",
    ),
    Machine(
        "H100, 100 Gbit Ethernet",
        989e12,
        12.5e9,
        f"{_H100}, and 100 Gbit/s of Ethernet (IEEE 802.3ba), shared by the 8 GPUs of "
        "a host, which reduce over NVLink first",
        host=8,
        within=450e9,
    ),
)


def reduced_bytes(training: Training, images: int) -> int:
    """Returns the bytes that a device hands to the all-reduces of one update.

    Args:
      training: the resolved config.
      images: of a device, which only has to be possible: the sum does not depend on it.
    """
    step = functools.partial(
        steps.train_step,
        model=training.model,
        optimizer=training.optimizer,
        objective=training.objective,
        axis=parallel.AXIS,
    )
    batch = {
        "image": jnp.zeros((images, *training.info.image_size, 3), jnp.uint8),
        "label": jnp.zeros((images,), jnp.int32),
    }
    state = jax.eval_shape(training.start)
    traced = jax.make_jaxpr(step, axis_env=[(parallel.AXIS, 2)])(
        state, batch, training.teacher_params
    )
    return sum(
        sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
        for equation in _equations(traced.jaxpr)
        if equation.primitive.name in _REDUCTIONS
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a program, those within others included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def open_config(path: str, variant: str) -> ml_collections.ConfigDict:
    """Returns the config of a file such as configs/vit.py, of another size.

    Raises:
      UsageError: there is no such config.
    """
    name = Path(path).with_suffix("").as_posix().replace("/", ".")
    try:
        config = importlib.import_module(name).get_config()
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--configs has {path!r}, which is no config: {error}. Run this in the "
            "root of the clone, and name files such as configs/vit.py."
        ) from error
    config.model.variant = variant
    return config


def on_paper(
    config: ml_collections.ConfigDict,
    info: DataInfo,
    *,
    devices: list[int],
    per_device: int,
    mfu: float,
) -> dict[str, Any]:
    """Returns the bytes, the FLOPs and the times of a config.

    Args:
      config: of the experiment.
      info: of its data.
      devices: numbers of devices.
      per_device: images of a device, beside ``config.batch_size`` over all of them.
      mfu: assumed share of the peak FLOPs, above 0.

    Returns:
      ``parameters``, ``gradient_bytes``, ``reduced_bytes``, ``forward_flops`` of an
      image, and ``rows``: for each machine, number of devices and batch the seconds
      of ``communication`` and ``computation`` and their ``share``.

    Raises:
      UsageError: the devices cannot share the batch.
    """
    training = resolve(config, info)
    leaves = jax.tree.leaves(training.params)
    reduced = reduced_bytes(training, 2 * config.accumulate_steps)
    flops = sweep.forward_flops(training.model)
    rows = []
    for count in devices:
        if config.batch_size % count:
            raise UsageError(
                f"--devices has {count}, which cannot share the batch of "
                f"{config.batch_size} evenly: name divisors of it."
            )
        for machine in MACHINES:
            if count % min(count, machine.host):
                raise UsageError(
                    f"--devices has {count}, which hosts of {machine.host} do not "
                    "make up: name a multiple of it."
                )
        for batch in dict.fromkeys((config.batch_size, per_device * count)):
            for machine in MACHINES:
                sent = machine.seconds(reduced, count)
                work = 3 * flops * batch / count / (mfu * machine.peak)
                row = {"machine": machine.name, "devices": count, "batch": batch}
                row |= {"communication": sent, "computation": work}
                rows.append(row | {"share": sent / (sent + work)})
    return {
        "model": f"{config.model.name} {config.model.variant}",
        "parameters": sum(x.size for x in leaves),
        "gradient_bytes": sum(x.size * x.dtype.itemsize for x in leaves),
        "reduced_bytes": reduced,
        "forward_flops": flops,
        "rows": rows,
    }


def table(results: list[dict[str, Any]], mfu: float) -> str:
    """Returns the results as Markdown: the bytes, then a table for each model."""
    lines = [
        "| model | parameters | all-reduced, bytes | of it metrics | forward, GFLOPs |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        metrics = result["reduced_bytes"] - result["gradient_bytes"]
        lines.append(
            f"| {result['model']} | {result['parameters']:,} | "
            f"{result['reduced_bytes']:,} | {metrics} | "
            f"{result['forward_flops'] / 1e9:.2f} |"
        )
    for result in results:
        lines += [
            "",
            f"**{result['model']}**: all-reduce / computation in ms, and the share "
            "of a step that the all-reduce takes if nothing overlaps",
            "",
            "| devices | batch | " + " | ".join(m.name for m in MACHINES) + " |",
            "|---|---|" + "---|" * len(MACHINES),
        ]
        rows = result["rows"]
        for start in range(0, len(rows), len(MACHINES)):
            cells = [
                f"{1e3 * row['communication']:.2f} / {1e3 * row['computation']:.2f}: "
                f"{100 * row['share']:.1f} %"
                for row in rows[start : start + len(MACHINES)]
            ]
            first = rows[start]
            lines.append(
                f"| {first['devices']} | {first['batch']} | {' | '.join(cells)} |"
            )
    lines += [
        "",
        f"Assumed: {100 * mfu:g} % of the peak FLOPs; a ring; no latency. A device is "
        "a chip or a GPU. Published figures:",
        "",
        *(
            f"- {m.name}: {m.bandwidth / 1e9:.4g} GB/s, {m.peak / 1e12:g} TFLOPs. "
            f"{m.sources}."
            for m in MACHINES
        ),
    ]
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> None:
    """Prints and writes what the flags ask for."""
    del argv
    devices = [int(count) for count in _DEVICES.value]
    if min(devices) < 2 or _PER_DEVICE.value < 1 or _MFU.value == 0:
        raise UsageError(
            "--devices must be 2 or more, --per_device 1 or more, --mfu above 0."
        )
    results = []
    for path in _CONFIGS.value:
        for variant in _VARIANTS.value:
            config = open_config(path, variant)
            size = tuple(np.broadcast_to(config.data.image_size, 2).tolist())
            names = tuple(str(index) for index in range(_CLASSES.value))
            info = DataInfo(names, {"train": _IMAGES.value}, size)
            results.append(
                on_paper(
                    config,
                    info,
                    devices=devices,
                    per_device=_PER_DEVICE.value,
                    mfu=_MFU.value,
                )
            )
    text = table(results, _MFU.value)
    print(text)
    if _OUTPUT.value:
        output = Path(_OUTPUT.value)
        output.mkdir(parents=True, exist_ok=True)
        (output / "pods.md").write_text(text)
        machines = [dataclasses.asdict(machine) for machine in MACHINES]
        result = {"mfu": _MFU.value, "machines": machines, "models": results}
        (output / "pods.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
    _CONFIGS = flags.DEFINE_list(
        "configs", ["configs/windowfree.py", "configs/vit.py"], "Files of configs."
    )
    _VARIANTS = flags.DEFINE_list(
        "variants", ["S/16", "B/16"], "Of config.model.variant."
    )
    _DEVICES = flags.DEFINE_list(
        "devices", ["8", "32", "256"], "Chips or GPUs of a run."
    )
    _PER_DEVICE = flags.DEFINE_integer(
        "per_device", 128, "Images of a device; beside them, config.batch_size in all."
    )
    _MFU = flags.DEFINE_float("mfu", 0.3, "Assumed share of the peak FLOPs.", 0.0, 1.0)
    _CLASSES = flags.DEFINE_integer("classes", 1000, "Of the data.", 2)
    _IMAGES = flags.DEFINE_integer(
        "images", 1_281_167, "Training images of the data.", 1
    )
    app.run(main)
