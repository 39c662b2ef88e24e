"""Training runs that differ in their seed only, in one program on one device.

The images lie in the device's memory, where batches are drawn, cropped and augmented;
an epoch is one program, mapped over the seeds: all at once, or on a CPU in turn. No
TensorFlow is needed. An epoch leaves out the images that do not fill a batch.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, UInt8

from benchmarks import packed
from wf_vit.data.augment import normalize
from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.windowfree import DROPPED
from wf_vit.models.vit import ViT
from wf_vit.shapes import Key, Params
from wf_vit.train import parallel, schedule, steps, teacher
from wf_vit.train.checkpoint import Checkpoints
from wf_vit.train.state import TrainState, init_params, init_state

# Folded into the seed for what is drawn outside of the steps.
_DATA = 0xDA7A


class OnDevice(NamedTuple):
    """A split in the device's memory: uint8 images and int32 labels."""

    images: Array
    labels: Array


def on_device(split: packed.Split, count: int) -> OnDevice:
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


def make_epoch(step: Callable, config: ml_collections.ConfigDict) -> Callable:
    """Returns ``(states, seeds, epoch, data, teacher) -> (states, metrics)``.

    Args:
      step: ``(state, batch, teacher, seed) -> (state, metrics)``, of one seed.
      config: of the variant.
    """
    crop = functools.partial(
        pad_and_crop, pad=config.data.pad, mode=config.data.pad_mode
    )

    def epoch_of(state, seed, epoch, data, teacher_params):
        count = len(data.labels) // config.batch_size
        # The steps fold their own count into the seed, so that comes apart first.
        key = jax.random.fold_in(jax.random.key(seed), _DATA)
        key = jax.random.fold_in(key, epoch)
        order_key, crop_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(data.labels))
        order = order[: count * config.batch_size].reshape(count, config.batch_size)

        def update(state, drawn):
            indices, key = drawn
            batch = {
                "image": crop(key, data.images[indices]),
                "label": data.labels[indices],
            }
            return step(state, batch, teacher_params, seed)

        return jax.lax.scan(update, state, (order, jax.random.split(crop_key, count)))

    axes = state_axes(config)
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


def state_axes(config: ml_collections.ConfigDict) -> TrainState:
    """Returns where the seeds' axis is: seeds that run at once share the step."""
    step = 0 if in_turn() else None
    ema = 0 if config.ema_decay else None
    return TrainState(step=step, params=0, opt_state=0, ema_params=ema)


def make_evaluation(model: ViT, config: ml_collections.ConfigDict) -> Callable:
    """Returns ``(params, data) -> sums`` over a whole split, for every seed."""
    step = functools.partial(
        steps.eval_step,
        model=model,
        augmentation=ml_collections.FrozenConfigDict(config.data.augment),
        axis=parallel.AXIS,
    )
    alone = parallel.on_one_device(step)

    def evaluate(params: Params, data: OnDevice) -> dict[str, Array]:
        size = min(config.eval_batch_size, len(data.labels))
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


