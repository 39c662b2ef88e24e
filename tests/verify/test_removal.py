"""By what patches are ranked or merged, and which of them are gathered out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import verify as verify_config
from tests.verify.conftest import noisy_params
from wf_vit import interventions, selection
from wf_vit.errors import UsageError
from wf_vit.models.vit import ViT
from wf_vit.verify.patch_scores import EVIT, merge, patch_scores
from wf_vit.verify.removal import (
    RULES,
    TOME,
    Removal,
    merged_answer,
    removal,
)
from wf_vit.verify.subject import Answer

LAYERS, IMAGES, HEADS, PREFIX, PATCHES = 3, 2, 2, 1, 5
TOKENS = PREFIX + PATCHES
KEYS = jax.random.split(jax.random.key(0), IMAGES)
ATTENTION = jax.nn.softmax(
    jax.random.normal(jax.random.key(1), (LAYERS, IMAGES, HEADS, TOKENS, TOKENS))
)
IMPACT = jax.random.uniform(
    jax.random.key(2), (LAYERS, IMAGES, HEADS, PATCHES, PATCHES)
)


def test_scores_sum_over_the_layers_to_come():
    scores = patch_scores(ATTENTION, IMPACT, KEYS)
    # The others are known layer by layer.
    assert set(RULES) - set(scores) == {"chosen together", TOME}
    fused = np.asarray(IMPACT).sum(2)
    off = fused * (1 - np.eye(PATCHES))
    for layer in range(LAYERS):
        np.testing.assert_allclose(
            scores["least impact"][layer], off[layer:].sum((0, -2)), rtol=1e-5
        )
        np.testing.assert_allclose(
            scores["least discriminative"][layer],
            fused[layer:].std(-2).sum(0),
            rtol=1e-5,
        )
        np.testing.assert_allclose(
            scores["least attended"][layer],
            np.asarray(ATTENTION)[layer:].mean(2)[..., 0, PREFIX:].sum(0),
            rtol=1e-5,
        )
    np.testing.assert_allclose(
        scores["most discriminative"], -scores["least discriminative"]
    )
    assert (scores["random"][:, 0] != scores["random"][:, 1]).all()


def test_evit_ranks_by_the_layer_before():
    received = np.asarray(ATTENTION).mean(2)[..., 0, PREFIX:]
    found = patch_scores(ATTENTION, IMPACT, KEYS)[EVIT]
    np.testing.assert_allclose(found, received[[0, 0, 1]], rtol=1e-6)


def test_the_likest_are_merged_first_and_each_patch_counts_once():
    # Of 0, 2 and 4 the last is likest to its match, 1.
    angles = jnp.array([0.0, 1.0, 2.0, 2.5, 1.1])
    keys = jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)[None]
    tokens = jnp.array([[[1.0], [2.0], [4.0], [8.0], [16.0]]])
    one = merge(tokens, keys, 4)
    np.testing.assert_array_equal(one.patches[0], [0, 1, 2, 3])
    np.testing.assert_allclose(one.tokens[0, :, 0], [1, 9, 4, 8])
    np.testing.assert_array_equal(one.sizes[0], [1, 2, 1, 1])
    np.testing.assert_array_equal(one.place[0], [0, 1, 2, 3, 1])
    # Half of them at most in one round: then 0, 1 and 3 are left.
    two = merge(tokens, keys, 2)
    np.testing.assert_array_equal(two.sizes.sum(-1), [5])
    whole = np.asarray(tokens[0, :, 0])
    for cluster, patch in enumerate(two.patches[0].tolist()):
        members = np.flatnonzero(two.place[0] == cluster)
        assert patch in members
        np.testing.assert_allclose(two.tokens[0, cluster, 0], whole[members].mean())
    np.testing.assert_allclose(merge(tokens, keys, 1).tokens[0, 0, 0], whole.mean())


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_merging_what_is_equal_changes_nothing(pool):
    model = ViT(4, (16, 16), (4, 4), 12, 2, 24, 3, cls_token=pool == "cls", pool=pool)
    params = noisy_params(model)
    prefix, rng = model.num_prefix_tokens, np.random.default_rng(0)
    tokens = rng.normal(size=(2, model.num_tokens, 12)).astype(np.float32)
    tokens[:, prefix + 1 :: 2] = tokens[:, prefix::2]
    tokens = jnp.asarray(tokens)
    variables = {"params": params}
    whole, _ = model.apply(variables, tokens, method="encode")
    logits, out = model.apply(variables, whole, method="readout")
    answer, left = merged_answer(params, tokens, layer=0, count=8, model=model)
    np.testing.assert_allclose(answer.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(answer.pooled, out["pooled"], rtol=1e-4, atol=1e-4)
    own = jnp.take_along_axis(out["tokens"][:, prefix:], left[..., None], axis=1)
    np.testing.assert_allclose(answer.patches, own, rtol=1e-4, atol=1e-4)
    fewer, _ = merged_answer(params, tokens, layer=0, count=4, model=model)
    assert jnp.abs(fewer.logits - logits).max() > 1e-2


def test_without_cls_attention_is_that_of_all_patches():
    attention = ATTENTION[..., PREFIX:, PREFIX:]
    scores = patch_scores(attention, IMPACT, KEYS)
    expected = np.asarray(attention)[-1].mean((1, 2))
    np.testing.assert_allclose(scores["least attended"][-1], expected, rtol=1e-5)


def test_an_indiscriminative_patch_matters_equally_to_all():
    impact = jnp.zeros((1, 1, 1, 4, 4)).at[..., 0].set(9.0)
    impact = impact.at[0, 0, 0, :, 1].set(jnp.array([0.0, 0.0, 2.0, 0.0]))
    attention = jnp.full((1, 1, 1, 4, 4), 0.25)
    scores = patch_scores(attention, impact, KEYS[:1])
    telling = scores["least discriminative"][0, 0]
    assert telling[1] > telling[0] == telling[2] == 0
    assert scores["least impact"][0, 0].argmax() == 0


def test_answers_land_at_their_place():
    whole = Answer(
        logits=jnp.zeros((IMAGES, 2)),
        pooled=jnp.ones((IMAGES, 2)),
        patches=jax.random.normal(jax.random.key(3), (IMAGES, 5, 4)),
    )
    asked = []

    def without(first, layer, count):
        patches = jnp.tile(
            jnp.arange(5)[:count] if first else jnp.arange(5)[-count:], (IMAGES, 1)
        )
        asked.append((layer, patches[0].tolist()))
        right = layer == 2 and first
        left = jnp.take_along_axis(whole.patches, patches[..., None], axis=1)
        answer = Answer(
            logits=jnp.tile(jnp.array([1.0 - right, float(right)]), (IMAGES, 1)),
            pooled=whole.pooled,
            patches=left,
        )
        return answer, patches

    found = removal(
        {"last": partial(without, False), "first": partial(without, True)},
        whole,
        layers=(0, 2),
        shares=(0.4, 0.8),
        labels=jnp.ones(IMAGES, int),
    )
    assert asked[:4] == [(0, [2, 3, 4]), (0, [4]), (0, [0, 1, 2]), (0, [0])]
    assert found["top1"].shape == (IMAGES, 2, 2, 2)
    np.testing.assert_array_equal(
        found["top1"][0], [[[0, 0], [0, 0]], [[0, 0], [1, 1]]]
    )
    # Compared patch by patch with the ones that are left.
    np.testing.assert_allclose(found["patch_cosine"], 1, atol=1e-6)


def test_removing_nothing_changes_nothing(case):
    config = verify_config.get_config()
    config.removed, config.layers = (0.0, 0.5), (0, 1)
    found = Removal(case.subject, config).measure(case, 6)
    for measure in ("cosine", "patch_cosine"):
        nothing, half = found[measure][..., 0], found[measure][..., 1]
        np.testing.assert_allclose(nothing, 1, atol=1e-5)
        assert (half < 0.9999).all()


def test_best_layer_is_that_of_the_widest_margin(case, estimate):
    config = verify_config.get_config()
    config.removed, config.layers, config.timing_turns = (0.25, 0.5), (0, 1), 0
    protocol = Removal(case.subject, config)
    means = np.full((2, len(RULES), 2), 0.5)
    means[0, 0] = 0.52
    means[1, 0] = 0.6
    # A higher level is no wider margin.
    means[0] += 0.3
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(40, *means.shape))
    outcomes = {"cosine": means + noise, "top1": means[::-1] + noise}
    outcomes = {name: o.astype(np.float32) for name, o in outcomes.items()}
    summary = protocol.summarize(outcomes, estimate)
    best = summary["best_layer"]
    assert best["cosine"]["chosen together"] == 1
    assert best["top1"]["chosen together"] == 0
    measured = summary["measures"]["cosine"]
    assert measured["1"]["chosen together"]["0.25"]["mean"] == pytest.approx(
        0.6, abs=0.01
    )
    text = "\n".join(protocol.tables(summary, 40))
    # The top-1 comes first.
    assert text.index("out before layer 0") < text.index("out before layer 1")


def test_time_is_that_of_the_best_layer_of_the_first_measure(case, estimate):
    config = verify_config.get_config()
    config.removed, config.layers, config.timing_turns = (0.5,), (0, 1), 2
    protocol = Removal(case.subject, config)
    outcome = np.full((2, 2, len(RULES), 1), 0.5, np.float32)
    outcome[:, 1, 0] = 0.6
    outcomes = {"cosine": outcome[:, ::-1], "top1": outcome}
    summary = protocol.summarize(outcomes, estimate)
    times = summary["milliseconds_per_image"]
    assert {size: tuple(by_share) for size, by_share in times.items()} == {
        "1": ("0", "0.5"),
        "64": ("0", "0.5"),
    }
    assert all(time > 0 for by_share in times.values() for time in by_share.values())
    *_, table, cost = protocol.tables(summary, 2)
    assert "| chosen together, ranking 50 % before layer 1 |" in cost
    assert "patches removed before layer 1 | 0 % | 50 % |" in table
    assert table.count("(1.00 x)") >= 2


def test_first_layers_of_quarters():
    assert selection.first_of_quarters(12) == (0, 3, 6, 9)
    assert selection.first_of_quarters(6) == (0, 1, 3, 4)
    assert selection.first_of_quarters(2) == (0, 1)


def test_some_patch_always_stays():
    assert [interventions.num_kept(share, 10) for share in (0.0, 0.25, 0.75, 1.0)] == [
        10,
        8,
        2,
        1,
    ]


def test_gathering_keeps_the_prefix_and_the_order():
    tokens = jnp.arange(2 * 6.0).reshape(2, 6, 1)
    patches = interventions.keep_patches(jnp.array([[0.0, 3, 1, 2, -1]] * 2), 3)
    np.testing.assert_array_equal(patches, [[1, 2, 3]] * 2)
    left = interventions.gather_patches(tokens, patches, num_prefix_tokens=1)
    np.testing.assert_array_equal(left[..., 0], [[0, 2, 3, 4], [6, 8, 9, 10]])


@pytest.mark.parametrize("count", [0, 6])
def test_counts_of_patches_that_make_no_sense_are_refused(count):
    with pytest.raises(UsageError, match="expected 1 to 5"):
        interventions.keep_patches(jnp.zeros((2, 5)), count)
