"""Durations, learning rate and weight-decay mask against hand-computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.train import recipe, schedule, state


def config_with(**overrides):
    config = recipe.default_config("vit", "mu/16")
    config.batch_size = 100
    config.update(overrides)
    return config


def test_durations_are_resolved_from_steps_epochs_and_percent():
    config = config_with(total_epochs=20.0, warmup_percent=5.0, eval_epochs=0.5)
    steps = schedule.durations(config, num_train=1050)
    assert steps.steps_per_epoch == 10.5
    assert steps.total == 210
    assert steps.warmup == round(10.5)
    assert steps.eval == 5
    assert steps.log == 50


def test_the_finest_unit_wins_and_overrides_are_seen():
    config = config_with(total_epochs=20.0)
    config.total_steps = 7
    config.batch_size = 10
    assert schedule.durations(config, num_train=1000).total == 7
    config.total_steps = None
    assert schedule.durations(config, num_train=1000).total == 2000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"total_epochs": None}, "set one of total_steps, total_epochs"),
        ({"total_steps": 10, "warmup_steps": 11}, "warm-up takes 11 steps"),
        ({"log_steps": 0}, "log_steps is 0"),
        ({"eval_epochs": -1.0}, "eval_epochs is -1"),
    ],
)
def test_impossible_durations_are_named(overrides, message):
    with pytest.raises(UsageError, match=message):
        schedule.durations(config_with(**overrides), num_train=1000)


def test_learning_rate_warms_up_and_decays_to_zero():
    config = config_with(total_steps=110, warmup_steps=10)
    steps = schedule.durations(config, num_train=1000)
    rate = schedule.learning_rate(config, steps)
    peak = config.optimizer.learning_rate
    np.testing.assert_allclose(rate(5), peak / 2, rtol=1e-6)
    np.testing.assert_allclose(rate(10), peak, rtol=1e-6)
    np.testing.assert_allclose(rate(60), peak / 2, rtol=1e-5)
    np.testing.assert_allclose(rate(110), 0, atol=1e-9)


def test_only_kernels_decay():
    config = registry.default_config("windowfree", "mu/16")
    config.update(pool="cls", cls_token=True, positions="learned", layer_scale=0.1)
    model = registry.create_model(config, num_classes=3, image_size=32)
    mask = schedule.decay_mask(state.init_params(model, seed=0))
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        assert decays == (path[-1].key == "kernel"), path
    assert mask["blocks_0"]["attention"]["query"] == {"kernel": True, "bias": False}
    assert not mask["prefix"]
    assert not mask["position_table"]
    assert not mask["blocks_0"]["attention_scale"]


def rates_of(model):
    """The exponent of the layer decay of every parameter, by name."""
    names = traverse_util.flatten_dict(state.init_params(model, seed=0))
    options = {"depth": model.depth, "decay": 0.5, "fields": 1.0}
    rates = {"/".join(name): schedule.relative_rate(name, **options) for name in names}
    return {name: round(np.log(rate) / np.log(0.5)) for name, rate in rates.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "cls", "cls_token": True, "positions": "learned", "layer_scale": 0.1},
        {"pool": "map", "num_registers": 2},
    ],
)
def test_rates_fall_with_depth_for_every_parameter(options):
    config = registry.default_config("windowfree", "mu/16")
    config.update(options)
    config.depth = 3
    model = registry.create_model(config, num_classes=3, image_size=32)
    model = model.clone(representation_size=8, distillation_token=model.cls_token)
    expected = {"patches": 4, "prefix": 4, "position_table": 4}
    expected |= {"blocks_0": 3, "blocks_1": 2, "blocks_2": 1}
    expected |= {"norm": 0, "attention_pool": 0, "representation": 0, "head": 0}
    expected["head_distillation"] = 0
    seen = rates_of(model)
    for name, exponent in seen.items():
        fresh = "/field/" in name
        assert exponent == (0 if fresh else expected[name.split("/")[0]]), name
    assert sum("/field/" in name for name in seen) == 2 * 3


def test_layers_and_fields_scale_the_whole_update():
    config = config_with(total_steps=100, warmup_steps=0)
    config.model.name = "windowfree"
    model = registry.create_model(config.model, num_classes=3, image_size=32)
    params = state.init_params(model, seed=0)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates = {}
    for rates in ((1.0, 1.0), (0.5, 1.0), (1.0, 10.0), (0.5, 10.0)):
        config.optimizer.layer_decay, config.optimizer.fields_rate = rates
        optimizer = schedule.make_optimizer(config, schedule.durations(config, 1000))
        start = jax.jit(optimizer.init)(params)
        step, _ = jax.jit(optimizer.update)(gradients, start, params)
        updates[rates] = traverse_util.flatten_dict(step)
    whole = updates.pop((1.0, 1.0))
    for (decay, fields), scaled in updates.items():
        for names, update in whole.items():
            rate = schedule.relative_rate(names, depth=2, decay=decay, fields=fields)
            np.testing.assert_allclose(scaled[names], rate * update, rtol=1e-6)
        kernel = ("patches", "kernel")
        np.testing.assert_allclose(scaled[kernel], whole[kernel] * decay**3)
        extents = ("blocks_0", "attention", "field", "extents", "kernel")
        np.testing.assert_allclose(scaled[extents], whole[extents] * fields, rtol=1e-6)


def test_adam_sees_the_gradient_of_wide_fields():
    """Gradients of 1e-10 move wide fields by the whole rate, and nothing else."""
    config = config_with(total_steps=100, warmup_steps=0)
    config.model.name = "windowfree"
    model = registry.create_model(config.model, num_classes=3, image_size=32)
    params = state.init_params(model, seed=0)
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-10), params)
    for radii in ((0.0,), (1.5,)):
        config.model.fields.extents = radii
        optimizer = schedule.make_optimizer(config, schedule.durations(config, 1000))
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        for names, update in traverse_util.flatten_dict(updates).items():
            if names[-1] == "bias":  # Without weight decay.
                moved = "field" in names and 0.0 in radii
                share = -float(update.mean()) / config.optimizer.learning_rate
                assert share == pytest.approx(1.0 if moved else 0.01, rel=0.02), names


@pytest.mark.parametrize("decay", [0.0, 1.1])
def test_impossible_layer_decay_is_named(decay):
    config = config_with(total_steps=100, warmup_steps=0)
    config.optimizer.layer_decay = decay
    with pytest.raises(UsageError, match="at most 1"):
        schedule.make_optimizer(config, schedule.durations(config, 1000))


def test_negative_rate_of_the_fields_is_named():
    config = config_with(total_steps=100, warmup_steps=0)
    config.optimizer.fields_rate = -1.0
    with pytest.raises(UsageError, match="keeps the fields as they start"):
        schedule.make_optimizer(config, schedule.durations(config, 1000))


def test_update_is_clipped_adamw():
    """The first AdamW step is -rate * (sign(gradient) + decay * kernel)."""
    config = config_with(total_steps=100, warmup_steps=0)
    config.optimizer.clip_norm = 1.0
    optimizer = schedule.make_optimizer(config, schedule.durations(config, 1000))
    params = {"kernel": jnp.array([2.0, -4.0]), "bias": jnp.array([2.0, -4.0])}
    gradients = {"kernel": jnp.array([3e3, -4e3]), "bias": jnp.zeros(2)}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
    expected = -rate * np.array([1 + 2 * decay, -1 - 4 * decay])
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-4)
    np.testing.assert_allclose(updates["bias"], 0, atol=1e-12)
