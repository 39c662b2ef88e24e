"""What the rules keep of attention, and that the answers land where they belong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import interventions, verify
from wf_vit.models.vit import ViT
from wf_vit.verify import network
from wf_vit.verify.windows import RULES

LAYERS, IMAGES, HEADS, GRID = 2, 3, 3, (4, 4)
PATCHES = 16
SHAPE = (LAYERS, IMAGES, HEADS, PATCHES, PATCHES)
KEYS = jax.random.split(jax.random.key(0), IMAGES)
ATTENTION = jax.nn.softmax(2 * jax.random.normal(jax.random.key(1), SHAPE))
IMPACT = jax.random.uniform(jax.random.key(2), SHAPE)


def kept(share):
    masks = verify.masks(ATTENTION, IMPACT, KEYS, share=share, grid=GRID)
    assert tuple(masks) == RULES
    masks = {n: m if m.ndim == 5 else m[:, :, None] for n, m in masks.items()}
    return {name: np.broadcast_to(mask, SHAPE) for name, mask in masks.items()}


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


def test_fields_are_the_strongest_by_both_scores_and_least_important_the_others():
    masks = kept(0.25)
    score = np.asarray(jnp.sqrt(ATTENTION * IMPACT))
    off = ~np.broadcast_to(np.eye(PATCHES, dtype=bool), SHAPE)
    for image in range(IMAGES):
        own, worst, others = (
            masks[name][:, image]
            for name in ("fields per head", "least important", "fields fused")
        )
        scores, rest = score[:, image], off[:, image]
        assert scores[own & rest].min() > scores[~own & rest].max()
        assert scores[worst & rest].max() < scores[~worst & rest].min()
        fused = np.broadcast_to(scores.mean(1, keepdims=True), scores.shape)
        assert fused[others & rest].min() > fused[~others & rest].max()


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
    whole = verify.Answer(
        logits=jnp.zeros((IMAGES, 2)),
        pooled=jnp.ones((IMAGES, 2)),
        patches=jnp.ones((IMAGES, PATCHES, 2)),
    )
    shares = (0.5, 0.2)
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
        return verify.Answer(
            logits=jnp.broadcast_to(
                jnp.array([1.0 - right, float(right)]), (IMAGES, 2)
            ),
            pooled=jnp.broadcast_to(pooled, (IMAGES, 2)),
            patches=whole.patches,
        )

    found = verify.windows(
        predict,
        whole,
        ATTENTION,
        IMPACT,
        shares=shares,
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


def test_keeping_everything_changes_nothing():
    model = ViT(
        num_classes=5,
        image_size=(8, 12),
        patch_size=(4, 4),
        width=16,
        depth=2,
        mlp_dim=32,
        num_heads=2,
        num_registers=1,
    )
    images = jax.random.normal(jax.random.key(3), (2, 8, 12, 3))
    params = model.init(jax.random.key(4), images)["params"]
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    whole, attention = network.whole(params, images, model=model)
    assert attention.shape == (2, 2, 2, 8, 8)
    all_kept = jnp.ones((2, 2, 2, 6, 6), bool)
    same = network.masked(params, images, all_kept, model=model)
    found = verify.agreement(same, whole, whole.logits.argmax(-1))
    for outcome in found.values():
        np.testing.assert_allclose(outcome, 1, atol=1e-6)
    few = jnp.broadcast_to(jnp.eye(6, dtype=bool), all_kept.shape)
    other = network.masked(params, images, few, model=model)
    assert (verify.agreement(other, whole, None)["patch_cosine"] < 0.999).all()
