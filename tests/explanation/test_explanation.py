"""The arrays of an image: against the library called by hand, and in their file."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import slow
from tests.explanation.example import GRID, SIZE, VIT, arrays_of, make_config, noise
from tests.networks import random_params
from tests.runs import small_winft
from wf_vit import fields, figures, measure
from wf_vit import indicators as matrices
from wf_vit.errors import UsageError
from wf_vit.explanation import draw, images
from wf_vit.explanation.explanation import Explanation, source_of
from wf_vit.explanation.measuring import Settings, explain_batch
from wf_vit.models import parameters, pretrained
from wf_vit.models.pretrained import Pretrained
from wf_vit.models.pretrained.preprocess import HALF, ImageFormat, Preprocess
from wf_vit.selection import run_to, select_patches

KEYS = jax.random.split(jax.random.key(0), 1)


def test_the_arrays_are_what_the_library_computes(run, photographs):
    loaded = pretrained.load(VIT, image_size=SIZE)
    explanation = Explanation.load(run / "images/b")
    arrays = arrays_of(run, "b")
    photograph = loaded.preprocess.fit(images.read(photographs / "b.png"))
    np.testing.assert_array_equal(arrays["photograph"], photograph)
    prepared = loaded.preprocess.normalize(photograph[None])
    recorded = measure.record(loaded.model, loaded.params, prepared)
    options = {"num_prefix_tokens": 1}
    attention, values = recorded.attention[:, 0], recorded.values[:, 0]
    propagated, _ = measure.propagate(
        loaded.model,
        loaded.params,
        prepared,
        target="tokens",
        num_probes=4,
        # Of its own, whatever the others are.
        key=jax.random.fold_in(jax.random.key(0), int(arrays["source"].item()[:8], 16))[
            None
        ],
        prefix_tokens=True,
    )
    impact = propagated.impact[:, 0]
    expected = {
        "mean": attention.mean(1),
        "knockout": matrices.knockout_impact(
            attention,
            values,
            *parameters.output_projection(loaded.model, loaded.params),
            num_prefix_tokens=0,
        ),
        "propagated": impact,
    }
    bound = 1 / 255 + 1 / (4 * 255**2)
    assert set(explanation.impact) == set(expected)
    for name, exact in expected.items():
        # The file's rounding, relative to the row's largest.
        error = np.abs(explanation.impact[name] - exact) / exact.max(-1, keepdims=True)
        assert error.max() < bound + 2e-4
    mass = make_config().mass
    field = fields.responsive_field(impact[:, 1:, 1:], GRID, mass=mass)
    for part, array in field._asdict().items():
        np.testing.assert_allclose(
            getattr(explanation.field, part), array, atol=2e-3, err_msg=part
        )
    np.testing.assert_allclose(
        arrays["discriminability"],
        fields.discriminability(impact[:, 1:, 1:]),
        rtol=2e-4,
    )
    assert explanation.prefix == ("CLS",)
    np.testing.assert_allclose(
        explanation.prefix_attention, attention[:, :, :1, 1:], rtol=1e-5
    )
    np.testing.assert_allclose(
        explanation.components,
        figures.components_of(recorded.tokens[0, 1:]),
        atol=1e-3,
    )
    np.testing.assert_allclose(
        arrays["attention_distance"],
        matrices.mean_attention_distance(attention, grid=GRID, **options),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        arrays["relative_error"], propagated.relative_error[:, 0], rtol=1e-3
    )


def test_what_is_saved_is_loaded(run):
    explanation = Explanation.load(run / "images/a.png")
    assert explanation.indicator == "propagated"
    explanation.save_data(run / "copy", source="digest")
    assert source_of(run / "copy") == "digest"
    again = Explanation.load(run / "copy")
    # Coding what was decoded changes a number by rounding once more, if at all.
    same = functools.partial(np.testing.assert_allclose, rtol=2e-2, atol=1e-6)
    for part in dataclasses.fields(Explanation):
        first, second = (getattr(e, part.name) for e in (explanation, again))
        if part.name in ("indicator", "prefix", "model", "mass"):
            assert first == second
        else:
            jax.tree.map(same, first, second)


@pytest.mark.parametrize("count", [3, 4, 25])
def test_impact_of_the_largest_number_is_loaded(run, tmp_path, count):
    explanation = Explanation.load(run / "images/a.png")
    name = explanation.indicator
    large = np.zeros_like(explanation.impact[name])
    large[..., :count] = np.finfo(np.float32).max
    dataclasses.replace(explanation, impact={name: large}).save_data(tmp_path)
    again = Explanation.load(tmp_path).impact[name]
    np.testing.assert_allclose(again, large, rtol=1e-4)
    assert again.dtype == np.float32


def test_discriminability_of_the_largest_number_is_drawn(run):
    explanation = Explanation.load(run / "images/a.png")
    (mark,) = draw.image_drawings(explanation)["interactions"]().axes[0].lines
    values = explanation.discriminability
    large = values / values.max() * np.finfo(np.float32).max
    explanation = dataclasses.replace(explanation, discriminability=large)
    (again,) = draw.image_drawings(explanation)["interactions"]().axes[0].lines
    np.testing.assert_array_equal(again.get_xydata(), mark.get_xydata())


@pytest.mark.parametrize("target", [slow("tokens"), "class"])
def test_what_the_model_can_do_without_is_found_and_kept(tmp_path, target):
    found, loaded, images = explained(target, removal=True)
    model, params = loaded.model, loaded.params
    order, patches = found.removal.order, np.prod(model.grid)
    assert found.removal.layers.tolist() == [0, 1]
    _, full = model.apply({"params": params}, images)
    for place, layer in enumerate((0, 1)):
        chosen = select_patches(
            model,
            params,
            images,
            layer,
            key=KEYS,
            removed=0.75,
            target="pooled" if target == "class" else target,
        )
        np.testing.assert_array_equal(order[place], chosen[0])
        # Really cut in place of gathered out: the same for all that stay.
        removed = round(0.75 * patches)
        stays = np.flatnonzero(order[place] > removed)
        tokens = run_to(params, images, model=model, layer=layer)
        bias = np.where(order[place] > removed, 0.0, -np.inf)
        bias = np.broadcast_to(bias, (1, 1, patches, patches))
        tokens, _ = model.apply(
            {"params": params},
            tokens,
            start=layer,
            bias=[jnp.asarray(bias, jnp.float32)] * model.depth,
            method="encode",
        )
        _, out = model.apply({"params": params}, tokens, method="readout")
        pooled = out["tokens"][0, stays].mean(0)
        cosine = jnp.vdot(pooled, full["pooled"][0]) / (
            jnp.linalg.norm(pooled) * jnp.linalg.norm(full["pooled"][0])
        )
        np.testing.assert_allclose(found.removal.cosine[place, 2], cosine, atol=1e-4)
    found.save_data(tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal, Explanation.load(tmp_path).removal, found.removal
    )
    assert "removal" in draw.image_drawings(found)
    assert "removal" not in draw.image_drawings(explained("tokens")[0])


def test_a_file_of_an_earlier_version_is_an_error(tmp_path):
    np.savez(tmp_path / "data.npz", photograph=np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(UsageError, match=r"format 1, expected 3.*new --workdir"):
        Explanation.load(tmp_path)


def explained(target, classes=5, **others):
    """A classifier's explanation of some noise, by the effect on a logit."""
    model = small_winft(num_classes=classes, image_size=SIZE)
    params = random_params(model)
    image_format = ImageFormat(*HALF, "bicubic", None)
    names = tuple("abcdefghij"[:classes])
    loaded = Pretrained(model, params, Preprocess(SIZE, image_format), names)
    photograph = noise(*SIZE)[None]
    settings = Settings(("propagated",), target=target, **others)
    (found,) = explain_batch(loaded, photograph, settings, KEYS)
    return found, loaded, jnp.asarray(loaded.preprocess.normalize(photograph))