class Sweep:
    """The runs of some seeds, made concrete.

    Raises:
      UsageError: the config cannot work, or the test images do not fill its batches.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        seeds: Sequence[int],
        train: OnDevice,
        test: OnDevice,
        num_classes: int,
    ):
        if len(test.labels) % min(config.eval_batch_size, len(test.labels)):
            raise UsageError(
                f"{len(test.labels)} test images do not fill batches of "
                f"{config.eval_batch_size}: set --config.eval_batch_size to a divisor."
            )
        self.config, self.train, self.test = config, train, test
        self.model = registry.create_model(
            config.model, num_classes=num_classes, image_size=config.data.image_size
        )
        whole_batches = len(train.labels) // config.batch_size * config.batch_size
        durations = schedule.durations(config, whole_batches)
        optimizer = schedule.make_optimizer(config, durations)
        guidance, self.teacher = teacher.guidance_and_teacher(
            config, duration=durations.guidance
        )
        recipe = steps.make_recipe(config, guidance)

        def step(state, batch, teacher_params, seed):
            update = functools.partial(
                steps.train_step,
                model=self.model,
                optimizer=optimizer,
                recipe=dataclasses.replace(recipe, seed=seed),
                axis=parallel.AXIS,
            )
            return parallel.on_one_device(update)(state, batch, teacher_params)

        def start(seed):
            params = init_params(self.model, seed)
            return init_state(params, optimizer, ema=config.ema_decay > 0)

        self.seeds = jnp.asarray(seeds, jnp.int32)
        axes = state_axes(config)
        self.states = jax.jit(jax.vmap(start, out_axes=axes))(self.seeds)
        self.epoch = make_epoch(step, config)
        self.evaluation = make_evaluation(self.model, config)

    def run(self) -> Iterator[dict[str, Any]]:
        """Trains to the end; yields figures, a list over seeds, at each evaluation."""
        epochs = round(self.config.total_epochs)
        every = max(round(self.config.eval_epochs or 1), 1)
        start, images = time.perf_counter(), 0
        for epoch in range(1, epochs + 1):
            self.states, metrics = self.epoch(
                self.states, self.seeds, epoch, self.train, self.teacher
            )
            images += metrics["loss"].size * self.config.batch_size
            if epoch % every and epoch != epochs:
                continue
            row = {f"train/{k}": v.mean(1).tolist() for k, v in metrics.items()}
            speed = images / (time.perf_counter() - start)
            scores = self.scores(self.evaluation)
            yield {"epoch": epoch, **row, **scores, "train_images_per_second": speed}
            start, images = time.perf_counter(), 0

    def scores(self, evaluation: Callable) -> dict[str, list[float]]:
        """Returns top-1 and loss of the test images, for each seed."""
        sums = jax.device_get(evaluation(self.states.eval_params, self.test))
        return {
            f"test/{name}": (sums[name] / sums["count"]).tolist()
            for name in ("top1", "loss")
        }

    def hard(self, threshold: float) -> dict[str, Any]:
        """Returns what is left when keys of a lower membership are dropped."""
        fields = dataclasses.replace(self.model.fields, threshold=threshold)
        model = self.model.clone(fields=fields)
        some = self.test.images[: self.config.batch_size]
        augment = self.config.data.augment
        images = normalize(some, augment.mean, augment.std)

        def kept(params: Params) -> Array:
            _, out = model.apply({"params": params}, images)
            log_m = jnp.stack([f.log_membership() for f in out["fields"].values()])
            return (log_m > DROPPED / 2).mean(dtype=jnp.float32)

        return {
            "threshold": threshold,
            "kept": jax.jit(jax.vmap(kept))(self.states.eval_params).tolist(),
            **self.scores(make_evaluation(model, self.config)),
        }

    def first_state(self) -> TrainState:
        """Returns the parameters of the first seed, without the optimizer's state."""
        first = jax.tree.map(lambda leaf: leaf[0], self.states.eval_params)
        step = self.states.step.reshape(-1)[0]
        return TrainState(step=step, params=first, opt_state={}, ema_params=None)


def forward_flops(model: ViT) -> float:
    """Returns the floating-point operations of a forward pass on one image."""
    images = jnp.zeros((1, *model.image_size, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    lowered = jax.jit(lambda p, x: model.apply({"params": p}, x)[0]).lower(
        params, images
    )
    return lowered.cost_analysis()["flops"]


def save_run(folder: Path, sweep: Sweep, class_names: tuple[str, ...]) -> None:
    """Leaves the first seed as a run folder, as main.py does."""
    augment = sweep.config.data.augment
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(json.loads(sweep.config.to_json_best_effort()), indent=2)
    (folder / "config.json").write_text(text + "\n")
    meta = {
        "model": registry.to_json(sweep.model),
        "class_names": list(class_names),
        "mean": list(augment.mean),
        "std": list(augment.std),
    }
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(sweep.first_state(), meta, None)
