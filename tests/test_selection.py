"""Choices that can be checked by trying all others, on models of a few patches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import slow
from wf_vit import interventions, measure
from wf_vit.errors import UsageError
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import WindowFreeViT
from wf_vit.selection import select_interactions, select_patches
from wf_vit.selection.interactions import _allocate, _counts, _kept, _Paths, _search
from wf_vit.selection.yardstick import yardstick

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
PATCHES = 6
SIZE = {
    "num_classes": 3,
    "image_size": (8, 12),
    "patch_size": (4, 4),
    "width": 8,
    "depth": 2,
    "mlp_dim": 16,
    "num_heads": 2,
}
MODELS = {
    "cls": ViT(**SIZE, num_registers=1),
    "mean": ViT(**SIZE, cls_token=False, pool="mean"),
    "windowfree": WindowFreeViT(**SIZE, cls_token=False, pool="mean"),
}


@functools.cache
def network(name):
    """A model whose patches differ, and its parameters, made on the host."""
    model = MODELS[name]
    shapes = jax.eval_shape(model.init, KEY, IMAGES)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes
    )
    return model, params


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [1.0, 0.5, 1 / PATCHES])
def test_the_budget_of_an_image_is_met_and_patches_keep_themselves(name, share):
    model, params = network(name)
    (keep,) = select_interactions(model, params, IMAGES, [share], key=KEY, num_probes=2)
    assert keep.shape == (2, 2, 2, PATCHES, PATCHES)
    count = round(share * 2 * 2 * PATCHES**2)
    np.testing.assert_array_equal(keep.sum((0, 2, 3, 4)), count)
    assert np.diagonal(keep, axis1=-2, axis2=-1).all()


def outputs(model, params, keep):
    bias = interventions.attention_bias(keep, num_prefix_tokens=model.num_prefix_tokens)
    return model.apply({"params": params}, IMAGES, bias=bias)[1]["tokens"]


@pytest.mark.parametrize("name", ["cls", "mean"])
def test_what_is_chosen_moves_the_tokens_less_than_attention_and_chance(name):
    model, params = network(name)
    recording = measure.record(model, params, IMAGES)
    prefix = model.num_prefix_tokens
    attention = recording.attention[..., prefix:, prefix:]
    (chosen,) = select_interactions(model, params, IMAGES, [0.5], key=KEY)
    noise = [jax.random.uniform(jax.random.key(n), attention.shape) for n in range(20)]

    def moved(keep):
        return float(jnp.linalg.norm(outputs(model, params, keep) - recording.tokens))

    others = [moved(interventions.keep_strongest(scores, 0.5)) for scores in noise]
    assert moved(chosen) < moved(interventions.keep_strongest(attention, 0.5))
    assert moved(chosen) < min(others)


def test_errors_are_those_of_the_renormalised_means():
    model, params = network("cls")
    scale, recording = yardstick(model, params, IMAGES, "tokens", KEY, 3)
    attention, values = recording.attention[1], recording.values[1].swapaxes(1, 2)
    scale = jax.tree.map(lambda x: x[1], scale)
    prefix = model.num_prefix_tokens
    paths = _search(attention, values, scale, num_prefix_tokens=prefix)
    assert (np.sort(paths.ranks, -1) == np.arange(PATCHES)).all()
    for place, count in enumerate(_counts(PATCHES)):
        kept = jnp.pad(
            paths.ranks < count,
            [(0, 0)] * 4 + [(prefix, 0)],
            "constant",
            constant_values=True,
        )
        weights = attention[:, :, None, prefix:] * kept
        means = weights / weights.sum(-1, keepdims=True) @ values[:, :, None]
        apart = (means - scale.wanted[:, :, None, prefix:]) @ scale.root[:, :, None]
        expected = jnp.square(apart).sum(-1) * scale.gain[:, :, None, prefix:]
        np.testing.assert_allclose(
            paths.errors[..., place],
            expected,
            rtol=1e-3,
            atol=1e-5 * paths.errors.max(),
        )


def test_the_path_that_leads_nearer_is_taken():
    ranks = jnp.stack(
        [jnp.tile(jnp.array(order), (3, 1)) for order in ([0, 1, 2], [0, 2, 1])]
    )
    ranks = jnp.asarray(ranks)[None, None]
    errors = jnp.array(
        [[[9, 1, 0], [9, 2, 0], [9, 1, 0]], [[9, 2, 0], [9, 1, 0], [9, 2, 0]]]
    )
    paths = _Paths(ranks, errors[None, None].astype(float))
    kept = _kept(paths, jnp.array([2, 2, 1])[None, None])[0, 0]
    expected = [[True, True, False], [True, False, True], [True, False, False]]
    np.testing.assert_array_equal(kept, expected)


def test_keys_go_where_they_gain_most_and_the_rest_to_those_without_error():
    steep, flat, none = [8.0, 2.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.0]
    errors = jnp.array([steep, flat, none])[None, None, None]
    assert _allocate(errors, 4)[0, 0, 0].tolist() == [2, 1, 1]
    assert _allocate(errors, 5)[0, 0, 0].tolist() == [3, 1, 1]
    assert _allocate(errors, 8)[0, 0, 0].tolist() == [3, 3, 2]


@pytest.mark.parametrize(
    ("name", "target"), [("mean", "pooled"), slow("cls", "tokens"), slow("cls", "cls")]
)
def test_removed_patches_are_among_the_best_of_all_choices(name, target):
    model, params = network(name)
    ranks = select_patches(
        model, params, IMAGES, 0, key=KEY, target=target, num_probes=16
    )
    np.testing.assert_array_equal(np.sort(ranks), np.tile(np.arange(6) + 1, (2, 1)))
    whole = model.apply({"params": params}, IMAGES)[1]
    before = model.apply({"params": params}, IMAGES, method="embed")
    prefix = model.num_prefix_tokens

    def moved(patches):
        """How far the output moves when only those patches are there."""
        tokens = interventions.gather_patches(before, patches, num_prefix_tokens=prefix)
        tokens, _ = model.apply(
            {"params": params}, tokens, patches=patches, method="encode"
        )
        out = model.apply({"params": params}, tokens, method="readout")[1]
        if target == "pooled":
            return jnp.linalg.norm(out["pooled"] - whole["pooled"], axis=-1)
        if target == "cls":
            return jnp.linalg.norm(out["tokens"][:, 0] - whole["tokens"][:, 0], axis=-1)
        full = interventions.gather_patches(
            whole["tokens"], patches, num_prefix_tokens=prefix
        )
        return jnp.linalg.norm(out["tokens"] - full, axis=(-2, -1))

    sets = itertools.combinations(range(PATCHES), 4)
    all_sets = np.stack([moved(jnp.tile(jnp.array(s), (2, 1))) for s in sets])
    own = np.asarray(moved(interventions.keep_patches(ranks, 4)))
    # Of all sets of four, fewer than a quarter are better.
    assert (all_sets < own - 1e-5).mean() < 0.25


def test_what_is_not_ranked_comes_last():
    model, params = network("mean")
    ranks = select_patches(model, params, IMAGES, 1, key=KEY, removed=0.5)
    assert (np.sort(ranks) == [1, 2, 3, 7, 7, 7]).all()
    # 3.6 patches: as many are ranked as are removed.
    ranks = select_patches(model, params, IMAGES, 1, key=KEY, removed=0.6)
    removed = PATCHES - interventions.num_kept(0.6, PATCHES)
    assert ((ranks <= PATCHES).sum(1) == removed).all()


def test_each_patch_is_removed_once_where_steps_are_of_two_sizes():
    """40 patches in 32 steps, of two patches and then of one."""
    model = ViT(**SIZE | {"image_size": (20, 32)})
    images = jax.random.normal(KEY, (1, *model.image_size, 3))
    params = model.init(KEY, images)["params"]
    ranks = select_patches(model, params, images, 0, key=KEY, num_probes=2)
    np.testing.assert_array_equal(np.sort(ranks[0]), np.arange(40) + 1)


def test_an_image_does_not_depend_on_the_others():
    model, params = network("cls")
    keys = jax.random.split(KEY, 2)
    (both,) = select_interactions(model, params, IMAGES, [0.5], key=keys)
    (alone,) = select_interactions(model, params, IMAGES[1:], [0.5], key=keys[1:])
    np.testing.assert_array_equal(both[:, 1:], alone)
    both = select_patches(model, params, IMAGES, 0, key=keys)
    alone = select_patches(model, params, IMAGES[1:], 0, key=keys[1:])
    np.testing.assert_array_equal(both[1:], alone)


def test_what_is_out_of_range_is_named():
    model, params = network("mean")
    of_interactions = functools.partial(select_interactions, model, params, IMAGES)
    of_patches = functools.partial(select_patches, model, params, IMAGES)
    for share in (0.1, 1.5):
        with pytest.raises(UsageError, match=f"shares has {share}, expected 1 / P"):
            of_interactions([share], key=KEY)
    with pytest.raises(UsageError, match="target is 'logits'"):
        of_interactions([0.5], key=KEY, target="logits")
    with pytest.raises(UsageError, match="no CLS token"):
        of_patches(0, key=KEY, target="cls")
    with pytest.raises(UsageError, match="num_probes is 0"):
        of_patches(0, key=KEY, num_probes=0)
    with pytest.raises(UsageError, match=r"removed is 1\.5"):
        of_patches(0, key=KEY, removed=1.5)
    with pytest.raises(UsageError, match="layer"):
        of_patches(2, key=KEY)
