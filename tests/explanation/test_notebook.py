"""One line from a model and a picture: what it takes, shows, keeps and refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import wf_vit
from tests.explanation.example import GRID, LAYERS, PATCHES, SIZE, VIT, noise
from wf_vit.errors import UsageError
from wf_vit.explanation.explanation import Explanation
from wf_vit.models import pretrained
from wf_vit.models.pretrained.readers import name_of

QUICK = {"image_size": SIZE, "num_probes": 4}
RNG = np.random.default_rng(3)


def random_attention(*batch, tokens=PATCHES + 1):
    logits = np.exp(2 * RNG.normal(size=(*batch, 2, tokens, tokens)))
    return (logits / logits.sum(-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def explained():
    return wf_vit.explain(VIT, noise(30, 40), heads=True, **QUICK)


def test_a_path_or_a_loaded_model_and_a_picture_are_enough(explained, tmp_path):
    picture = Image.fromarray(noise(30, 40))
    picture.save(tmp_path / "photo.png")
    by_path = wf_vit.explain(str(VIT), tmp_path / "photo.png", **QUICK)
    loaded = pretrained.load(VIT, image_size=SIZE)
    by_model = wf_vit.explain(loaded, picture, **QUICK)
    np.testing.assert_allclose(
        by_path.impact["propagated"], by_model.impact["propagated"], rtol=1e-5
    )
    assert by_path.grid == GRID
    # The photograph's own shape, with about as many patches as the model's square.
    assert wf_vit.explain(loaded, picture, num_probes=4).grid == (4, 6)
    assert wf_vit.explain(loaded, noise(40, 30), num_probes=4).grid == (6, 4)


def test_it_shows_itself(explained):
    text = repr(explained)
    assert len(text) < 500
    assert f"{LAYERS} layers, 4 x 6 patches, by mean, knockout, propagated" in text
    page = explained.page()
    assert page.startswith("<!doctype html>")
    assert len(repr(page)) < 100
    assert page._repr_html_().startswith("<iframe srcdoc=")
    shown = explained._repr_html_()
    assert shown.count("data:image/png;base64,") == 3
    assert explained._repr_png_().startswith(b"\x89PNG")


def test_figures_are_drawn_once_and_named(explained):
    assert {"interactions", "fields", "heads", "class_attention"} <= set(
        explained.figures
    )
    assert explained.figures["fields"] is explained.figures["fields"]
    with pytest.raises(KeyError, match="choose one of interactions"):
        explained.figures["field"]


def test_it_is_saved_as_the_command_does(explained, tmp_path):
    explained.save(tmp_path / "out")
    again = Explanation.load(tmp_path / "out")
    assert set(again.impact) == set(explained.impact)
    assert (tmp_path / "out/page.html").stat().st_size > 10_000
    assert (tmp_path / "out/figures/interactions.pdf").exists()
    heads = tmp_path / "out/figures/heads.png"
    assert heads.exists()
    other = wf_vit.explain(VIT, noise(30, 40), indicators=("mean",), mass=0.9, **QUICK)
    other.save(tmp_path / "out")
    assert not heads.exists()
    # Its page says the same, wherever it comes from.
    loaded = type(other).load(str(tmp_path / "out/data.npz"))
    assert (loaded.mass, loaded.model) == (0.9, other.model)
    assert '"mass": 0.9' in loaded.page()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (
            "hf://timm/vit_small_patch14_dinov2.lvd142m",
            "vit_small_patch14_dinov2.lvd142m",
        ),
        ("runs/rate_0.001", "rate_0.001"),
        (VIT.parent / "deit.pth.tar", "deit"),
        ("B_16.npz", "B_16"),
    ],
)
def test_a_checkpoint_keeps_its_name(source, name):
    assert name_of(source) == name


def test_several_pictures_give_a_list():
    found = wf_vit.explain(VIT, [noise(30, 40), noise(20, 20)], **QUICK)
    assert [type(one).__name__ for one in found] == ["Explained", "Explained"]


@pytest.mark.parametrize("patches", [1, 2])
def test_an_image_of_few_patches_is_drawn(patches):
    tokens = 1 + patches
    attention = np.full((2, 3, tokens, tokens), 1 / tokens, np.float32)
    options = {"num_prefix_tokens": 1, "grid": (1, patches)}
    one = wf_vit.explain(attention, noise(8, 8), **options)
    assert len([one.figures[name] for name in one.figures]) > 5
    assert one.page().startswith("<!doctype html>")


def test_attention_alone_is_explained(tmp_path):
    attention = random_attention(LAYERS)
    options = {"num_prefix_tokens": 1, "grid": GRID}
    one = wf_vit.explain(attention, noise(30, 40), **options)
    np.testing.assert_allclose(one.impact["mean"], attention.mean(1), rtol=1e-5)
    assert one.indicator == "mean"
    # A list of layers with a batch axis, as transformers returns it.
    layers = [random_attention(2) for _ in range(LAYERS)]
    two = wf_vit.explain(layers, [noise(30, 40), noise(8, 8)], **options)
    np.testing.assert_allclose(
        two[1].impact_heads["mean"], np.stack(layers)[:, 1], rtol=1e-6
    )
    # In half precision it is what float32 makes of the rounded weights.
    half = jnp.asarray(attention, jnp.bfloat16)
    for rounded in (attention.astype(np.float16), half):
        halved = wf_vit.explain(rounded, noise(30, 40), **options)
        assert halved.impact_heads["mean"].dtype == np.float32
        halved.save_data(tmp_path)
        again = Explanation.load(tmp_path).impact_heads["mean"]
        np.testing.assert_allclose(again, attention, atol=5e-3)
    assert "fields" in two[0].figures
    assert two[0].page().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("model", "image", "options", "message"),
    [
        ("nowhere.npz", noise(8, 8), {}, "no checkpoint at nowhere"),
        (VIT, "nowhere.png", {}, "no image at nowhere"),
        (VIT, [], {}, "empty list"),
        (VIT, noise(8, 8), {"grid": (2, 2)}, "go with attention only"),
        (
            VIT,
            noise(8, 8),
            {"image_size": (17, 16)},
            "do not divide an image height of 17",
        ),
        (VIT, noise(8, 8), {"target": "cat"}, "The target is 'cat'"),
        (VIT, noise(8, 8), {"indicators": ("means",)}, "name some of mean"),
        (random_attention(2), noise(8, 8), {}, "num_prefix_tokens is missing"),
        (
            random_attention(2, 3),
            noise(8, 8),
            {"num_prefix_tokens": 1},
            r"shape \(2, 3, 2, 25, 25\) with 1 images",
        ),
        (
            random_attention(2),
            noise(8, 8),
            {"num_prefix_tokens": 1},
            "no square grid: pass",
        ),
        (
            random_attention(2),
            noise(8, 8),
            {"num_prefix_tokens": 1, "target": "class"},
            "target needs a model",
        ),
        ((), noise(8, 8), {"num_prefix_tokens": 1}, 'attn_implementation="eager"'),
    ],
)
def test_what_cannot_work_is_an_error(model, image, options, message):
    with pytest.raises(UsageError, match=message):
        wf_vit.explain(model, image, **options)
