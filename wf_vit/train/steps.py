"""The training and evaluation steps: pure functions of state and batch.

They are jitted by ``parallel``, one shard of the batch per device, and reduce over
the devices themselves. All randomness is folded from the seed, the step and the
example's place in the global batch. So augmentation does not depend on the number of
devices and processes; stochastic depth, drawn per device and micro-batch, does.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from wf_vit.data import augment
from wf_vit.data.config import Augmentation
from wf_vit.models.vit import ViT
from wf_vit.shapes import Params
from wf_vit.train import guidance as guiding
from wf_vit.train.masks import mean_over, weights_of
from wf_vit.train.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What an update works towards, and how, besides the optimizer.

    Attributes:
      seed: of all randomness.
      augmentation: of the training images.
      label_smoothing: mass spread evenly over the classes.
      accumulate_steps: micro-batches per step; they divide a device's batch.
      ema_decay: of the moving average of the parameters; 0 for none.
      guidance: by an indicator, or None.
    """

    seed: int | Int[Array, ""]
    augmentation: Augmentation
    label_smoothing: float = 0.0
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    guidance: guiding.Guidance | None = None


def train_step(
    state: TrainState,
    batch: Batch,
    teacher: Params | None = None,
    *,
    model: ViT,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    axis: str,
) -> tuple[TrainState, Metrics]:
    """Does one update.

    Args:
      state: before the update.
      batch: this device's ``image`` uint8 [b, height, width, 3], ``label`` [b] and,
        optionally, ``place`` [b], the index in the global batch (without it, devices
        hold consecutive examples in their own order) and ``mask`` bool [b], false
        where an example could not be read and counts for nothing.
      teacher: parameters of ``objective.guidance.teacher``, if there is one.
      model: the model.
      optimizer: its optimizer.
      objective: what the update works towards.
      axis: name of the mapped axis to reduce over.

    Returns:
      The state after it, and metrics over the global batch: ``loss``, ``top1`` (on
      the augmented images, against the largest label), ``gradient_norm`` before
      clipping, ``update_norm``, ``updates_skipped`` (1 for an update that is not
      finite and changes nothing, else 0), and ``field_area`` for models with fields;
      with guidance also those of ``guidance.guide``, and with a mask
      ``examples_skipped``, how many it leaves out. The others are means over those
      that are left, and 0 if there are none.
    """
    key = jax.random.fold_in(jax.random.key(objective.seed), state.step)
    count = len(batch["label"])
    if "place" in batch:
        keys = augment.keys_at(key, batch["place"])
    else:
        keys = augment.example_keys(key, jax.lax.axis_index(axis) * count, count)
    batch = {**batch, "key": keys}
    if "mask" in batch:
        batch["weight"] = weights_of(batch["mask"], axis)

    def gradient(micro: Batch) -> tuple[Params, Metrics]:
        loss = partial(
            _loss,
            micro=micro,
            step=state.step,
            teacher=teacher,
            model=model,
            objective=objective,
        )
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return gradients, metrics

    gradients, metrics = _accumulate(gradient, batch, objective.accumulate_steps)
    gradients, metrics = jax.lax.pmean((gradients, metrics), axis)
    if "mask" in batch:
        missing = jnp.sum(~batch["mask"], dtype=jnp.float32)
        metrics["examples_skipped"] = jax.lax.psum(missing, axis)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    metrics["update_norm"] = optax.tree.norm(updates)
    finite = jnp.isfinite(
        metrics["loss"] + metrics["gradient_norm"] + metrics["update_norm"]
    )
    metrics["updates_skipped"] = 1.0 - finite
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        # Early on the average follows fast, or it would remember the initialisation.
        decay = jnp.minimum(objective.ema_decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    # An update that is not finite changes nothing but the count of the steps.
    params, opt_state, ema_params = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state, ema_params),
        (state.params, state.opt_state, state.ema_params),
    )
    state = TrainState(
        step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
    )
    return state, metrics


def _loss(
    params: Params,
    *,
    micro: Batch,
    step: Int[Array, ""],
    teacher: Params | None,
    model: ViT,
    objective: Objective,
) -> tuple[Float[Array, ""], Metrics]:
    """Returns the loss of a micro-batch, and its metrics.

    The loss is the mean cross-entropy, which is the metric ``loss``, and guidance's.
    """
    images, labels = augment.augment_batch(
        micro["key"],
        micro["image"],
        micro["label"],
        num_classes=model.num_classes,
        augmentation=objective.augmentation,
        mask=micro.get("mask"),
    )
    weights = micro.get("weight")
    drop_path_key = jax.random.fold_in(micro["key"][0], 2)
    guidance = objective.guidance
    logits, out = model.apply(
        {"params": params},
        images,
        train=True,
        record=guidance is not None and guidance.match == "attention",
        rngs={"drop_path": drop_path_key},
    )
    losses = optax.softmax_cross_entropy(
        logits, optax.smooth_labels(labels, objective.label_smoothing)
    )
    loss = mean_over(losses, weights)
    hits = (logits.argmax(-1) == labels.argmax(-1)).astype(jnp.float32)
    metrics = {"loss": loss, "top1": mean_over(hits, weights)}
    if out["fields"]:
        areas = [mean_over(f.area(), weights) for f in out["fields"].values()]
        metrics["field_area"] = jnp.stack(areas).mean()
    if guidance is None:
        return loss, metrics
    extra, guidance_metrics = guiding.guide(
        guidance,
        out,
        step,
        teacher,
        images,
        jax.vmap(jax.random.fold_in, in_axes=(0, None))(micro["key"], 3),
        student=model,
        mean=objective.augmentation.mean,
        std=objective.augmentation.std,
        weights=weights,
    )
    return loss + extra, {**metrics, **guidance_metrics}


def _accumulate(gradient, batch: Batch, steps: int) -> tuple[Params, Metrics]:
    """Returns the mean of ``gradient`` over ``steps`` equal parts of the batch."""
    if steps == 1:
        return gradient(batch)
    parts = jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(part)), None

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / steps, total)


def eval_step(
    params: Params,
    batch: Batch,
    *,
    model: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    axis: str,
) -> Metrics:
    """Returns sums over the real examples of the global batch.

    Args:
      params: parameters.
      batch: this device's ``image`` uint8 [b, height, width, 3], ``label`` [b] and
        ``mask`` [b], which is 0 for padding.
      model: the model.
      mean: of the normalisation, see ``Augmentation``.
      std: likewise.
      axis: name of the mapped axis to reduce over.

    Returns:
      ``top1`` and ``loss``, each summed over the examples, and their ``count``.
    """
    images = augment.normalize(batch["image"], mean, std)
    logits, _ = model.apply({"params": params}, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    mask = batch["mask"].astype(jnp.float32)
    sums = {
        "top1": jnp.sum((logits.argmax(-1) == batch["label"]) * mask),
        "loss": jnp.sum(losses * mask),
        "count": jnp.sum(mask),
    }
    return jax.lax.psum(sums, axis)
