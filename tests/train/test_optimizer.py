"""Learning rate, groups of parameters and their updates, against computed values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.registry import ModelConfig
from wf_vit.train import optimizer
from wf_vit.train.optimizer import OptimizerConfig

RATE = 1e-3


def winft(**options):
    config = ModelConfig(name="windowfree", variant="mu/16", **options)
    return registry.create_model(config, num_classes=3, image_size=32)


def params_of(model):
    return registry.init_params(model, seed=0)


def test_learning_rate_warms_up_and_decays_to_zero():
    peak = RATE
    rate = optimizer.learning_rate_schedule(peak, warmup_steps=10, total_steps=110)
    np.testing.assert_allclose(rate(5), peak / 2, rtol=1e-6)
    np.testing.assert_allclose(rate(10), peak, rtol=1e-6)
    np.testing.assert_allclose(rate(60), peak / 2, rtol=1e-5)
    np.testing.assert_allclose(rate(110), 0, atol=1e-9)


def test_only_kernels_decay():
    options = {"pool": "cls", "cls_token": True, "positions": "learned"}
    mask = optimizer.decay_mask(params_of(winft(**options, layer_scale=0.1)))
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        assert decays == (path[-1].key == "kernel"), path
    assert mask["blocks_0"]["attention"]["query"] == {"kernel": True, "bias": False}
    assert not mask["prefix"]
    assert not mask["position_table"]
    assert not mask["blocks_0"]["attention_scale"]


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "cls", "cls_token": True, "positions": "learned", "layer_scale": 0.1},
        {"pool": "map", "num_registers": 2},
    ],
)
def test_rates_fall_with_depth_for_every_parameter(options):
    model = winft(**options, depth=3)
    model = model.clone(
        representation_size=8,
        distillation_token=model.cls_token,
        normed_embedding="tokens",
    )
    expected = {"patches": 4, "prefix": 4, "position_table": 4, "embedding_norm": 4}
    expected |= {"blocks_0": 3, "blocks_1": 2, "blocks_2": 1}
    expected |= {"norm": 0, "attention_pool": 0, "representation": 0, "head": 0}
    expected["head_distillation"] = 0
    rates = optimizer.relative_rates(OptimizerConfig(layer_decay=0.5), 3)
    names = traverse_util.flatten_dict(optimizer.group_names(params_of(model)), sep="/")
    seen = {name: round(np.log(rates[g]) / np.log(0.5)) for name, g in names.items()}
    for name, exponent in seen.items():
        fresh = "/field" in name
        assert exponent == (0 if fresh else expected[name.split("/")[0]]), name
    assert sum("/field" in name for name in seen) == 5 * 3


def updates_of(params, gradients, *, wide_fields=False, **settings):
    """The first update, by the names of the parameters."""
    made = optimizer.make_optimizer(
        OptimizerConfig(**settings),
        optimizer.learning_rate_schedule(RATE, warmup_steps=0, total_steps=100),
        depth=2,
        wide_fields=wide_fields,
    )
    start = jax.jit(made.init)(params)
    return traverse_util.flatten_dict(jax.jit(made.update)(gradients, start, params)[0])


def test_layers_and_fields_scale_the_whole_update():
    params = params_of(winft())
    gradients = jax.tree.map(jnp.ones_like, params)
    whole = updates_of(params, gradients)
    groups = traverse_util.flatten_dict(optimizer.group_names(params))
    for decay, fields in ((0.5, 1.0), (1.0, 10.0), (0.5, 10.0)):
        settings = {"layer_decay": decay, "fields_rate": fields}
        scaled = updates_of(params, gradients, **settings)
        rates = optimizer.relative_rates(OptimizerConfig(**settings), 2)
        for names, update in whole.items():
            expected = rates[groups[names]] * update
            np.testing.assert_allclose(scaled[names], expected, rtol=1e-6)
        kernel = ("patches", "kernel")
        np.testing.assert_allclose(scaled[kernel], whole[kernel] * decay**3, rtol=1e-6)
        kernel = ("blocks_0", "attention", "field", "gaussians", "kernel")
        np.testing.assert_allclose(scaled[kernel], whole[kernel] * fields, rtol=1e-6)


def gradients_of(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noise)


def test_muon_makes_updates_of_block_kernels_orthogonal_and_no_others():
    params = params_of(winft())
    gradients = gradients_of(params)
    settings = {"weight_decay": 0.3, "clip_norm": 0.0}
    plain = updates_of(params, gradients, **settings)
    found = updates_of(params, gradients, name="muon", **settings)
    kernels, slopes = map(traverse_util.flatten_dict, (params, gradients))
    # Heads are joined.
    shapes = dict.fromkeys(("query", "key", "value", "out"), (32, 32))
    shapes |= {"up": (32, 128), "down": (128, 32)}
    matrices = {
        names: shapes[names[-2]]
        for names in found
        if names[-1] == "kernel" and names[-2] in shapes
    }
    assert len(matrices) == 2 * 6
    for names, update in found.items():
        if names not in matrices:
            np.testing.assert_allclose(update, plain[names], rtol=1e-5, atol=1e-9)
            continue
        shape = matrices[names]
        # Without decay, in units of 0.2 learning rates times a root of the longer side.
        step = -(update + RATE * 0.3 * kernels[names]).reshape(shape)
        step /= RATE * 0.2 * np.sqrt(max(shape))
        values = np.linalg.svd(step, compute_uv=False)
        # Five rounds bring all but the smallest close to 1.
        assert np.quantile(values, 0.1) > 0.6, names
        assert values.max() < 1.3, names
        assert (step * slopes[names].reshape(shape)).sum() > 0, names


def test_layers_scale_the_update_of_muon():
    params = params_of(winft())
    gradients = gradients_of(params)
    whole = updates_of(params, gradients, name="muon")
    scaled = updates_of(params, gradients, name="muon", layer_decay=0.5)
    rates = optimizer.relative_rates(OptimizerConfig(layer_decay=0.5), 2)
    groups = traverse_util.flatten_dict(optimizer.group_names(params))
    for names, update in whole.items():
        expected = rates[groups[names]] * update
        np.testing.assert_allclose(scaled[names], expected, rtol=1e-4, atol=1e-9)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UsageError, match="'sgd': expected one of 'adamw', 'muon'"):
        OptimizerConfig(name="sgd")


def test_adam_sees_the_gradient_of_wide_fields():
    """Gradients of 1e-10 move wide fields by the whole rate, and nothing else."""
    params = params_of(winft())
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-10), params)
    for wide in (True, False):
        updates = updates_of(params, gradients, wide_fields=wide)
        for names, update in updates.items():
            if names[-1] == "bias":  # Without weight decay.
                share = -float(update.mean()) / RATE
                moved = "field" in names and wide
                assert share == pytest.approx(1.0 if moved else 0.01, rel=0.02), names


@pytest.mark.parametrize("decay", [0.0, 1.1])
def test_impossible_layer_decay_is_named(decay):
    with pytest.raises(UsageError, match="above 0 and up to 1"):
        OptimizerConfig(layer_decay=decay)


def test_negative_rate_of_the_fields_is_named():
    with pytest.raises(UsageError, match="0 keeps them as they start"):
        OptimizerConfig(fields_rate=-1.0)


def test_update_is_clipped_adamw():
    """The first AdamW step is -rate * (sign(gradient) + decay * kernel)."""
    params = {"kernel": jnp.array([2.0, -4.0]), "bias": jnp.array([2.0, -4.0])}
    gradients = {"kernel": jnp.array([3e3, -4e3]), "bias": jnp.zeros(2)}
    updates = updates_of(params, gradients, clip_norm=1.0, weight_decay=0.3)
    expected = -RATE * np.array([1 + 2 * 0.3, -1 - 4 * 0.3])
    np.testing.assert_allclose(updates["kernel",], expected, rtol=1e-4)
    np.testing.assert_allclose(updates["bias",], 0, atol=1e-12)
