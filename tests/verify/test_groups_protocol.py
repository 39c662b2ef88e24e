"""The protocol of sets: what is drawn, what is cut, and what is predicted of it."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests.verify.conftest import noisy_params
from wf_vit.grid import distances
from wf_vit.models.vit import ViT
from wf_vit.verify import groups, sets
from wf_vit.verify.groups import (
    FIXED,
    IN_UNITS,
    LAYERS,
    OWN,
    PREDICTORS,
    SCOPES,
    SHARES,
    Groups,
)
from wf_vit.verify.subject import Case, Subject

GRID = (4, 6)
PATCHES = 24
DEPTH, HEADS = 3, 2
SHAPE = (DEPTH, HEADS, PATCHES, PATCHES)
RNG = np.random.default_rng(0)
IMPACT, ATTENTION = RNG.gamma(1.0, size=SHAPE), RNG.gamma(1.0, size=SHAPE)
OWN_PATCH = np.eye(PATCHES, dtype=bool)


def drawn(share, one_layer=False, num_sets=2, seed=1):
    return list(
        sets.draw(
            np.random.default_rng(seed),
            IMPACT,
            ATTENTION,
            share=share,
            grid=GRID,
            one_layer=one_layer,
            num_sets=num_sets,
        )
    )


def of_kind(found, kind):
    return [each.cut for each in found if each.kind == kind]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("one_layer", [True, False])
def test_sets_have_their_size_and_spare_each_patch_itself(share, one_layer):
    found = drawn(share, one_layer)
    kinds = [each.kind for each in found]
    assert kinds == [*sets.DRAWN, *sets.DRAWN, *sets.CHOSEN]
    for kind, cut in found:
        assert not cut[..., OWN_PATCH].any()
        layers = cut.any((1, 2, 3))
        if kind in ("columns", "rows", "window", "object", "far"):
            # As near as whole patches, squares and distances allow.
            got = cut[layers].mean() if layers.any() else 0
            assert abs(got - share) < 0.16
            assert layers.sum() in ((0, 1) if one_layer else (0, DEPTH))
        else:
            size = cut.size / DEPTH if one_layer else cut.size
            assert cut.sum() == round(share * size)
            assert layers.sum() == 1 or not one_layer


def test_shapes_are_those_of_their_kind():
    found = drawn(0.25)
    for cut in of_kind(found, "columns"):
        assert (cut == cut[:1, :1]).all()
        deaf_to = (cut[0, 0] | OWN_PATCH).all(0)
        assert deaf_to.sum() == 6
        np.testing.assert_array_equal(cut[0, 0], deaf_to[None] & ~OWN_PATCH)
    for cut in of_kind(found, "rows"):
        deaf = (cut[0, 0] | OWN_PATCH).all(1)
        assert deaf.sum() == 6
        np.testing.assert_array_equal(cut[0, 0], deaf[:, None] & ~OWN_PATCH)
    for cut in of_kind(found, "window"):
        window = (cut[0, 0] | OWN_PATCH).all(0).reshape(GRID)
        rows, columns = window.any(1).sum(), window.any(0).sum()
        assert rows == columns == 2
        assert window.sum() == 4
    (far,) = of_kind(found, "far")
    apart = distances(GRID)
    assert apart[far[0, 0]].min() > apart[~far[0, 0]].max()


@pytest.mark.parametrize("score", ["impact", "attention"])
def test_least_and_most_are_by_one_threshold(score):
    found = drawn(0.1)
    scores = IMPACT if score == "impact" else ATTENTION
    (least,), (most,) = (of_kind(found, f"{end} {score}") for end in ("least", "most"))
    others = np.broadcast_to(~OWN_PATCH, SHAPE)
    assert scores[least].max() <= scores[others & ~least].min()
    assert scores[most].min() >= scores[others & ~most].max()


def test_an_object_is_connected_and_takes_the_strongest_neighbours():
    strength = np.zeros(GRID)
    strength[1, 1:5] = [4, 3, 2, 1]
    strength[3, 5] = 9  # Strong, but far from the others.
    region = sets.grown(strength.ravel(), GRID, 4, 7).reshape(GRID)
    expected = np.zeros(GRID, bool)
    expected[1, 1:5] = True
    np.testing.assert_array_equal(region, expected)


def test_what_is_drawn_differs_and_comes_again():
    one, same, other = drawn(0.1), drawn(0.1), drawn(0.1, seed=2)
    for kind in ("random", "columns", "rows"):
        first, second = of_kind(one, kind)
        assert (first != second).any()
        np.testing.assert_array_equal(first, of_kind(same, kind)[0])
        assert (first != of_kind(other, kind)[0]).any()


# Real cuts.


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_displacements_are_norms_beside_a_run_without_a_cut(batch_size):
    cuts = [np.zeros(SHAPE, bool) for _ in range(5)]
    for number, cut in enumerate(cuts):
        cut[0, 0, 0, 1 : number + 1] = True
    shapes = set()

    def predict(keep):
        shapes.add(keep.shape)
        gone = (~keep).sum((0, 2, 3, 4)).astype(jnp.float32)
        return 7.0 + gone[:, None, None] * jnp.asarray([[[3.0, 4.0]]])

    got = groups.displacements(predict, cuts, batch_size)
    np.testing.assert_allclose(got, 5.0 * np.arange(5))
    assert shapes == {(DEPTH, batch_size + 1, *SHAPE[1:])}


def test_a_set_is_cut_in_its_layers_and_nowhere_else(case):
    """One patch that no other hears in the last layer: it does not notice itself."""
    model, params = case.subject.model, case.subject.params
    patches = model.grid[0] * model.grid[1]
    keep = np.ones((model.depth, 2, model.num_heads, patches, patches), bool)
    keep[-1, 1, :, :, 3] = np.eye(patches, dtype=bool)[:, 3]
    tokens, pooled = (
        np.asarray(
            groups._cut(
                params, case.images[:1], jnp.asarray(keep), model=model, target=target
            )
        )
        for target in ("tokens", "pooled")
    )
    whole = np.asarray(case.whole.patches[0])
    prefix = model.num_prefix_tokens
    np.testing.assert_allclose(tokens[0, prefix:], whole, atol=1e-4)
    moved = np.linalg.norm(tokens[1] - tokens[0], axis=-1)
    assert moved[prefix + 3] < 1e-5  # It still hears all.
    assert np.delete(moved[prefix:], 3).min() > 1e-4
    mean = (tokens[1] - tokens[0])[prefix:].mean(0)
    np.testing.assert_allclose(pooled[1] - pooled[0], mean, atol=1e-5)


# Numbers.


def test_sums_of_known_sets():
    impact = np.zeros(SHAPE)
    impact[0, 0, 0, 1], impact[1, 1, 2, 3] = 3, 4
    cut = impact > 0
    got = groups.sums([cut, ~cut], impact, 2 * impact, 3 * impact)
    assert got == {
        "sum of propagated impact": [7, 0],
        "root sum of squared impact": [5, 0],
        "sum of knockout impact": [14, 0],
        "sum of attention": [21, 0],
    }


def test_ratios_leave_out_sets_that_move_nothing():
    numbers = groups.Numbers([], [])
    real = np.array([0.0, 1.0, 2.0, 4.0])
    predicted = {name: np.arange(4.0) for name in PREDICTORS} | {FIXED[0]: 2 * real}
    numbers.add(predicted, real)
    assert numbers.correlation[0][0] == pytest.approx(1)
    # 1 / 1, 2 / 2 and 3 / 4 for the others.
    np.testing.assert_allclose(numbers.ratio[0], [2, 1, 1, 1, 1, 1, 1, 1])
    numbers.add(predicted, np.zeros(4))
    assert np.isnan(numbers.ratio[1]).all()
    assert np.isnan(numbers.correlation[1]).all()


# The protocol.


CONFIG = ml_collections.ConfigDict({"num_sets": 2})


@pytest.fixture(scope="module")
def faint(case):
    """The case with attention that writes little, so that first order is all."""
    model = ViT(
        num_classes=0,
        image_size=case.subject.model.image_size,
        patch_size=(4, 4),
        width=16,
        depth=3,
        mlp_dim=16,
        num_heads=2,
        num_registers=1,
    )
    params = noisy_params(model)
    for layer in range(model.depth):
        name = f"blocks_{layer}"
        attention = params[name]["attention"]
        out = jax.tree.map(lambda leaf: 0.01 * leaf, attention["out"])
        params[name] = params[name] | {"attention": attention | {"out": out}}
    subject = Subject(model, params, labelled=False, num_probes=64)
    return Case(subject, case.images[:1], None, case.key)


def test_the_effect_of_the_set_is_right_where_little_is_cut(faint):
    protocol = Groups(faint.subject, CONFIG)
    outcomes = protocol.measure(faint, 1)
    signed = PREDICTORS.index(LAYERS[0])
    correlation = outcomes["correlation"][0]
    assert correlation.shape == (len(SCOPES), len(SHARES), len(PREDICTORS))
    assert correlation[..., signed].min() > 0.9
    assert correlation[..., signed].mean() > 0.97
    sums = correlation[..., len(FIXED + LAYERS) :]
    assert correlation[..., signed].mean() > sums.mean((0, 1)).max()
    # In one layer there is nothing to add.
    for own in range(len(FIXED)):
        np.testing.assert_allclose(correlation[0, :, own], correlation[0, :, signed])
    ratio = outcomes["ratio"][0, :, :, IN_UNITS.index(LAYERS[0])]
    np.testing.assert_allclose(ratio, 1, atol=0.15)


def test_repair_is_chosen_by_the_other_images():
    correlation = np.zeros((3, 1, 1, len(PREDICTORS)))
    correlation[:, 0, 0, :3] = [[0.1, 0.9, 0.2], [0.1, 0.4, 0.5], [0.1, np.nan, 0.6]]
    correlation[..., -1] = 1  # No exponent.
    chosen = groups.chosen_repair(correlation)
    # By the second and third; by the first and third; by the first two.
    np.testing.assert_array_equal(chosen[:, 0, 0], [2, 1, 1])
    np.testing.assert_array_equal(groups.chosen_repair(correlation[:1]), 0)


def test_summary_takes_what_was_chosen(case, estimate):
    shape = (3, len(SCOPES), len(SHARES))
    correlation = np.zeros((*shape, len(PREDICTORS)))
    ratio = np.ones((*shape, len(IN_UNITS)))
    correlation[..., 2], ratio[..., 2] = 0.5, 7
    outcomes = {"correlation": correlation, "ratio": ratio}
    summary = Groups(case.subject, CONFIG).summarize(outcomes, estimate)
    assert summary["correlation"]["all layers"][OWN]["0.1"]["mean"] == 0.5
    assert summary["ratio"]["all layers"][OWN]["0.1"]["mean"] == 7


def test_an_image_does_not_depend_on_those_after_it(case):
    protocol = Groups(case.subject, CONFIG)
    one, two = (protocol.measure(case, count) for count in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), one, two)


def test_summary_tables_and_figure_name_what_they_show(case, estimate):
    protocol = Groups(case.subject, CONFIG)
    shape = (4, len(SCOPES), len(SHARES))
    correlation = np.zeros((*shape, len(PREDICTORS)))
    ratio = np.ones((*shape, len(IN_UNITS)))
    correlation[:, 1, 2, PREDICTORS.index("sum of attention")] = 0.5
    ratio[:, 0, 4, 3] = 40
    summary = protocol.summarize({"correlation": correlation, "ratio": ratio}, estimate)
    by_scope = summary["correlation"]
    assert by_scope["all layers"]["sum of attention"]["0.1"]["mean"] == 0.5
    assert by_scope["one layer"]["sum of attention"]["0.1"]["mean"] == 0
    assert summary["ratio"]["one layer"][IN_UNITS[3]]["0.5"]["mean"] == 40
    text = "\n".join(protocol.tables(summary, 4))
    assert "**Groups**, 4 images" in text
    assert "| 1 % | 5 % | 10 % | 25 % | 50 % |" in text
    ((name, _),) = protocol.figures(summary)
    assert name == "groups"
