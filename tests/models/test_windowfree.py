"""Learned fields against their definition, written out pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.attention import DROPPED
from wf_vit.models.controls import StaticFieldViT
from wf_vit.models.learned_fields import gaussians_of, make_fields, raw_width
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import FieldConfig, PredictedFields, WindowFreeViT

GRID = (3, 5)


def random_gaussians(seed=0):
    """Fields of all sizes; some lie beside their patch, and some beside the grid."""
    centres, widths = jax.random.normal(jax.random.key(seed), (2, 2, 4, 15, 2))
    return jnp.concatenate([2 * centres, jnp.exp(0.5 * widths)], -1)


def log_membership_by_definition(gaussians):
    """The formula of the module's docstring, in float64, one pair at a time."""
    x, y, sx, sy = np.moveaxis(np.asarray(gaussians, np.float64), -1, 0)
    result = np.zeros((*x.shape, x.shape[-1]))
    for i, (yi, xi) in enumerate(np.ndindex(*GRID)):
        for j, (yj, xj) in enumerate(np.ndindex(*GRID)):
            dx, dy = xj - xi, yj - yi
            across = (dx - x[..., i]) / sx[..., i]
            down = (dy - y[..., i]) / sy[..., i]
            result[..., i, j] = -(across**2) / 2 - down**2 / 2
    return result


def test_membership_follows_its_definition():
    gaussians = random_gaussians()
    fields = make_fields(gaussians, grid=GRID)
    expected = log_membership_by_definition(gaussians)
    np.testing.assert_allclose(fields.log_membership(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fields.area(), np.exp(expected).mean(-1), rtol=1e-4)


def test_fields_of_some_patches_are_theirs_among_all():
    gaussians = random_gaussians()
    whole = make_fields(gaussians, grid=GRID).log_membership()
    kept = jnp.asarray([[14, 3, 0, 7], [2, 9, 1, 11]])
    own = jnp.take_along_axis(gaussians, kept[:, None, :, None], axis=2)
    some = make_fields(own, grid=GRID, patches=kept).log_membership()
    for image, rows in enumerate(kept):
        expected = whole[image][:, rows[:, None], rows]
        np.testing.assert_allclose(some[image], expected, rtol=1e-5, atol=1e-6)


def test_membership_is_one_half_where_figures_draw_the_border():
    """One patch and three patches away, to the right and down."""
    gaussian = jnp.asarray([0.0, 0.0, 1 / geometry.HALF, 2 / geometry.HALF])
    fields = make_fields(jnp.broadcast_to(gaussian, (1, 1, 15, 4)), grid=GRID)
    membership = np.exp(fields.log_membership())[0, 0, 0]
    np.testing.assert_allclose(membership[[1, 2 * GRID[1]]], 0.5, rtol=1e-5)


def test_hard_fields_drop_keys_but_never_the_patch_itself():
    gaussians = random_gaussians().at[:, 0].set(jnp.asarray([2.0, 2.0, 1.0, 1.0]))
    soft = make_fields(gaussians, grid=GRID)
    hard = make_fields(gaussians, grid=GRID, threshold=0.3)
    log_m, cut = soft.log_membership(), hard.log_membership()
    own = np.broadcast_to(np.eye(15, dtype=bool), log_m.shape)
    assert np.exp(log_m)[:, 0][own[:, 0]].max() < 0.3
    kept = (np.exp(log_m) >= 0.3) | own
    np.testing.assert_allclose(cut[kept], log_m[kept])
    assert np.all(cut[~kept] == np.float32(DROPPED))
    weights = jax.nn.softmax(hard.attention_bias(num_prefix_tokens=0))
    assert np.all(weights[~kept] == 0)
    np.testing.assert_array_equal(hard.area(), soft.area())


def test_prefix_tokens_see_and_are_seen_by_everything():
    fields = make_fields(random_gaussians(), grid=GRID)
    bias = fields.attention_bias(num_prefix_tokens=2)
    assert bias.shape == (2, 4, 17, 17)
    assert np.all(bias[..., :2, :] == 0)
    assert np.all(bias[..., :2] == 0)
    np.testing.assert_array_equal(bias[..., 2:, 2:], fields.log_membership())


def test_prediction_starts_around_the_patch_with_the_extents_of_the_heads():
    config = FieldConfig(extents=(1.0, 4.0, 1e3))
    module = PredictedFields(num_heads=6, grid=GRID, config=config, layer=0)
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))  # One prefix token.
    fields = module.apply(module.init(jax.random.key(1), x), x)
    assert fields.gaussians.shape == (2, 6, 15, 4)
    assert not np.any(fields.gaussians[..., :2])
    for head, extent in enumerate([1.0, 4.0, 1e3] * 2):
        reach = geometry.HALF * fields.gaussians[:, head, :, 2:]
        np.testing.assert_allclose(reach, extent, rtol=1e-5)


