"""Every kind of model that opens is measured, cut, fine-tuned, and made a WinfT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.cases import slow_but
from tests.models.pretrained.checkpoints import KINDS, load
from tests.networks import apply, images_for
from wf_vit import fields, measure
from wf_vit.models import registry
from wf_vit.models.registry import ModelConfig
from wf_vit.models.windowfree import FieldConfig

# Gated, with rotary positions, without CLS, and with a pool of its own.
SOME = slow_but(
    KINDS, "timm_dinov2_registers_swiglu", "hf_dinov3_gated", "hf_siglip", "hf_beit"
)


@pytest.fixture(params=KINDS, scope="module")
def loaded(request):
    return load(request.param)


def test_what_is_recorded_is_what_runs(loaded):
    model, params = loaded.model, loaded.params
    images = images_for(model)
    recorded = measure.record(model, params, images)
    plain, out = apply(model, params, images)
    np.testing.assert_allclose(recorded.logits, plain, atol=1e-5)
    np.testing.assert_allclose(recorded.tokens, out["tokens"], atol=2e-5)
    np.testing.assert_allclose(recorded.attention.sum(-1), 1.0, atol=1e-6)
    assert recorded.attention.shape[-1] == model.num_tokens
    # What the norms divide by: the final tokens follow from it.
    assert recorded.scale.shape == (model.depth + 1, 2, model.num_tokens)
    assert (recorded.scale > 0).all()


@pytest.mark.parametrize("loaded", SOME, indirect=True)
def test_impacts_and_fields_are_finite_and_of_every_patch(loaded):
    model, images = loaded.model, images_for(loaded.model)
    patches = model.grid[0] * model.grid[1]
    for indicator in ("knockout", "propagated"):
        found = measure.impact(
            model,
            loaded.params,
            images,
            indicator,
            per_head=True,
            num_probes=2,
            key=jax.random.key(0),
        )
        assert found.impact.shape == (model.depth, 2, patches, patches)
        assert found.heads.shape[2] == model.num_heads
        assert np.isfinite(found.heads).all()
        assert (found.impact.max((-1, -2)) > 0).any()
        field = fields.responsive_field(found.impact, grid=model.grid)
        assert np.isfinite(field.displacement).all()


def test_cutting_an_interaction_does_what_knockout_says(loaded):
    """In the first layer, exactly: the output of the layer's attention."""
    model, params = loaded.model, loaded.params
    images = images_for(model, 1)
    stream = apply(model, params, images, method="embed")
    block, (i, j) = params["blocks_0"], (model.num_tokens - 1, model.num_tokens - 4)
    cut = jnp.zeros((1, 1, *(model.num_tokens,) * 2)).at[..., i, j].set(-1e9)

    def after_attention(bias):
        _, state = model.apply(
            {"params": params},
            stream,
            stop=1,
            bias=[bias] + [None] * (model.depth - 1),
            method="encode",
            capture_intermediates=lambda m, _: m.name == "attention",
        )
        (out, *_), *_ = state["intermediates"]["blocks_0"]["attention"]["__call__"]
        scale = block.get("attention_scale")
        return out if scale is None else out * scale[None, None]

    moved = after_attention(cut) - after_attention(jnp.zeros_like(cut))
    found = measure.impact(model, params, images, "knockout")
    prefix = model.num_prefix_tokens
    expected = found.impact[0, 0, i - prefix, j - prefix]
    np.testing.assert_allclose(np.linalg.norm(moved[0, i]), expected, rtol=1e-4)
    assert not np.delete(np.asarray(moved[0]), i, axis=0).any()


@pytest.mark.parametrize("loaded", SOME, indirect=True)
def test_a_step_of_fine_tuning_as_a_winft(loaded):
    model, images = loaded.model, images_for(loaded.model)
    wide = ModelConfig(
        name="windowfree", fields=FieldConfig(extents=(0.0,)), dtype="float32"
    )
    student = registry.rebuild(model, wide)
    fresh = registry.init_params(student, seed=0)
    params = registry.adopt_fields(fresh, loaded.params, source="the fixture")
    before = apply(student, params, images)[0]
    # Fields that cover the grid change nothing.
    scale = np.abs(np.asarray(before)).max()
    np.testing.assert_allclose(
        before, apply(model, loaded.params, images)[0], atol=1e-4 * scale
    )

    @jax.jit
    def loss(params):
        return jnp.square(student.apply({"params": params}, images)[0] - 1).mean()

    gradients = jax.grad(loss)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    optimizer = optax.adamw(1e-4)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    assert loss(optax.apply_updates(params, updates)) < loss(params)