def test_a_class_is_explained_by_signed_effects(tmp_path):
    found, loaded, images = explained("class")
    logits = measure.record(loaded.model, loaded.params, images).logits[0]
    c = found.class_effect
    assert c.index == int(logits.argmax())
    assert c.name == "abcde"[c.index]
    assert c.probability == pytest.approx(float(jax.nn.softmax(logits)[c.index]))
    effect = measure.propagate_logit(
        loaded.model, loaded.params, images, classes=c.index, prefix_tokens=True
    )[:, 0]
    np.testing.assert_allclose(c.effect, effect, atol=1e-5)
    assert (c.effect < 0).any()
    assert (c.effect > 0).any()
    np.testing.assert_allclose(found.impact["propagated"], np.abs(effect), atol=1e-5)
    assert found.relative_error is None
    np.testing.assert_allclose(c.class_map, c.by_layer.sum(0), rtol=1e-5)
    found.save_data(tmp_path)
    again = Explanation.load(tmp_path).class_effect
    assert (again.index, again.name) == (c.index, c.name)
    np.testing.assert_array_equal(again.class_map, c.class_map)
    largest = np.abs(c.effect).max(-1, keepdims=True)
    assert (np.abs(again.effect - c.effect) <= 0.005 * largest + 1e-9).all()
    # A file of an earlier version does not hold the map: that of the effect it holds.
    with np.load(tmp_path / "data.npz") as file:
        arrays = {key: file[key] for key in file if key != "class/by_layer"}
    np.savez(tmp_path / "data.npz", **arrays)
    earlier = Explanation.load(tmp_path).class_effect
    expected = fields.heard(again.effect, len(found.prefix))
    np.testing.assert_allclose(earlier.by_layer, expected, rtol=1e-5)


def test_a_class_is_chosen_by_name_or_by_index():
    assert explained("class:c")[0].class_effect.index == 2
    assert explained("class:3")[0].class_effect.name == "d"
    with pytest.raises(UsageError, match=r"no class 'cat'.*0 to 4.*a, b, c, d, e"):
        explained("class:cat")
    with pytest.raises(UsageError, match="no class '5'"):
        explained("class:5")
    with pytest.raises(UsageError, match="no classification head"):
        explained("class", classes=0)