def test_fields_of_later_layers_start_wider_until_they_reach_across_the_grid():
    config = FieldConfig(extents=(1.0, 1.5, 9.0, 0.0), growth=2.0)
    starts = [config.extents_of(4, GRID, layer) for layer in range(3)]
    wide = geometry.HALF * 4 * 10**2.5
    np.testing.assert_allclose(
        starts, [[1, 1.5, 9, wide], [3, 3.5, 9, wide], [4, 4, 9, wide]]
    )


def test_every_patch_and_head_predicts_its_own_field():
    module = PredictedFields(num_heads=2, grid=GRID, config=FieldConfig(), layer=0)
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))  # One prefix token.
    variables = module.init(jax.random.key(1), x)
    # The kernel starts at zero, so that fields start as configured.
    variables = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), variables
    )
    base = module.apply(variables, x).gaussians
    assert np.all(np.abs(base[:, 0] - base[:, 1]).max(-1) > 0)
    changed = module.apply(variables, x.at[1, 1 + 4].add(1.0)).gaussians != base
    where = np.zeros((2, 15), bool)
    where[1, 4] = True
    np.testing.assert_array_equal(changed.any((1, 3)), where)


def test_an_extent_of_zero_covers_the_grid_and_still_has_a_gradient():
    config = FieldConfig(extents=(0.0,))
    module = PredictedFields(num_heads=1, grid=(3, 28), config=config, layer=0)
    x = jax.random.normal(jax.random.key(0), (1, 84, 4))
    variables = module.init(jax.random.key(1), x)

    def lowest(variables):
        return module.apply(variables, x).log_membership().min()

    value, gradient = jax.value_and_grad(lowest)(variables)
    assert -2e-5 < value < -4e-6
    assert np.abs(gradient["params"]["gaussians"]["bias"]).max() > 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extents": ()}, "expected one or more numbers from 0"),
        ({"extents": (-1.0,)}, "expected one or more numbers from 0"),
        ({"growth": -0.5}, "expected a number from 0"),
        ({"threshold": 1.0}, "below 1"),
    ],
)
def test_impossible_fields_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        FieldConfig(**options)


def test_raw_numbers_give_widths_back_and_centres_in_widths():
    widths = np.array([0.26, 0.5, 1.5, 30.0, 1e4])
    logs = raw_width(widths)
    raw = np.stack([0 * logs + 0.5, 0 * logs - 2, logs, logs], -1)
    got = gaussians_of(jnp.asarray(raw, jnp.float32))
    expected = np.stack([0.5 * widths, -2 * widths, widths, widths], -1)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_no_width_falls_below_the_least_one():
    raw = jnp.asarray([[0.0, 0.0, -5.0, -1e6]])
    np.testing.assert_allclose(gaussians_of(raw)[0, 2:], 0.25, rtol=1e-5)
    narrow = FieldConfig(extents=(0.01,), growth=0.0)
    assert np.isfinite(narrow.start(2, GRID, 3)).all()


def test_a_field_moves_and_widens_towards_what_it_covers():
    """A patch that gains from its right-hand neighbour tends to the right."""
    target = geometry.distances(GRID).argmin(0)[7] + 1

    def gain(raw):
        fields = make_fields(gaussians_of(raw), grid=GRID)
        return fields.log_membership()[0, 0, 7, target]

    gradient = jax.grad(gain)(jnp.zeros((1, 1, 15, 4)))[0, 0, 7]
    x, y, width, height = gradient
    assert x > 0
    assert width > 0
    assert y == height == 0


