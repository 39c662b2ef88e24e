"""By what patches are ranked, and which of them are gathered out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import verify as verify_config
from wf_vit import interventions
from wf_vit.errors import UsageError
from wf_vit.verify.patch_scores import EVIT, TOME, alike, patch_scores
from wf_vit.verify.removal import (
    RULES,
    Removal,
    first_of_quarters,
    num_kept,
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


def test_the_likest_go_first_and_half_of_each_round_stays():
    # Of 0, 2 and 4 the last is like 1; then 1 and 3 are left, and 3 stays.
    angles = jnp.array([0.0, 1.0, 2.0, 2.5, 1.1])
    keys = jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)[None]
    np.testing.assert_array_equal(alike(keys)[0], [2, 3, 1, 5, 0])


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


def test_the_lowest_are_removed_and_answers_land_at_their_place():
    scores = {
        "up": dict.fromkeys((0, 2), jnp.tile(jnp.arange(5.0), (IMAGES, 1))),
        "down": dict.fromkeys((0, 2), jnp.tile(-jnp.arange(5.0), (IMAGES, 1))),
    }
    whole = Answer(
        logits=jnp.zeros((IMAGES, 2)),
        pooled=jnp.ones((IMAGES, 2)),
        patches=jax.random.normal(jax.random.key(3), (IMAGES, 5, 4)),
    )
    asked = []

    def predict(layer, patches):
        asked.append((layer, patches[0].tolist()))
        right = layer == 2 and patches[0, 0] == 0
        left = jnp.take_along_axis(whole.patches, patches[..., None], axis=1)
        return Answer(
            logits=jnp.tile(jnp.array([1.0 - right, float(right)]), (IMAGES, 1)),
            pooled=whole.pooled,
            patches=left,
        )

    found = removal(
        predict,
        whole,
        scores,
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
    assert first_of_quarters(12) == (0, 3, 6, 9)
    assert first_of_quarters(6) == (0, 1, 3, 4)
    assert first_of_quarters(2) == (0, 1)


def test_some_patch_always_stays():
    assert [num_kept(share, 10) for share in (0.0, 0.25, 0.75, 1.0)] == [10, 8, 2, 1]


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
