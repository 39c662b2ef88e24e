"""Attention in blocks against the same arithmetic on whole matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import slow_but
from tests.networks import apply
from wf_vit import grid as geometry
from wf_vit.models import attention, blocked, learned_fields
from wf_vit.models.registry import init_params
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import FieldConfig, WindowFreeViT

HEADS = 2


def random_inputs(tokens, width=6, images=2):
    keys = jax.random.split(jax.random.key(tokens), 4)
    shape = (images, HEADS, tokens, width)
    return tuple(jax.random.normal(key, shape) for key in keys)


def pulled(attend, query, key, value, cotangent):
    """The outputs, and the gradients of all that goes in."""
    output, pull_back = jax.vjp(jax.jit(attend), query, key, value)
    return output, *pull_back(cotangent)


def assert_same(got, expected):
    for x, y in zip(got, expected, strict=True):
        scale = np.abs(y).max()
        np.testing.assert_allclose(x / scale, y / scale, atol=2e-6)


@pytest.mark.parametrize("tokens", [5, 128, 300])
def test_all_keys_in_blocks_are_plain_attention(tokens):
    inputs = random_inputs(tokens)
    expected = pulled(lambda *x: attention.attend(*x)[0], *inputs)
    assert_same(pulled(blocked.attend, *inputs), expected)


def random_reach(grid, size, images=2):
    """Ellipses of all sizes; some hold no patch, and some lie beside the grid."""
    centre, radius = jax.random.normal(
        jax.random.key(7), (2, images, HEADS, grid[0] * grid[1], 2)
    )
    own = jnp.asarray(geometry.coordinates(grid), jnp.float32)[None, None]
    return blocked.Ellipses(own + 4 * centre, size * jnp.exp(radius))


def mask_by_definition(reach, grid, prefix):
    """True for each pair that may interact, one by one."""
    keys = geometry.coordinates(grid)
    centre, radius = np.asarray(reach.centre), np.asarray(reach.radius)
    apart = (keys[None, None, None] - centre[..., None, :]) / radius[..., None, :]
    inside = np.square(apart).sum(-1) <= 1
    inside |= np.eye(len(keys), dtype=bool)
    before = [(0, 0), (0, 0), (prefix, 0), (prefix, 0)]
    return np.pad(inside, before, constant_values=True)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize(("grid", "size"), [((8, 8), 1), ((9, 21), 1), ((20, 17), 4)])
def test_only_keys_within_reach_count(grid, size, prefix):
    inputs = random_inputs(prefix + grid[0] * grid[1])
    reach = random_reach(grid, size)
    mask = mask_by_definition(reach, grid, prefix)
    assert mask.mean() < 0.7
    bias = jnp.where(mask, 0.0, attention.DROPPED)
    expected = pulled(lambda *x: attention.attend(*x, bias)[0], *inputs)
    within = functools.partial(blocked.attend_within, reach=reach, grid=grid)
    assert_same(pulled(within, *inputs), expected)


@pytest.fixture
def all_in_blocks(monkeypatch):
    for module in (attention, learned_fields):
        monkeypatch.setattr(module, "BLOCKED_FROM", 1)
    monkeypatch.setattr(attention, "WHOLE_LOGITS", 0)


SIZE = {
    "num_classes": 3,
    "image_size": (36, 44),
    "patch_size": (4, 4),
    "width": 16,
    "depth": 2,
    "mlp_dim": 16,
    "num_heads": 2,
}
MODELS = {
    "vit": ViT(**SIZE),
    "winft": WindowFreeViT(**SIZE, num_registers=1),
    "hard winft": WindowFreeViT(**SIZE, fields=FieldConfig(threshold=0.1)),
    "bfloat16": WindowFreeViT(**SIZE, dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("name", slow_but(MODELS, "vit", "hard winft"))
def test_every_way_to_attend_gives_the_same_model(name, request):
    """Outputs and gradients: with weights, without them, and in blocks."""
    model = MODELS[name]
    images = jax.random.normal(jax.random.key(0), (2, *SIZE["image_size"], 3))
    params = init_params(model, 0)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params
    )

    def loss(params, record):
        logits, _ = model.apply({"params": params}, images, record=record)
        return jnp.square(logits).sum(), logits

    run = jax.value_and_grad(loss, has_aux=True)
    recorded, plain = (jax.jit(run, static_argnums=1)(params, r) for r in (True, False))
    request.getfixturevalue("all_in_blocks")
    in_blocks = jax.jit(run, static_argnums=1)(params, False)
    tolerance = 0.1 if name == "bfloat16" else 1e-4
    largest = max(np.abs(x).max() for x in jax.tree.leaves(recorded))
    for other in (plain, in_blocks):
        for x, y in zip(*map(jax.tree.leaves, (other, recorded)), strict=True):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * largest)


def test_memory_of_a_large_grid_grows_with_its_patches(all_in_blocks):
    """Compiled for 4,096 patches: gradients fit into less than the logits take."""
    model = WindowFreeViT(
        **SIZE | {"image_size": (256, 256), "depth": 1},
        fields=FieldConfig(threshold=0.05),
    )
    params = jax.eval_shape(lambda: init_params(model, 0))
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)

    def loss(params, images):
        return apply(model, params, images)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, images).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096**2
