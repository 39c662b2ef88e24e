"""Training runs that differ in their seed only, in one program on one device.

The images lie in the device's memory, where batches are drawn, cropped and augmented;
an epoch is one program, mapped over the seeds: all at once, or on a CPU in turn. An
epoch leaves out the images that do not fill a batch.

The images come from one file, so that a sweep needs no TensorFlow. This writes it, of a
prepared TFDS data set with the splits "train" and "test":

    python -m benchmarks.sweep --name=cifar10 --output=cifar10.npz [--data_dir=DIR]

It holds the encoded images as they are in TFDS. CIFAR-10 with its images as JPEG takes
18 MB.
"""

import dataclasses
import functools
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from jaxtyping import Array, Int, UInt8
from PIL import Image

from wf_vit.data.augment import normalize
from wf_vit.data.config import DataConfig, DataInfo
from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.attention import DROPPED
from wf_vit.models.pretrained.stored import Stored
from wf_vit.models.vit import ViT
from wf_vit.shapes import Key, Params
from wf_vit.train import parallel, steps
from wf_vit.train.checkpoint import Checkpoints, restored
from wf_vit.train.config import resolve
from wf_vit.train.state import TrainState, init_state

SPLITS = ("train", "test")

# Folded into the seed for what is drawn outside of the steps.
_DATA_KEY = 0xDA7A


class Split(NamedTuple):
    """Decoded images and their classes."""

    images: UInt8[np.ndarray, "B height width 3"]
    labels: Int[np.ndarray, " B"]


def pack(name: str, data_dir: str, output: Path) -> None:
    """Writes the encoded images and the labels of a prepared TFDS data set."""
    from wf_vit.data.tfds_source import open_tfds  # With TensorFlow.

    source = open_tfds(name, data_dir)
    arrays = {"class_names": np.array(source.class_names)}
    for split in SPLITS:
        records = source.read(split, None).map(source.load).as_numpy_iterator()
        encoded, labels = zip(*((r["image"], r["label"]) for r in records), strict=True)
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{split}_lengths"] = np.array([len(e) for e in encoded], np.int32)
        arrays[f"{split}_labels"] = np.array(labels, np.int32)
    np.savez_compressed(output, **arrays)


def load(path: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Returns the splits that were packed, and the names of the classes.

    Raises:
      UsageError: there is no such file.
    """
    if not path.exists():
        raise UsageError(
            f"There is no {path}: make it with python -m benchmarks.sweep "
            f"--name=cifar10 --output={path}."
        )
    splits = {}
    with np.load(path) as arrays:
        for split in SPLITS:
            ends = np.cumsum(arrays[f"{split}_lengths"])[:-1]
            encoded = np.split(arrays[f"{split}_bytes"], ends)
            images = [Image.open(io.BytesIO(e)).convert("RGB") for e in encoded]
            splits[split] = Split(
                np.stack([np.asarray(image) for image in images]),
                arrays[f"{split}_labels"],
            )
        return splits, tuple(map(str, arrays["class_names"]))


class OnDevice(NamedTuple):
    """A split in the device's memory: uint8 images and int32 labels."""

    images: Array
    labels: Array


def on_device(split: Split, count: int) -> OnDevice:
    """Returns the first ``count`` images of a split (0: all) in device memory."""
    stop = count or None
    return OnDevice(*(jnp.asarray(array[:stop]) for array in split))


def pad_and_crop(
    key: Key, images: UInt8[Array, "B height width 3"], *, pad: int, mode: str
) -> UInt8[Array, "B height width 3"]:
    """Pads images on all sides and crops each at random, as ``crop="pad"`` does."""
    margins = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = jnp.pad(images, margins, mode=mode)
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pad + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def make_epoch(
    step: Callable, *, batch_size: int, pad: int, pad_mode: str, ema: bool
) -> Callable:
    """Returns ``(states, seeds, epoch, data, teacher) -> (states, metrics)``.

    Args:
      step: ``(state, batch, teacher, seed) -> (state, metrics)``, of one seed.
      batch_size: of a step.
      pad: see `pad_and_crop`.
      pad_mode: likewise, ``mode``.
      ema: whether the states hold an average of the parameters.
    """
    crop = functools.partial(pad_and_crop, pad=pad, mode=pad_mode)

    def epoch_of(state, seed, epoch, data, teacher_params):
        count = len(data.labels) // batch_size
        # The steps fold their own count into the seed, so that comes apart first.
        key = jax.random.fold_in(jax.random.key(seed), _DATA_KEY)
        key = jax.random.fold_in(key, epoch)
        order_key, crop_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(data.labels))
        order = order[: count * batch_size].reshape(count, batch_size)

        def update(state, drawn):
            indices, key = drawn
            batch = {
                "image": crop(key, data.images[indices]),
                "label": data.labels[indices],
            }
            return step(state, batch, teacher_params, seed)

        return jax.lax.scan(update, state, (order, jax.random.split(crop_key, count)))

    axes = state_axes(ema=ema)
    mapped = over_seeds(epoch_of, (axes, 0, None, None, None), (axes, 0))
    return jax.jit(mapped, donate_argnums=(0,))


