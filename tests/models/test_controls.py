"""The controls against their definitions, written out pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import slow_but
from wf_vit import grid as geometry
from wf_vit.models import controls, registry
from wf_vit.models.attention import DROPPED, FIELD_NAMES, REPORT
from wf_vit.models.registry import ModelConfig
from wf_vit.models.windowfree import FieldConfig, PredictedFields

GRID = (3, 5)
HEADS = 3
CONTROLS = [
    "relative_bias",
    "gaussian",
    "growing_window",
    "static_fields",
]


def tokens(prefix=1):
    return jax.random.normal(jax.random.key(0), (2, prefix + 15, 6))


def bias_of(module, x, patches=None, params=None):
    variables = module.init(jax.random.key(1), x)
    if params is not None:
        variables = {"params": params}
    field = module.apply(variables, x, patches)
    return field.attention_bias(num_prefix_tokens=x.shape[1] - field.num_patches)


def pairs():
    for i, (yi, xi) in enumerate(np.ndindex(*GRID)):
        for j, (yj, xj) in enumerate(np.ndindex(*GRID)):
            yield i, j, xj - xi, yj - yi


def test_relative_bias_is_looked_up_by_displacement_and_starts_at_zero():
    module = controls.RelativeBias(num_heads=HEADS, grid=GRID)
    assert not np.any(bias_of(module, tokens()))
    table = jax.random.normal(jax.random.key(2), (HEADS, 5, 9))
    bias = bias_of(module, tokens(prefix=2), params={"table": table})
    assert bias.shape == (1, HEADS, 17, 17)
    assert not np.any(bias[..., :2, :])
    assert not np.any(bias[..., :2])
    for i, j, dx, dy in pairs():
        np.testing.assert_array_equal(
            bias[0, :, 2 + i, 2 + j], table[:, dy + 2, dx + 4]
        )


def test_gaussian_bias_is_the_log_of_a_gaussian():
    config = FieldConfig(extents=(0.5, 2.0), growth=0.25)
    module = controls.GaussianBias(num_heads=HEADS, grid=GRID, config=config, layer=2)
    bias = bias_of(module, tokens(prefix=0))
    for i, j, dx, dy in pairs():
        widths = [extent / geometry.HALF for extent in (1.0, 2.5, 1.0)]
        expected = [-(dx**2 + dy**2) / (2 * s**2) for s in widths]
        np.testing.assert_allclose(bias[0, :, i, j], expected, rtol=1e-5)
    assert not module.init(jax.random.key(0), tokens())


def test_windows_are_square_and_grow_with_depth():
    config = FieldConfig(extents=(1.0, 0.5))
    for layer in range(3):
        module = controls.WindowBias(num_heads=2, grid=GRID, config=config, layer=layer)
        bias = bias_of(module, tokens(prefix=0))
        for i, j, dx, dy in pairs():
            for head, radius in enumerate((1 + layer, 0.5 + layer)):
                inside = abs(dx) <= radius and abs(dy) <= radius
                assert bias[0, head, i, j] == (0 if inside else np.float32(DROPPED))
    model = controls.GrowingWindowViT(
        num_classes=2,
        image_size=(12, 20),
        patch_size=(4, 4),
        width=8,
        depth=3,
        mlp_dim=8,
        num_heads=2,
    )
    layers = [model.field_for_layer(i).keywords["layer"] for i in range(3)]
    assert layers == [0, 1, 2]


def test_static_fields_are_the_predicted_ones_of_features_that_say_nothing():
    config = FieldConfig(extents=(1.0, 2.0), threshold=0.05)
    options = {"num_heads": HEADS, "grid": GRID, "config": config, "layer": 1}
    static, predicted = controls.StaticFields(**options), PredictedFields(**options)
    x = tokens()
    got = static.apply(static.init(jax.random.key(0), x), x)
    expected = predicted.apply(predicted.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(got.gaussians, expected.gaussians, rtol=1e-6)
    np.testing.assert_allclose(
        got.log_membership(), expected.log_membership()[:1], rtol=1e-5
    )
    np.testing.assert_allclose(got.area()[0], expected.area()[1], rtol=1e-5)


@pytest.mark.parametrize("name", CONTROLS)
def test_only_positions_count_and_some_patches_are_as_among_all(name):
    """Removing patches leaves the bias between the others as it was."""
    fields = FieldConfig(extents=(0.8, 1.7))
    config = ModelConfig(name=name, variant="mu/4", fields=fields)
    model = registry.create_model(config, num_classes=3, image_size=(12, 20))
    module = model.field_for_layer(1)(num_heads=2)
    x = tokens(prefix=1)
    noise = lambda p: p + jax.random.normal(jax.random.key(3), p.shape)  # noqa: E731
    variables = module.init(jax.random.key(1), x)
    params = jax.tree.map(noise, variables.get("params", {}))
    whole = bias_of(module, x, params=params)
    np.testing.assert_array_equal(whole, bias_of(module, 2 * x[::-1], params=params))
    kept = np.array([[14, 3, 0, 7], [2, 9, 1, 11]])
    some = bias_of(module, x[:, :5], jnp.asarray(kept), params=params)
    assert some.shape == (2, 2, 5, 5)
    assert not np.any(some[..., 0, :])
    for image in range(2):
        rows = 1 + kept[image]
        np.testing.assert_allclose(
            some[image, :, 1:, 1:], whole[0][:, rows[:, None], rows], rtol=1e-5
        )


@pytest.mark.parametrize("name", slow_but(CONTROLS, "gaussian", "relative_bias"))
def test_a_control_is_a_vit_but_for_its_bias(name):
    """The same parameters, given the bias by hand, and its round trip as JSON."""
    options = {"pool": "cls", "cls_token": True, "dtype": "float32"}
    config = ModelConfig(name=name, variant="mu/4", **options)
    control = registry.create_model(config, num_classes=3, image_size=(12, 20))
    assert registry.from_json(registry.to_json(control)) == control
    images = jax.random.normal(jax.random.key(4), (2, 12, 20, 3))
    noise = lambda p: p + 0.1 * jax.random.normal(jax.random.key(5), p.shape)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(
        # What heads write about where they listen is not the bias's.
        lambda path, p: 0 * p if REPORT in str(path) else noise(p),
        control.init(jax.random.key(0), images)["params"],
    )
    config = ModelConfig(name="vit", variant="mu/4", **options)
    vit = registry.create_model(config, num_classes=3, image_size=(12, 20))
    biases, shared = [], {}
    for key, value in params.items():
        own = {}
        if key.startswith("blocks_"):
            own = value["attention"].get("field", {})
            whole = value["attention"]
            rest = {k: v for k, v in whole.items() if k not in FIELD_NAMES}
            value = {**value, "attention": rest}
        shared[key] = value
        if key.startswith("blocks_"):
            module = control.field_for_layer(len(biases))(num_heads=2)
            blank = jnp.zeros((2, 16, 32))
            field = module.apply({"params": own}, blank)
            biases.append(field.attention_bias(num_prefix_tokens=1))
    expected, _ = vit.apply({"params": shared}, images, bias=biases)
    got, out = control.apply({"params": params}, images)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    plain, _ = vit.apply({"params": shared}, images)
    assert np.abs(got - plain).max() > 1e-4
    # Fields, with an area, are what is learned; a mere bias is none.
    assert len(out["fields"]) == (2 if name == "static_fields" else 0)
