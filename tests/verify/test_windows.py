"""What the rules keep of attention, and that the answers land where they belong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import verify as verify_config
from wf_vit import interventions
from wf_vit.verify.subject import Answer
from wf_vit.verify.windows import (
    RULES,
    SCORES,
    SINGLE,
    Windows,
    _attention_gradient,
    _scores,
    masks,
    whole_share,
    windows,
)

LAYERS, IMAGES, HEADS, GRID = 2, 3, 3, (4, 4)
PATCHES = 16
SHAPE = (LAYERS, IMAGES, HEADS, PATCHES, PATCHES)
KEYS = jax.random.split(jax.random.key(0), IMAGES)
ATTENTION = jax.nn.softmax(2 * jax.random.normal(jax.random.key(1), SHAPE))
SINGLE_CUTS = jax.random.uniform(jax.random.key(2), SHAPE)
# Two of them are for all heads.
OTHERS = {
    name: jax.random.uniform(
        jax.random.key(n), SHAPE if n > 4 else (*SHAPE[:2], 16, 16)
    )
    for n, name in enumerate(SCORES, 3)
}


def selected(share):
    return interventions.keep_strongest(ATTENTION, share)


def kept(share):
    share = whole_share(share, LAYERS, PATCHES)
    chosen = selected(share)
    found = masks(chosen, SINGLE_CUTS, OTHERS, KEYS, share=share, grid=GRID)
    assert tuple(found) == RULES
    found = {n: m if m.ndim == 5 else m[:, :, None] for n, m in found.items()}
    return {name: np.broadcast_to(mask, SHAPE) for name, mask in found.items()}


@pytest.mark.parametrize("share", [0.5, 0.27, 0.1])
def test_all_rules_keep_as_much_of_every_image(share):
    counts = {name: mask.sum((0, 2, 3, 4)) for name, mask in kept(share).items()}
    # For each head the same whole number.
    expected = HEADS * round(share * LAYERS * PATCHES**2)
    for count in counts.values():
        np.testing.assert_array_equal(count, expected)


def test_every_patch_keeps_itself():
    for mask in kept(0.1).values():
        assert np.diagonal(mask, axis1=-2, axis2=-1).all()


def test_single_cuts_are_the_strongest_and_least_important_the_others():
    by_rule = kept(0.25)
    off = ~np.broadcast_to(np.eye(PATCHES, dtype=bool), SHAPE)
    for image in range(IMAGES):
        own, worst = (by_rule[name][:, image] for name in (SINGLE, "least important"))
        scores, rest = np.asarray(SINGLE_CUTS)[:, image], off[:, image]
        assert scores[own & rest].min() > scores[~own & rest].max()
        assert scores[worst & rest].max() < scores[~worst & rest].min()


def test_scores_of_others_are_of_the_model_left_alone(case):
    found = _scores(case)
    assert tuple(found) == SCORES
    model, params, recording = case.subject.model, case.subject.params, case.recording
    np.testing.assert_allclose(found[SCORES[1]], found[SCORES[0]].mean(2), rtol=1e-6)
    kernel = params["blocks_1"]["attention"]["out"]["kernel"][0]
    written = recording.values[1, 2, :, 0] @ kernel
    expected = recording.attention[1, 2, 0] * jnp.linalg.norm(written, axis=-1)[None]
    np.testing.assert_allclose(found[SCORES[3]][1, 2, 0], expected, rtol=1e-4)
    # A little more of one weight, in the direction of its value.
    gradient = _attention_gradient(params, case.images, model=model)
    assert gradient.shape == recording.attention.shape
    assert (np.asarray(found[SCORES[4]]) >= 0).all()
    product = recording.attention[1, 2, 0] * jnp.maximum(gradient[1, 2, 0], 0)
    np.testing.assert_allclose(found[SCORES[4]][1, 2, 0], product, rtol=1e-5)


def test_random_differs_by_image_and_repeats():
    first, again = kept(0.25)["random"], kept(0.25)["random"]
    np.testing.assert_array_equal(first, again)
    assert (first[:, 0] != first[:, 1]).any()


def chosen_first(scores, count):
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count])


def test_square_window_is_moved_in_at_the_border():
    windows = chosen_first(interventions.square_window((5, 5), max_area=10), 9)
    block = np.array([0, 1, 2, 5, 6, 7, 10, 11, 12])
    for patch, corner in ((0, 0), (6, 0), (12, 6), (14, 7), (24, 12)):
        np.testing.assert_array_equal(windows[patch], block + corner)
    # The tenth is the nearest outside.
    tenth = chosen_first(interventions.square_window((5, 5), max_area=10), 10)
    assert set(tenth[0]) - set(windows[0]) <= {3, 15}
    oblong = chosen_first(interventions.square_window((5, 5), max_area=7), 6)
    assert set(oblong[12]) in ({11, 12, 13, 16, 17, 18}, {11, 12, 16, 17, 21, 22})
    # A grid may have fewer rows than a square would.
    wide = chosen_first(interventions.square_window((2, 9), max_area=10), 10)
    np.testing.assert_array_equal(wide[4], [2, 3, 4, 5, 6, 11, 12, 13, 14, 15])


def test_partition_tiles_the_grid_and_shifts_in_every_other_layer():
    scores = interventions.partition((4, 4), 3, max_area=5)
    chosen = np.argsort(-scores, axis=-1, kind="stable")[..., :4]
    for layer in (0, 2):
        np.testing.assert_array_equal(np.sort(chosen[layer, 5]), [0, 1, 4, 5])
        np.testing.assert_array_equal(np.sort(chosen[layer, 10]), [10, 11, 14, 15])
    for patch in (5, 6, 9, 10):
        np.testing.assert_array_equal(np.sort(chosen[1, patch]), [5, 6, 9, 10])
    # A cut-off window is filled up with the nearest patches outside.
    assert set(chosen[1, 0]) > {0, 1, 4}
    # The largest that fits and tiles: 2 x 4, not 3 x 3.
    wide = interventions.partition((4, 4), 1, max_area=9)[0]
    assert ((wide[0] > -1 / 2) & (wide[0] >= np.sort(wide[0])[-8])).sum() == 8


def test_answers_land_at_their_rule_and_share():
    whole = Answer(
        logits=jnp.zeros((IMAGES, 2)),
        pooled=jnp.ones((IMAGES, 2)),
        patches=jnp.ones((IMAGES, PATCHES, 2)),
    )
    shares = tuple(whole_share(share, LAYERS, PATCHES) for share in (0.5, 0.2))
    expected = [kept(share) for share in shares]

    asked = []

    def predict(keep):
        column, row = divmod(len(asked), len(RULES))
        asked.append(keep if keep.ndim == 5 else keep[:, :, None])
        np.testing.assert_array_equal(
            np.broadcast_to(asked[-1], SHAPE), expected[column][RULES[row]]
        )
        place = len(shares) * row + column
        right = place % 3 == 0
        angle = 0.01 * place
        pooled = jnp.array(
            [jnp.cos(angle) - jnp.sin(angle), jnp.cos(angle) + jnp.sin(angle)]
        )
        return Answer(
            logits=jnp.broadcast_to(
                jnp.array([1.0 - right, float(right)]), (IMAGES, 2)
            ),
            pooled=jnp.broadcast_to(pooled, (IMAGES, 2)),
            patches=whole.patches,
        )

    found = windows(
        predict,
        whole,
        {share: selected(share) for share in shares},
        SINGLE_CUTS,
        OTHERS,
        grid=GRID,
        keys=KEYS,
        labels=jnp.array([1, 1, 0]),
    )
    place = np.arange(len(RULES) * len(shares)).reshape(len(RULES), len(shares))
    for image, label in enumerate((1, 1, 0)):
        np.testing.assert_array_equal(found["top1"][image], (place % 3 == 0) == label)
        np.testing.assert_allclose(
            found["cosine"][image], np.cos(0.01 * place), atol=1e-5
        )
    np.testing.assert_allclose(found["patch_cosine"], 1, atol=1e-6)


def protocol(case, *shares):
    config = verify_config.get_config()
    config.kept, config.timing_turns = shares, 0
    return Windows(case.subject, config)


def test_keeping_everything_changes_nothing(case):
    patches = case.impact.shape[-1]
    found = protocol(case, 1.0, 1 / patches).measure(case, 6)
    right = np.asarray(case.whole.logits.argmax(-1) == case.labels)
    np.testing.assert_array_equal(
        found["top1"][:, :, 0], np.broadcast_to(right[:, None], (6, len(RULES)))
    )
    for measure in ("cosine", "patch_cosine"):
        np.testing.assert_allclose(found[measure][:, :, 0], 1, atol=1e-5)
    # Of all others each patch keeps only itself.
    assert (found["patch_cosine"][:, :, 1] < 0.999).all()


def test_says_which_control_was_not_beaten(case, estimate):
    means = np.full((len(RULES), 2), 0.5)
    means[0] = 0.9, 0.6
    means[RULES.index("random")] = 0.4, 0.7
    rng = np.random.default_rng(0)
    outcome = (means + 0.01 * rng.normal(size=(40, *means.shape))).astype(np.float32)
    shown = protocol(case, 0.5, 0.1)
    summary = shown.summarize({"cosine": outcome}, estimate)
    margins = summary["margins"]["cosine"]
    assert SINGLE not in margins  # No control, but another of our rules.
    assert margins["random"]["0.5"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert margins["random"]["0.1"]["mean"] == pytest.approx(-0.1, abs=0.02)
    assert margins["random"]["0.1"]["high"] < 0
    _, table, verdict = shown.tables(summary, 40)
    at_half, at_tenth = verdict.split(";")
    assert verdict.startswith("Chosen together:")
    assert "at 50 % it beats every control" in at_half
    assert "at 10 % it does not beat random (-0." in at_tenth
    assert "nearest (" not in at_tenth
    row = next(line for line in table.splitlines() if line.startswith("| random"))
    cells = row.split("|")
    assert "**" not in cells[2]
    assert "**" in cells[3]