def in_turn() -> bool:
    """Returns whether seeds run in turn: a CPU is slower at batched small products."""
    return jax.default_backend() == "cpu"


def over_seeds(function: Callable, in_axes: Any, out_axes: Any = 0) -> Callable:
    """Maps a function over seeds: all at once, or within the program in turn."""
    if in_turn():
        function = jax.custom_batching.sequential_vmap(function)
    return jax.vmap(function, in_axes=in_axes, out_axes=out_axes)


def state_axes(*, ema: bool) -> TrainState:
    """Returns where the seeds' axis is: seeds that run at once share the step."""
    step = 0 if in_turn() else None
    return TrainState(step=step, params=0, opt_state=0, ema_params=0 if ema else None)


class Sweep:
    """The runs of some seeds, made concrete.

    Attributes:
      training: the config, made concrete for one seed.
      seeds: of the runs.
      states: of the runs, seeds in front.

    Raises:
      UsageError: the config cannot work, or the test images do not fill its batches.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        seeds: Sequence[int],
        train: OnDevice,
        test: OnDevice,
        class_names: tuple[str, ...],
    ):
        self._eval_size = min(config.eval_batch_size, len(test.labels))
        if len(test.labels) % self._eval_size:
            raise UsageError(
                f"{len(test.labels)} test images do not fill batches of "
                f"{config.eval_batch_size}: set --config.eval_batch_size to a divisor."
            )
        self._config, self._train, self._test = config, train, test
        self._steps_per_epoch = len(train.labels) // config.batch_size
        view = DataConfig.of(config.data).view
        counts = (self._steps_per_epoch * config.batch_size, len(test.labels))
        self.training = resolve(
            config,
            DataInfo(
                class_names, dict(zip(SPLITS, counts, strict=True)), view.image_size
            ),
        )
        training, objective = self.training, self.training.objective
        ema = objective.ema_decay > 0

        def step(state, batch, teacher_params, seed):
            update = functools.partial(
                steps.train_step,
                model=training.model,
                optimizer=training.optimizer,
                objective=dataclasses.replace(objective, seed=seed),
                axis=parallel.AXIS,
            )
            return parallel.on_one_device(update)(state, batch, teacher_params)

        def start(seed):
            params = registry.init_params(training.model, seed)
            return init_state(params, training.optimizer, ema=ema)

        self.seeds = jnp.asarray(seeds, jnp.int32)
        starts = jax.vmap(start, out_axes=state_axes(ema=ema))
        self.states = jax.jit(starts)(self.seeds)
        self._epoch = make_epoch(
            step,
            batch_size=config.batch_size,
            pad=view.pad,
            pad_mode=view.pad_mode,
            ema=ema,
        )
        self._evaluation = self._make_evaluation(training.model)

    def run(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Trains to the end; yields the epochs that are done, after each of them.

        With it comes, where the runs were evaluated, a row of figures, which are lists
        over the seeds; else None.
        """
        durations = self.training.durations
        epochs = round(durations.total / self._steps_per_epoch)
        every = max(round(durations.eval / self._steps_per_epoch), 1)
        start, images = time.perf_counter(), 0
        for epoch in range(self._step() // self._steps_per_epoch + 1, epochs + 1):
            self.states, metrics = self._epoch(
                self.states,
                self.seeds,
                epoch,
                self._train,
                self.training.teacher_params,
            )
            jax.block_until_ready(metrics)
            images += metrics["loss"].size * self._config.batch_size
            if epoch % every and epoch != epochs:
                yield epoch, None
                continue
            row = {f"train/{k}": v.mean(1).tolist() for k, v in metrics.items()}
            speed = images / (time.perf_counter() - start)
            scores = self._scores(self._evaluation)
            row = {"epoch": epoch, **row, **scores, "train_images_per_second": speed}
            yield epoch, row
            start, images = time.perf_counter(), 0

    def hard(self, threshold: float) -> dict[str, Any]:
        """Returns what is left when keys of a lower membership are dropped."""
        whole = self.training.model
        fields = dataclasses.replace(whole.fields, threshold=threshold)
        model = whole.clone(fields=fields)
        some = self._test.images[: self._config.batch_size]
        augmentation = self.training.objective.augmentation
        images = normalize(some, augmentation.mean, augmentation.std)

        def kept(params: Params) -> Array:
            _, out = model.apply({"params": params}, images)
            log_m = jnp.stack([f.log_membership() for f in out["fields"].values()])
            return (log_m > DROPPED / 2).mean(dtype=jnp.float32)

        return {
            "threshold": threshold,
            "kept": jax.jit(jax.vmap(kept))(self.states.eval_params).tolist(),
            **self._scores(self._make_evaluation(model)),
        }

    def _scores(self, evaluation: Callable) -> dict[str, list[float]]:
        """Returns top-1 and loss of the test images, for each seed."""
        sums = jax.device_get(evaluation(self.states.eval_params, self._test))
        return {
            f"test/{name}": (sums[name] / sums["count"]).tolist()
            for name in ("top1", "loss")
        }

    def _make_evaluation(self, model: ViT) -> Callable:
        """Returns ``(params, data) -> sums`` over a whole split, for every seed."""
        augmentation = self.training.objective.augmentation
        step = functools.partial(
            steps.eval_step,
            model=model,
            mean=augmentation.mean,
            std=augmentation.std,
            axis=parallel.AXIS,
        )
        alone, size = parallel.on_one_device(step), self._eval_size

        def evaluate(params: Params, data: OnDevice) -> dict[str, Array]:
            batches = {
                "image": data.images.reshape(-1, size, *data.images.shape[1:]),
                "label": data.labels.reshape(-1, size),
            }

            def add(total, batch):
                sums = alone(params, {**batch, "mask": jnp.ones(size)})
                return jax.tree.map(jnp.add, total, sums), None

            zeros = {name: jnp.zeros(()) for name in ("top1", "loss", "count")}
            return jax.lax.scan(add, zeros, batches)[0]

        return jax.jit(over_seeds(evaluate, (0, None)))

    def save(self, folder: Path, meta: dict[str, Any]) -> None:
        """Saves the runs after an epoch, so that `restore` can go on from there.

        Args:
          folder: of these runs alone.
          meta: JSON-serialisable.
        """
        whole = self.states.replace(step=np.int32(self._step()))
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(whole, meta, None)

    def restore(self, saved: Stored) -> None:
        """Goes on from what `save` left, which `newest` reads.

        Raises:
          UsageError: it is of other runs.
        """
        states = restored(saved, self.states.replace(step=np.int32(0)))
        step = jnp.broadcast_to(states.step, self.states.step.shape)
        self.states = states.replace(step=step)

    def save_run(self, folder: Path) -> None:
        """Leaves the first seed as a run folder, as main.py does."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(json.loads(self._config.to_json_best_effort()), indent=2)
        (folder / "config.json").write_text(text + "\n")
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(self.first_state(), self.training.meta, None)

    def first_state(self) -> TrainState:
        """Returns the parameters of the first seed, without the optimizer's state."""
        first = jax.tree.map(lambda leaf: leaf[0], self.states.eval_params)
        step = jnp.asarray(self._step(), jnp.int32)
        return TrainState(step=step, params=first, opt_state={}, ema_params=None)

    def _step(self) -> int:
        """Returns the steps that are done, by every seed."""
        return int(self.states.step.reshape(-1)[0])


def newest(folder: Path) -> Stored | None:
    """Reads what `Sweep.save` left in a folder last; None if there is nothing.

    Raises:
      UsageError: it is damaged.
    """
    if not folder.exists():
        return None
    with Checkpoints(folder) as checkpoints:
        return checkpoints.newest()


def forward_flops(model: ViT) -> float:
    """Returns the floating-point operations of a forward pass on one image."""
    images = jnp.zeros((1, *model.image_size, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    lowered = jax.jit(lambda p, x: model.apply({"params": p}, x)[0]).lower(
        params, images
    )
    return lowered.cost_analysis()["flops"]


def main(argv: list[str]) -> None:
    """Packs the data set that the flags name."""
    del argv
    output = Path(_OUTPUT.value)
    pack(_NAME.value, _DATA_DIR.value, output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    _NAME = flags.DEFINE_string("name", "cifar10", "Name of a prepared TFDS data set.")
    _DATA_DIR = flags.DEFINE_string("data_dir", "", "TFDS folder; '' is the default.")
    _OUTPUT = flags.DEFINE_string("output", "cifar10.npz", "File to write.")
    app.run(main)