@pytest.mark.parametrize("kept", [None, [[14, 3, 0, 7], [2, 9, 1, 11]]])
def test_heads_report_where_they_listen_and_how_widely(kept):
    """By hand: mean and variance of the places, of a patch and of a prefix token."""
    gaussians = random_gaussians()[:, :, : 15 if kept is None else 4]
    patches = None if kept is None else jnp.asarray(kept)
    tokens = 2 + gaussians.shape[2]
    rng = np.random.default_rng(0)
    logits = jnp.asarray(np.log(rng.dirichlet(np.ones(tokens), size=(2, 4, tokens))))
    zeros = jnp.zeros((2, 4, tokens, 3))
    # Fields that reach everything, so that the logits alone decide.
    wide = jnp.concatenate([0 * gaussians[..., :2], 0 * gaussians[..., 2:] + 1e4], -1)
    fields = make_fields(wide, grid=GRID, patches=patches)
    for record in (False, True):
        _, _, moments = fields.attend(zeros, zeros, zeros, logits, record)
        got = jnp.swapaxes(fields.report(moments), 1, 2)
        check_report(got, np.exp(logits), kept)


def check_report(got, attention, kept):
    tokens = attention.shape[-1]
    assert got.shape == (2, tokens, 4, 4)
    whole = geometry.coordinates(GRID)
    for image, head, token in [(0, 0, 2), (1, 3, 5), (1, 2, 0)]:
        places = whole if kept is None else whole[kept[image]]
        own = whole.mean(0) if token < 2 else places[token - 2]
        heard = attention[image, head, token, 2:]
        heard = heard / heard.sum()
        mean = heard @ places
        variance = heard @ (places - mean) ** 2
        expected = [*(mean - own) / whole.std(0), *np.log(variance + 0.1)]
        np.testing.assert_allclose(
            got[image, token, head], expected, rtol=1e-4, atol=1e-5
        )


SIZES = {
    "num_classes": 3,
    "image_size": (16, 24),
    "patch_size": (4, 4),
    "width": 12,
    "depth": 2,
    "mlp_dim": 24,
    "num_heads": 2,
    "cls_token": False,
    "pool": "mean",
    "positions": "sincos",
}


@pytest.mark.parametrize("model_class", [WindowFreeViT, StaticFieldViT])
def test_fields_scale_with_the_grid(model_class):
    """Of an image of one colour, whose patches differ by nothing but their place."""
    model = model_class(**SIZES)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 24, 3)))["params"]
    finer = model.at_size((32, 48))
    assert finer.trained_patches == 24
    assert finer.at_size((64, 96)).trained_patches == 24
    found = [
        m.apply({"params": params}, jnp.ones((1, *m.image_size, 3)))[1]["fields"][0]
        for m in (model, finer)
    ]
    small, large = (fields.gaussians[0, :, 0] for fields in found)
    np.testing.assert_allclose(large, 2 * small, rtol=1e-5)
    # Where it was trained, and on as many patches, nothing is scaled.
    for same in (finer.at_size((16, 24)), finer.at_size((24, 16))):
        fields = same.apply({"params": params}, jnp.ones((1, *same.image_size, 3)))[1]
        np.testing.assert_allclose(fields["fields"][0].gaussians[0, :, 0], small)


def test_reports_are_in_units_of_the_grid_that_fields_were_learned_on():
    """What is spread over the whole grid is reported alike, coarse or fine."""

    def report(side, scale):
        grid = (side, side)
        gaussians = jnp.ones((1, 1, side**2, 4))
        fields = make_fields(gaussians, grid=grid, scale=scale)
        place = geometry.coordinates(grid) - (side - 1) / 2
        square = (place**2).mean(0)
        moments = jnp.asarray([*square, 0.0, 0.0, 1.0], jnp.float32)
        return fields.report(jnp.broadcast_to(moments, (1, 1, side**2, 5)))[0, 0]

    coarse, fine = report(16, 1.0), report(32, 2.0)
    np.testing.assert_allclose(fine[0, 2:], coarse[0, 2:], atol=0.01)
    np.testing.assert_allclose(fine[0, :2], coarse[0, :2], rtol=0.05)
    assert report(32, 1.0)[0, 2] - fine[0, 2] > 1.3


def test_the_trained_grid_is_part_of_the_model():
    model = WindowFreeViT(**SIZES).at_size((32, 48))
    options = registry.to_json(model)
    assert registry.from_json(options) == model
    # A run of before it was kept.
    del options["trained_patches"]
    assert registry.from_json(options).trained_patches is None
    with pytest.raises(UsageError, match="trained_patches is 0"):
        registry.from_json(options | {"trained_patches": 0})
    plain = registry.rebuild(model, registry.ModelConfig("vit", dtype="float32"))
    assert type(plain) is ViT
    kept = registry.rebuild(model, registry.ModelConfig("windowfree", dtype="float32"))
    assert kept.trained_patches == 24
