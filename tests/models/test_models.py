"""The models: sizes, equivalences, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import slow
from tests.networks import SMALL, apply, images_for, random_params
from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.attention import FIELD_NAMES
from wf_vit.models.positions import sincos_positions
from wf_vit.models.registry import ModelConfig
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import FieldConfig, WindowFreeViT

# Exact sizes at 224 px and 1,000 classes: mean pooling and fixed positions, as the
# ImageNet configs have them. A model that is not listed fails a test.
PARAMETERS = {
    ("vit", "mu/16"): 83_080,
    ("vit", "Ti/16"): 5_679_400,
    ("vit", "S/16"): 21_974_632,
    ("vit", "B/16"): 86_415_592,
    ("vit", "L/16"): 304_123_880,
    ("windowfree", "mu/16"): 86_232,
    ("windowfree", "Ti/16"): 5_785_912,
    ("windowfree", "S/16"): 22_242_568,
    ("windowfree", "B/16"): 87_172_264,
    ("windowfree", "L/16"): 306_534_632,
    ("relative_bias", "mu/16"): 85_996,
    ("relative_bias", "S/16"): 22_027_120,
    ("gaussian", "mu/16"): 83_080,
    ("gaussian", "S/16"): 21_974_632,
    ("growing_window", "mu/16"): 83_080,
    ("growing_window", "S/16"): 21_974_632,
    ("static_fields", "mu/16"): 83_608,
    ("static_fields", "S/16"): 22_085_512,
}


def without_fields(params):
    """A ViT's parameters among those of a window-free transformer."""
    if not isinstance(params, dict):
        return params
    return {k: without_fields(v) for k, v in params.items() if k not in FIELD_NAMES}


def test_every_model_and_every_size_has_a_parameter_count():
    assert {name for name, _ in PARAMETERS} == set(registry.MODELS)
    for name in ("vit", "windowfree"):
        sizes = {size for model, size in PARAMETERS if model == name}
        assert sizes == {f"{size}/16" for size in registry.VARIANTS}


@pytest.mark.parametrize(("name", "variant"), PARAMETERS)
def test_parameter_count(name, variant):
    config = ModelConfig(name=name, variant=variant)
    model = registry.create_model(config, num_classes=1000, image_size=224)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    assert count == PARAMETERS[name, variant]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "map", "num_registers": 3, "layer_scale": 0.1},
        slow({"pool": "mean", "cls_token": False, "positions": "sincos"}),
        slow({"distillation_token": True, "mlp": "swiglu"}),
    ],
)
def test_wide_fields_are_exactly_a_vit(options):
    winft = WindowFreeViT(**SMALL, **options, fields=FieldConfig(extents=(0.0,)))
    vit = ViT(**SMALL, **options)
    images = images_for(vit)
    drawn = random_params(winft)
    # As when a ViT becomes one: the fields are as they start, and nothing is reported.
    fresh = registry.init_params(winft, 0)
    params = registry.adopt_fields(fresh, without_fields(drawn), source="a ViT")
    expected, _ = apply(vit, without_fields(params), images)
    got, _ = apply(winft, params, images)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    narrow = dataclasses.replace(winft, fields=FieldConfig(extents=(1.0,)))
    other, _ = apply(narrow, random_params(narrow), images)
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize("model_class", [ViT, WindowFreeViT])
def test_recording_changes_nothing_and_returns_distributions(model_class):
    model = model_class(**SMALL, num_registers=2)
    params, images = random_params(model), images_for(model)
    plain, out = apply(model, params, images)
    recorded, full = apply(model, params, images, record=True)
    np.testing.assert_allclose(plain, recorded, atol=1e-5)
    assert out["records"] == {}
    assert list(full["records"]) == [0, 1, 2]
    tokens = model.num_tokens
    assert tokens == 1 + 2 + 3 * 4
    for record in full["records"].values():
        assert record["attention"].shape == (2, 4, tokens, tokens)
        assert record["values"].shape == (2, tokens, 4, 8)
        np.testing.assert_allclose(record["attention"].sum(-1), 1, atol=1e-6)


def test_attention_is_a_distribution_in_bfloat16():
    model = WindowFreeViT(**SMALL, dtype=jnp.bfloat16)
    params, images = random_params(model), images_for(model)
    logits, out = apply(model, params, images, record=(1,))
    assert list(out["records"]) == [1]
    assert logits.dtype == jnp.float32
    attention = out["records"][1]["attention"]
    assert attention.dtype == jnp.float32
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-6)


