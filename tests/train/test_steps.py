"""The pure steps: independent of devices and micro-batches, and correct."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.cases import slow
from tests.networks import apply
from wf_vit.data import augment
from wf_vit.data.config import DataInfo
from wf_vit.models import registry
from wf_vit.models.registry import ModelConfig
from wf_vit.train import guidance, parallel, state, steps
from wf_vit.train.config import resolve
from wf_vit.train.teacher import Teacher

BATCH = 16


@pytest.fixture
def experiment(digits_config):
    info = DataInfo(tuple("0123456789"), {"train": 1000}, (8, 8))
    training = resolve(digits_config, info)
    params = training.params
    # A fresh head is zero and would hide the gradient of everything below it.
    head = jax.random.normal(jax.random.key(5), params["head"]["kernel"].shape)
    params = {**params, "head": {**params["head"], "kernel": 0.3 * head}}
    return {
        "config": digits_config,
        "model": training.model,
        "optimizer": training.optimizer,
        "params": params,
        "objective": dataclasses.replace(training.objective, guidance=None),
    }


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8),
        "label": rng.integers(0, 10, (BATCH,), np.int32),
    }


def run(experiment, *, devices, count=2, teacher=None, batch=random_batch, **changes):
    """Runs steps on ``devices`` devices, or on one within a larger program.

    ``batch`` makes the batch of a step from its number.
    """
    step = partial(
        steps.train_step,
        model=experiment["model"],
        optimizer=experiment["optimizer"],
        objective=dataclasses.replace(experiment["objective"], **changes),
        axis=parallel.AXIS,
    )
    if devices == 1:
        alone = jax.jit(parallel.on_one_device(step))
        mapped, shard = lambda now, batch: alone(now, batch, teacher), dict
    else:
        assert devices == jax.local_device_count()
        mapped, shard = parallel.map_update(step, teacher), parallel.shard
    params = jax.tree.map(jnp.copy, experiment["params"])
    now = state.init_state(params, experiment["optimizer"], ema=True)
    history = []
    for index in range(count):
        now, metrics = mapped(now, shard(batch(index)))
        history.append({k: float(v) for k, v in metrics.items()})
    return now, history


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), left, right
    )


def test_four_devices_equal_one(experiment):
    one, one_history = run(experiment, devices=1)
    four, four_history = run(experiment, devices=4)
    assert four.step == 2
    for a, b in zip(one_history, four_history, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    # Adam's first steps are signs: where a gradient is nearly 0, rounding decides.
    flat = lambda tree: np.concatenate(  # noqa: E731
        [np.ravel(x) for x in jax.tree.leaves(tree)]
    )
    difference = np.abs(flat(one.params) - flat(four.params))
    assert np.mean(difference < 1e-5) > 0.99


def test_examples_may_lie_anywhere(experiment):
    """The randomness of an example is that of its place, as processes take them."""
    places = np.arange(BATCH).reshape(2, -1, 2, 2)[:, ::-1].reshape(-1).astype(np.int32)

    def moved(index):
        batch = {name: array[places] for name, array in random_batch(index).items()}
        return {**batch, "place": places}

    _, history = run(experiment, devices=4)
    _, moved_history = run(experiment, devices=4, batch=moved)
    for a, b in zip(history, moved_history, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize(
    ("devices", "accumulate_steps"), [(4, 2), slow(4, 1), slow(1, 1), slow(1, 4)]
)
def test_masked_examples_count_for_nothing(experiment, devices, accumulate_steps):
    """A pair is missing; without it, the loss is the mean over the others."""
    mask = np.arange(BATCH) // 2 != 2

    def masked(index):
        batch = random_batch(index)
        batch["image"][~mask] = 0
        return {**batch, "mask": mask}

    def without(index):
        places = np.flatnonzero(mask).astype(np.int32)
        batch = {name: array[mask] for name, array in random_batch(index).items()}
        return {**batch, "place": places}

    _, (expected,) = run(experiment, devices=1, count=1, batch=without)
    _, (found,) = run(
        experiment,
        devices=devices,
        count=1,
        batch=masked,
        accumulate_steps=accumulate_steps,
    )
    assert found.pop("examples_skipped") == 2
    assert found == pytest.approx(expected, rel=1e-4)


def test_guidance_looks_at_real_examples_only(experiment):
    def masked(index):
        return {**random_batch(index), "mask": np.arange(BATCH) // 2 != 2}

    def altered(index):
        batch = masked(index)
        batch["image"][~batch["mask"]] ^= 255
        return batch

    training = resolve(
        experiment["config"], DataInfo(tuple("0123456789"), {"train": 1000}, (8, 8))
    )
    guided = training.objective.guidance
    histories = [
        run(experiment, devices=4, count=1, batch=batch, guidance=guided)[1]
        for batch in (masked, altered)
    ]
    assert histories[0][0]["guidance_loss"] > 0
    assert histories[0][0] == pytest.approx(histories[1][0], rel=1e-5)


def test_a_batch_without_a_real_example_has_no_loss(experiment):
    def nothing(index):
        return {**random_batch(index), "mask": np.zeros(BATCH, bool)}

    state, (found,) = run(experiment, devices=4, count=1, batch=nothing)
    assert found["examples_skipped"] == BATCH
    assert found["loss"] == found["top1"] == found["gradient_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_micro_batches_give_the_same_gradient(experiment):
    _, whole = run(experiment, devices=1, count=1)
    _, parts = run(experiment, devices=1, count=1, accumulate_steps=4)
    assert whole[0] == pytest.approx(parts[0], rel=1e-4)


def test_loss_and_gradient_are_those_of_the_augmented_batch(experiment):
    _, history = run(experiment, devices=1, count=1)
    key = jax.random.fold_in(jax.random.key(0), 0)
    batch = random_batch()
    augmented = partial(
        augment.augment_batch,
        num_classes=10,
        augmentation=experiment["objective"].augmentation,
    )
    images, labels = jax.jit(augmented)(
        augment.example_keys(key, 0, BATCH),
        jnp.asarray(batch["image"]),
        jnp.asarray(batch["label"]),
    )
    smooth = 0.9 * labels + 0.1 / 10

    def loss(params):
        logits, _ = apply(experiment["model"], params, images)
        return -(smooth * jax.nn.log_softmax(logits)).sum(-1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(experiment["params"])
    assert history[0]["loss"] == pytest.approx(float(value), rel=1e-5)
    norm = float(optax.tree.norm(gradient))
    assert history[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert 0 < history[0]["field_area"] < 1


def test_average_follows_the_parameters(experiment):
    now, _ = run(experiment, devices=1, count=1)
    # At step 0 the decay is min(0.9, 1 / 10).
    expected = jax.tree.map(
        lambda start, end: 0.1 * start + 0.9 * end, experiment["params"], now.params
    )
    assert_trees_close(now.ema_params, expected, rtol=1e-4, atol=1e-6)
    assert_trees_close(now.eval_params, now.ema_params)


def test_randomness_depends_on_seed_and_step_only(experiment):
    a, _ = run(experiment, devices=1)
    b, _ = run(experiment, devices=1)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    _, other = run(experiment, devices=1, count=1, seed=1)
    _, same = run(experiment, devices=1, count=1)
    assert other[0]["loss"] != same[0]["loss"]


@pytest.fixture(params=["fields", "attention"])
def guided(experiment, request):
    """The experiment's own model teaches it, seen at another size."""
    config = ModelConfig.of(experiment["config"].model)
    model = registry.create_model(config, num_classes=10, image_size=16)
    teacher = Teacher(model, mean=(0.4,) * 3, std=(0.3,) * 3)
    return {
        "teacher": registry.init_params(model, seed=3),
        "guidance": guidance.Guidance(
            weight=2.0,
            area_weight=0.5,
            duration=2,
            indicator="mean",
            num_probes=2,
            teacher=teacher,
            match=request.param,
            per_head=request.param == "attention",
        ),
    }


