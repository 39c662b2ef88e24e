"""Masks on hand-made scores, and their effect on the attention of a real layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import interventions
from wf_vit.errors import UsageError
from wf_vit.models.attention import attend

LAYERS, IMAGES, HEADS, PATCHES = 2, 3, 2, 8
SHAPE = (LAYERS, IMAGES, HEADS, PATCHES, PATCHES)


def random_scores(shape=SHAPE):
    return jax.random.uniform(jax.random.key(0), shape, minval=-1.0)


def without_own(array):
    """Rows without the patch's own interaction, ``[..., P, P - 1]``."""
    off = ~np.eye(PATCHES, dtype=bool)
    array = np.asarray(array)
    return array[..., off].reshape(*array.shape[:-1], PATCHES - 1)


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("share", [1 / PATCHES, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [SHAPE, (LAYERS, IMAGES, PATCHES, PATCHES)])
def test_every_image_meets_its_budget_with_its_own_patches(shape, share, floor):
    # One image outweighs the others, which a threshold over all would starve.
    scores = random_scores(shape).at[:, 1].add(100)
    keep = interventions.keep_strongest(scores, share, floor=floor)
    assert keep.shape == shape
    assert keep.dtype == bool
    expected = round(share * scores.size / IMAGES)
    counts = keep.sum([axis for axis in range(keep.ndim) if axis != 1])
    np.testing.assert_array_equal(counts, expected)
    assert jnp.diagonal(keep, axis1=-2, axis2=-1).all()


def test_one_threshold_keeps_what_is_stronger_than_what_it_cuts():
    scores = random_scores()
    keep = without_own(interventions.keep_strongest(scores, 0.4))
    scores = without_own(scores)
    for image in range(IMAGES):
        kept = scores[:, image][keep[:, image]]
        assert kept.min() > scores[:, image][~keep[:, image]].max()
    assert len(np.unique(keep.sum(-1))) > 1


def test_top_keys_per_query():
    scores = random_scores()
    keep = interventions.keep_strongest(scores, 3 / PATCHES, floor=1.0)
    np.testing.assert_array_equal(keep.sum(-1), 3)
    # Beside itself each query keeps its two best keys, whatever other rows hold.
    rescaled = scores + np.arange(PATCHES).reshape(1, 1, 1, PATCHES, 1)
    again = interventions.keep_strongest(rescaled, 3 / PATCHES, floor=1.0)
    np.testing.assert_array_equal(keep, again)
    scores, keep = without_own(scores), without_own(keep)
    np.testing.assert_array_equal(keep, scores >= np.sort(scores)[..., -2, None])


def test_floor_protects_queries_that_one_threshold_would_starve():
    scores = random_scores().at[..., :2, :].add(-100)
    options = {"scores": scores, "share": 0.5}
    starved = interventions.keep_strongest(**options)
    fed = interventions.keep_strongest(**options, floor=0.5)
    np.testing.assert_array_equal(starved[..., :2, :].sum(-1), 1)
    np.testing.assert_array_equal(fed[..., :2, :].sum(-1), 2)
    assert fed[..., 2:, :].sum(-1).max() > 2


def test_ties_meet_the_budget_too():
    keep = interventions.keep_strongest(jnp.zeros(SHAPE), 0.5)
    np.testing.assert_array_equal(keep.sum((0, 2, 3, 4)), 0.5 * keep[:, 0].size)


def test_works_inside_jit():
    scores = random_scores()

    def keep(scores):
        return interventions.keep_strongest(scores, 0.3, floor=0.4)

    np.testing.assert_array_equal(jax.jit(keep)(scores), keep(scores))
    as_constant = jax.jit(lambda: keep(scores))()
    np.testing.assert_array_equal(as_constant, keep(scores))


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_bias_cuts_interactions_of_patches_only(prefix):
    keep = interventions.keep_strongest(random_scores(), 0.3)
    biases = interventions.attention_bias(keep, num_prefix_tokens=prefix)
    assert len(biases) == LAYERS
    tokens = PATCHES + prefix
    keys = jax.random.split(jax.random.key(1), 3)
    qkv = [jax.random.normal(key, (IMAGES, HEADS, tokens, 4)) for key in keys]
    for bias, layer in zip(biases, keep, strict=True):
        _, weights = attend(*qkv, bias)
        np.testing.assert_array_equal(weights[..., prefix:, prefix:] > 0, layer)
        assert (weights[..., :prefix, :] > 0).all()
        assert (weights[..., :prefix] > 0).all()
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_bias_of_a_mask_for_all_heads():
    keep = interventions.keep_strongest(random_scores()[:, :, 0], 0.3)
    biases = interventions.attention_bias(keep, num_prefix_tokens=1)
    for bias, layer in zip(biases, keep, strict=True):
        assert bias.shape == (IMAGES, 1, PATCHES + 1, PATCHES + 1)
        np.testing.assert_array_equal(bias[:, 0, 1:, 1:] == 0, layer)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (jnp.ones(SHAPE), {"share": 0.0}, "share is 0.0"),
        (jnp.ones(SHAPE), {"share": 0.1}, "1 / P = 0.125"),
        (jnp.ones(SHAPE), {"share": 10}, "share is 10"),
        (jnp.ones(SHAPE), {"share": 0.5, "floor": 2.0}, "floor is 2.0"),
        (jnp.full(SHAPE, jnp.nan), {"share": 0.5}, "NaN or infinity"),
        (jnp.ones((2, 2, 2)), {"share": 0.5}, "layers in front"),
        (jnp.ones((2, 2, 2, 3)), {"share": 0.5}, "layers in front"),
    ],
)
def test_says_what_is_wrong_with_scores(scores, options, message):
    with pytest.raises(UsageError, match=message):
        interventions.keep_strongest(scores, **options)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.usefixtures("no_type_checks")
def test_numbers_are_no_mask():
    with pytest.raises(UsageError, match="holds float32, expected a mask"):
        interventions.attention_bias(jnp.ones((1, 1, 4, 4)), num_prefix_tokens=0)


def test_a_query_without_any_key_is_refused():
    keep = jnp.ones((1, 1, 4, 4), bool).at[0, 0, 2].set(False)
    with pytest.raises(UsageError, match="leaves a query without any key"):
        interventions.attention_bias(keep, num_prefix_tokens=0)
    (bias,) = interventions.attention_bias(keep, num_prefix_tokens=1)
    assert (jnp.isfinite(bias).any(-1)).all()


def test_windows_hold_at_least_one_patch_of_one_layer():
    with pytest.raises(UsageError, match="max_area is 0"):
        interventions.square_window((3, 3), 0)
    with pytest.raises(UsageError, match="max_area is -1"):
        interventions.partition((3, 3), 2, -1)
    with pytest.raises(UsageError, match="depth is 0"):
        interventions.partition((3, 3), 0, 4)


@pytest.mark.usefixtures("no_type_checks")
def test_says_what_is_wrong_with_masks():
    with pytest.raises(UsageError, match="keep has shape"):
        interventions.attention_bias(jnp.ones((2, 3, 3), bool), num_prefix_tokens=1)
    with pytest.raises(UsageError, match="num_prefix_tokens is -1"):
        interventions.attention_bias(jnp.ones(SHAPE, bool), num_prefix_tokens=-1)
