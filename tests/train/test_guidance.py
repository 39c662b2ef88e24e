"""Guidance against its definition, and what a step makes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import slow
from tests.networks import apply
from tests.train.taught import (
    MEAN,
    STD,
    guide,
    images_for,
    keys,
    random_rows,
    target,
    taught_by,
    vit,
)
from wf_vit import grid as geometry
from wf_vit import indicators
from wf_vit.data.config import DataInfo
from wf_vit.errors import UsageError
from wf_vit.models import registry
from wf_vit.models.learned_fields import gaussians_of, make_fields
from wf_vit.models.registry import ModelConfig
from wf_vit.models.windowfree import FieldViT
from wf_vit.train import guidance as guiding
from wf_vit.train.config import resolve
from wf_vit.train.teacher import Teacher

INFO = DataInfo(tuple("0123456789"), {"train": 64}, (8, 8))
GRID = (3, 5)


def random_fields(seed, heads=4, threshold=0.0):
    numbers = jax.random.uniform(jax.random.key(seed), (2, heads, 15, 4))
    return make_fields(0.5 + 2 * numbers, grid=GRID, threshold=threshold)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_coverage_and_area_follow_their_definition(threshold):
    """Over every pair; in hard mode, of the soft membership."""
    rows = random_rows(0, 2, 2, 15, 15)
    fields = {3: random_fields(2, threshold=threshold), 1: random_fields(1)}
    soft = [np.exp(random_fields(seed).log_membership()).mean(1) for seed in (1, 2)]
    covered, area = guiding.coverage_and_area(fields, rows)
    np.testing.assert_allclose(
        covered,
        np.mean([(r * m).sum(-1).mean() for r, m in zip(rows, soft, strict=True)]),
        rtol=1e-5,
    )
    np.testing.assert_allclose(area, np.mean(soft), rtol=1e-5)


def test_each_head_can_have_a_target_of_its_own():
    rows, fields = random_rows(0, 1, 2, 4, 15, 15), random_fields(1)
    covered, area = guiding.coverage_and_area({0: fields}, rows)
    membership = np.exp(fields.log_membership())
    expected = (rows[0] * membership).sum(-1).mean()
    np.testing.assert_allclose(covered, expected, rtol=1e-5)
    np.testing.assert_allclose(area, membership.mean(), rtol=1e-5)
    same = jnp.repeat(rows[:, :, :1], 4, axis=2)
    fused, _ = guiding.coverage_and_area({0: fields}, rows[:, :, 0])
    apart, _ = guiding.coverage_and_area({0: fields}, same)
    np.testing.assert_allclose(fused, apart, rtol=1e-5)


@pytest.mark.parametrize("heads", [(), (4,)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_divergence_follows_its_definition(heads, prefix):
    """In float64, of the attention between patches alone."""
    rows = random_rows(0, 2, 2, *heads, 15, 15)
    tokens = 15 + prefix
    records = {
        layer: {"attention": random_rows(layer, 2, 4, tokens, tokens)}
        for layer in (3, 1)
    }
    got = guiding.divergence(records, rows, prefix)
    expected = []
    for place, layer in enumerate((1, 3)):
        own = np.asarray(records[layer]["attention"], np.float64)[..., prefix:, prefix:]
        own = own if heads else own.mean(1)
        own = own / own.sum(-1, keepdims=True)
        target = np.asarray(rows[place], np.float64)
        expected.append((target * np.log(target / own)).sum(-1).mean())
    np.testing.assert_allclose(got, np.mean(expected), rtol=1e-4)
    itself = jnp.stack([records[layer]["attention"] for layer in (1, 3)])
    itself = indicators.interaction_indicator(
        itself, num_prefix_tokens=prefix, per_head=bool(heads), normalize=True
    )
    assert abs(guiding.divergence(records, itself, prefix)) < 1e-6


def test_divergence_from_keys_that_are_dropped_is_finite():
    """Hard fields give them no attention at all."""

    def loss(logits):
        attention = jax.nn.softmax(jnp.where(jnp.eye(15) > 0, logits, -1e9))
        return guiding.divergence({0: {"attention": attention}}, rows, 0)

    rows = random_rows(0, 1, 2, 4, 15, 15)
    value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 4, 15, 15)))
    assert 5 < value < -np.log(1e-9)
    assert np.all(np.isfinite(gradient))


def test_fields_of_one_image_for_all_are_broadcast():
    rows = random_rows(0, 1, 2, 15, 15)
    whole = random_fields(1)
    same = jax.tree.map(lambda a: jnp.repeat(a[:1], 2, axis=0), whole)
    one = jax.tree.map(lambda a: a[:1], whole)
    got = guiding.coverage_and_area({0: one}, rows)
    np.testing.assert_allclose(
        got, guiding.coverage_and_area({0: same}, rows), rtol=1e-6
    )


def test_fields_learn_to_reach_their_target_and_no_farther():
    """Each patch is told to look two columns away."""
    row, column = np.divmod(np.arange(15), 5)
    aim = np.where(column < 3, 2, -2)
    rows = jax.nn.one_hot(5 * row + column + aim, 15)[None, None]

    def loss(raw):
        fields = make_fields(gaussians_of(raw), grid=GRID)
        covered, area = guiding.coverage_and_area({0: fields}, rows)
        return 1 - covered + area

    step = jax.jit(lambda raw: raw - 5 * jax.grad(loss)(raw))
    raw = jnp.zeros((1, 1, 15, 4))  # Around the patch, with a width of about 1.
    for _ in range(1000):
        raw = step(raw)
    x, y, width, height = np.moveaxis(gaussians_of(raw)[0, 0], -1, 0)
    np.testing.assert_allclose(x, aim, atol=0.5)
    np.testing.assert_allclose(y, 0, atol=0.1)
    np.testing.assert_array_less(width, 1)
    np.testing.assert_array_less(height, 0.3)


def test_no_array_has_heads_and_pairs_of_patches():
    rows, fields = random_rows(0, 1, 2, 15, 15), random_fields(1)
    jaxpr = jax.make_jaxpr(guiding.coverage_and_area)({0: fields}, rows)
    sizes = [np.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
    assert max(sizes) < 2 * 4 * 15 * 15


def test_untaught_targets_are_the_controls_they_say():
    student, images = vit(), images_for(vit())
    near = target(guide(indicator="distance"), None, images, student)
    expected = 1 / (1 + geometry.distances(GRID))
    expected = expected / expected.sum(-1, keepdims=True)
    for layer, image in np.ndindex(3, 2):
        np.testing.assert_allclose(near[layer, image], expected, rtol=1e-5)
    apart = guide(indicator="random", per_head=True)
    apart = target(apart, None, images, student)
    assert apart.shape == (3, 2, 2, 15, 15)
    assert np.abs(apart[:, :, 0] - apart[:, :, 1]).max() > 1e-3
    random = target(guide(indicator="random"), None, images, student)
    np.testing.assert_allclose(random.sum(-1), 1, rtol=1e-5)
    assert np.abs(random[0, 0] - random[0, 1]).max() > 1e-3
    assert np.abs(random[0, 0] - random[1, 0]).max() > 1e-3
    again = target(guide(indicator="random"), None, images, student)
    np.testing.assert_array_equal(random, again)
    assert target(guide(), None, images, student) is None


def test_weight_falls_linearly_to_zero_and_stays():
    weights = [guide().weight_at(jnp.asarray(step)) for step in (0, 5, 10, 20)]
    np.testing.assert_allclose(weights, [2, 1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (5, 0.5), (10, 0.0)])
def test_the_loss_is_weighted_and_the_teacher_rests_when_it_is_over(step, share):
    student = vit()
    guidance, params = taught_by(student, "mean")
    fields = {layer: random_fields(layer) for layer in range(3)}
    images = images_for(student)
    loss, metrics = guiding.guide(
        guidance,
        {"fields": fields},
        jnp.asarray(step),
        params,
        images,
        keys(),
        student=student,
        mean=MEAN,
        std=STD,
    )
    rows = target(guidance, params, images, student)
    covered, area = guiding.coverage_and_area(fields, rows)
    expected = 2 * share * (1 - covered + 0.3 * area)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["guidance_loss"], expected, rtol=1e-4)
    shown = covered if share else 0
    np.testing.assert_allclose(metrics["field_coverage"], shown, rtol=1e-4)
    alone, _ = guiding.guide(
        dataclasses.replace(guidance, teacher=None),
        {"fields": fields},
        jnp.asarray(step),
        None,
        images,
        keys(),
        student=student,
        mean=MEAN,
        std=STD,
    )
    np.testing.assert_allclose(alone, 2 * share * 0.3 * area, rtol=1e-5)


@pytest.mark.parametrize(
    ("step", "share", "per_head"),
    [(5, 0.5, True), (10, 0.0, False), slow(5, 0.5, False), slow(10, 0.0, True)],
)
def test_attention_is_taught_with_the_weight_of_the_step(step, share, per_head):
    student = vit(num_registers=2)
    guidance, params = taught_by(student, "mean", match="attention", per_head=per_head)
    images = images_for(student)
    own = registry.init_params(student, 5)
    _, outputs = apply(student, own, images, record=True)
    normal = {"mean": MEAN, "std": STD}
    loss, metrics = guiding.guide(
        guidance,
        outputs,
        jnp.asarray(step),
        params,
        images,
        keys(),
        student=student,
        **normal,
    )
    rows = target(guidance, params, images, student)
    apart = guiding.divergence(outputs["records"], rows, 3)
    assert apart > 1e-3
    np.testing.assert_allclose(loss, 2 * share * apart, rtol=1e-4)
    np.testing.assert_allclose(metrics["guidance_loss"], loss)
    shown = apart if share else 0
    np.testing.assert_allclose(metrics["attention_divergence"], shown, rtol=1e-4)


def test_a_config_becomes_guidance(digits_config):
    training = resolve(digits_config, INFO)
    assert training.teacher_params is None
    guidance = training.objective.guidance
    assert guidance.teacher is None
    assert (guidance.weight, guidance.duration) == (0.5, 3)
    assert guidance.indicator == "random"
    digits_config.guidance.weight = 0.0
    assert resolve(digits_config, INFO).objective.guidance is None


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("windowfree", {"weight": 0.0, "teacher": "somewhere"}, "its weight is 0"),
        ("vit", {"match": "fields"}, "a ViT has no fields to guide: set"),
        ("windowfree", {"match": "values"}, "one of 'fields', 'attention'"),
        ("windowfree", {"indicator": "mean"}, "attention has no area"),
        ("windowfree", {"indicator": "max_"}, "one of 'mean'"),
        ("windowfree", {"teacher": "nowhere.npz"}, "nowhere"),
    ],
)
def test_contradictions_are_named(digits_config, model, options, message):
    digits_config.model.name = model
    digits_config.guidance.update(options)
    with pytest.raises(UsageError, match=message):
        resolve(digits_config, INFO)


def test_a_teacher_and_a_target_without_one_contradict():
    with pytest.raises(UsageError, match="needs no teacher"):
        guide(indicator="random", teacher=Teacher(vit(), MEAN, STD))


def test_models_with_guidable_fields_are_those_listed():
    for name in registry.MODELS:
        config = ModelConfig(name=name, variant="mu/4")
        model = registry.create_model(config, num_classes=2, image_size=8)
        images = jnp.zeros((1, 8, 8, 3))
        _, out = jax.eval_shape(
            lambda x, m=model: m.init_with_output(jax.random.key(0), x)[0], images
        )
        assert bool(out["fields"]) == isinstance(model, FieldViT)


@pytest.mark.parametrize(("area_weight", "sign"), [(0.5, -1), (1.0, 0), (2.0, 1)])
def test_an_even_target_widens_fields_only_below_weight_one(area_weight, sign):
    """Covering a patch pays if its share exceeds ``area_weight / P``."""
    rows = jnp.full((1, 1, 15, 15), 1 / 15)

    def loss(gaussians):
        fields = make_fields(gaussians, grid=GRID)
        covered, area = guiding.coverage_and_area({0: fields}, rows)
        return 1 - covered + area_weight * area

    gradient = jax.grad(loss)(jnp.ones((1, 1, 15, 4)))[..., 2:]
    np.testing.assert_array_equal(np.sign(np.round(gradient.mean(), 6)), sign)