def test_guidance_acts_while_it_lasts_alike_on_any_devices(experiment, guided):
    _, one = run(experiment, devices=1, count=3, **guided)
    _, four = run(experiment, devices=4, count=3, **guided)
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert one[0]["guidance_loss"] > one[1]["guidance_loss"] > 0
    taught = {"fields": "field_coverage", "attention": "attention_divergence"}
    assert one[2]["guidance_loss"] == one[2][taught[guided["guidance"].match]] == 0
    _, plain = run(experiment, devices=1, count=1)
    # The loss that is reported is that of the classes, whatever guides.
    assert one[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert one[0]["gradient_norm"] != pytest.approx(plain[0]["gradient_norm"], rel=1e-4)


def test_without_a_teacher_the_area_acts_alone(experiment, guided):
    alone = dataclasses.replace(
        guided["guidance"], teacher=None, match="fields", weight=0.7
    )
    _, history = run(experiment, devices=1, count=1, guidance=alone)
    expected = 0.7 * 0.5 * history[0]["field_area"]
    assert history[0]["guidance_loss"] == pytest.approx(expected, rel=1e-5)
    assert history[0]["field_coverage"] == 0


def test_evaluation_sums_real_examples_only(experiment):
    step = partial(
        steps.eval_step,
        model=experiment["model"],
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        axis=parallel.AXIS,
    )
    batch = random_batch()
    mask = np.arange(BATCH) < 11
    sums = parallel.map_reduce(step)(
        experiment["params"], parallel.shard({**batch, "mask": mask})
    )
    images = augment.normalize(jnp.asarray(batch["image"][:11]), (0.5,) * 3, (0.5,) * 3)
    logits, _ = apply(experiment["model"], experiment["params"], images)
    labels = batch["label"][:11]
    losses = -jax.nn.log_softmax(logits)[np.arange(11), labels]
    assert sums["count"] == 11
    assert sums["top1"] == (logits.argmax(-1) == labels).sum()
    np.testing.assert_allclose(sums["loss"], losses.sum(), rtol=1e-5)