def test_blocks_can_be_run_in_parts():
    model = WindowFreeViT(**SMALL)
    params = random_params(model)
    images = images_for(model)
    expected, out = apply(model, params, images)
    tokens = apply(model, params, images, method="embed")
    tokens, _ = apply(model, params, tokens, stop=1, method="encode")
    tokens, rest = apply(model, params, tokens, start=1, method="encode")
    got, read = apply(model, params, tokens, method="readout")
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(read["tokens"], out["tokens"], atol=1e-6)
    assert list(rest["fields"]) == [1, 2]


def test_bias_cuts_interactions_of_one_layer_in_both_paths():
    model = ViT(**SMALL)
    params = random_params(model)
    images = images_for(model)
    cut = jnp.zeros((1, 1, model.num_tokens, model.num_tokens))
    cut = cut.at[..., 3, 5].set(-jnp.inf)
    bias = [None, cut, None]
    fused, _ = apply(model, params, images, bias=bias)
    explicit, out = apply(model, params, images, bias=bias, record=True)
    np.testing.assert_allclose(fused, explicit, atol=1e-5)
    assert np.all(out["records"][1]["attention"][..., 3, 5] == 0)
    assert np.all(out["records"][0]["attention"][..., 3, 5] > 0)
    whole, _ = apply(model, params, images)
    assert np.abs(fused - whole).max() > 1e-6


@pytest.mark.parametrize("remat", [False, True])
def test_remat_keeps_the_gradient(remat):
    model = WindowFreeViT(**SMALL, remat=remat, layer_scale=0.5)
    params, images = random_params(model), images_for(model)

    def loss(params, model):
        return (model.apply({"params": params}, images, train=True)[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got = gradient(params, model)
    reference = gradient(params, dataclasses.replace(model, remat=False))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        got,
        reference,
    )
    field = got["blocks_1"]["attention"]["field"]["gaussians"]["kernel"]
    assert np.abs(field).max() > 0


def test_stochastic_depth_acts_per_example_and_only_in_training():
    model = ViT(**SMALL, drop_path=0.5)
    params = random_params(model)
    images = jnp.repeat(images_for(model, 1), 64, axis=0)
    calm, _ = apply(model, params, images)
    rngs = {"drop_path": jax.random.key(3)}
    wild, _ = apply(model, params, images, train=True, rngs=rngs)
    assert np.ptp(calm, axis=0).max() < 1e-5
    # Two branches of block 1 and two of block 2 are dropped or not.
    assert 4 < len(np.unique(np.round(np.asarray(wild)[:, 0], 4))) <= 16


def test_sincos_positions_tell_rows_from_columns():
    table = sincos_positions((3, 5), 32)
    assert table.shape == (15, 32)
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert distances[~np.eye(15, dtype=bool)].min() > 0.1
    # Patches 0 and 1 share a row: the half of the table for y is equal.
    np.testing.assert_array_equal(table[0, 16:], table[1, 16:])
    np.testing.assert_array_equal(table[0, :16], table[5, :16])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (12, 18)}, "multiple, such as 16 or 20"),
        ({"num_heads": 5}, "5 heads do not divide"),
        ({"pool": "max"}, "one of 'cls', 'mean', 'map'"),
        ({"cls_token": False}, "set cls_token=True"),
        ({"positions": "sincos", "width": 4, "num_heads": 1}, "of at least 8, not 4"),
    ],
)
def test_contradictions_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        ViT(**{**SMALL, **change}).validate()


def test_unknown_names_suggest_the_nearest():
    config = ModelConfig(name="windowfre", variant="S/16")
    with pytest.raises(UsageError, match="did you mean 'windowfree'"):
        registry.create_model(config, num_classes=10, image_size=32)
    config = ModelConfig(name="vit", variant="S16")
    with pytest.raises(UsageError, match="such as S/16"):
        registry.create_model(config, num_classes=10, image_size=32)


def test_wrong_input_is_refused():
    model = ViT(**SMALL)
    variables = {"params": random_params(model)}
    with pytest.raises(UsageError, match="made for"):
        model.apply(variables, jnp.zeros((1, 16, 16, 3)))
    images = images_for(model)
    with pytest.raises(UsageError, match=r"layers \[7\]"):
        model.apply(variables, images, record=[7])
    with pytest.raises(UsageError, match="2 entries"):
        model.apply(variables, images, bias=[None, None])
