"""Class maps and controls on models whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import verify as verify_config
from tests.networks import random_params
from wf_vit.models.vit import ViT
from wf_vit.verify import class_maps, maps
from wf_vit.verify.class_maps import MAPS, OWN, REMOVALS, ClassMaps
from wf_vit.verify.subject import classify

# One block, so that first-order effects of the attention are nearly exact.
VIT = ViT(
    num_classes=3,
    image_size=(8, 12),
    patch_size=(4, 4),
    width=16,
    depth=1,
    mlp_dim=16,
    num_heads=2,
)
PATCHES = 6


@pytest.fixture(scope="module")
def params():
    return random_params(VIT)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 12, 3)), jnp.float32)


def test_a_removal_is_what_it_says(params, images):
    classes = jnp.array([0, 2])
    drops = class_maps.removals(params, images, classes, model=VIT)
    assert set(drops) == set(REMOVALS)
    before = classify(params, images, model=VIT)
    # With a CLS token alone to be read and one block, a patch that no one hears is
    # a patch that is not there.
    np.testing.assert_allclose(drops["cut off"], drops["gathered out"], atol=1e-5)
    filled = np.array(images)
    filled[:, 4:, 8:] = filled.mean((1, 2), keepdims=True)
    after = classify(params, jnp.asarray(filled), model=VIT)
    expected = (before - after)[jnp.arange(2), classes]
    np.testing.assert_allclose(drops["filled"][:, 5], expected, atol=1e-5)


def test_saco_is_1_for_what_happens_and_negative_for_its_reverse():
    rng = np.random.default_rng(0)
    # Each of 20 patches adds to the class by its brightness.
    values = rng.uniform(0.1, 1, (3, 20)).astype(np.float32)
    images = jnp.asarray(np.repeat(values.reshape(3, 4, 5, 1), 3, -1))
    mean = values.mean(-1, keepdims=True)

    def predict(pixels):
        total = pixels[..., 0].sum((1, 2))
        return jnp.stack([total, jnp.full_like(total, 10.0)], -1)

    def coefficient(importance):
        classes = jnp.zeros(3, int)
        return class_maps.saco(predict, images, classes, importance, grid=(4, 5))

    np.testing.assert_allclose(coefficient(values - mean), 1, atol=1e-6)
    np.testing.assert_allclose(coefficient(mean - values), -1, atol=1e-6)
    noise = rng.uniform(size=values.shape).astype(np.float32)
    assert np.abs(coefficient(noise)).max() < 0.95


def test_integrated_gradients_add_up_to_the_difference(params, images):
    classes = jnp.array([1, 2])
    found = maps.integrated_gradients(params, images, classes, model=VIT, steps=200)
    assert found.shape == (2, PATCHES)
    baseline = jnp.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)
    ends = (classify(params, x, model=VIT) for x in (images, baseline))
    full, empty = (logits[jnp.arange(2), classes] for logits in ends)
    np.testing.assert_allclose(found.sum(-1), full - empty, atol=2e-3)


def test_pixels_are_summed_within_their_patch():
    pixels = jnp.zeros((1, 8, 12, 3)).at[0, 5, 9].set(1.0)
    np.testing.assert_array_equal(maps.by_patch(pixels, VIT), [[0, 0, 0, 0, 0, 3]])


def test_grad_cam_is_not_negative_and_sees_its_class(params, images):
    one, other = (
        maps.grad_cam(params, images, jnp.full(2, c), model=VIT) for c in (0, 1)
    )
    assert one.shape == (2, PATCHES)
    assert min(one.min(), other.min()) >= 0
    assert (one != other).any()


def test_all_numbers_of_a_batch(case, estimate):
    protocol = ClassMaps(case.subject, verify_config.get_config())
    outcomes = protocol.measure(case, 2)
    assert outcomes["correlation"].shape == (len(case.images), len(MAPS), 3)
    assert outcomes["saco"].shape == (len(case.images), len(MAPS))
    assert np.abs(outcomes["saco"]).max() <= 1
    summary = protocol.summarize(outcomes, estimate)
    assert set(summary["measures"]) == set(MAPS)
    # Cut off is the map's own question; random maps know nothing of it.
    means = {
        name: summary["measures"][name]["cut off"]["mean"] for name in (OWN, "random")
    }
    assert means[OWN] > means["random"]
    text = "\n".join(protocol.tables(summary, 2))
    assert "| integrated gradients, predicted class |" in text
    assert "does not beat" in text or "beats every control" in text
    jax.tree.map(np.asarray, summary)


@pytest.mark.slow
def test_integrated_gradients_are_those_of_captum(images):
    torch = pytest.importorskip("torch")
    captum = pytest.importorskip("captum.attr")
    timm = pytest.importorskip("timm")
    from wf_vit.models import pretrained

    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), depth=2, num_classes=3
    ).eval()
    loaded = pretrained.load(network)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    classes = np.array([2, 0])
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    baseline = inputs.mean((2, 3), keepdim=True).expand_as(inputs)
    expected = captum.IntegratedGradients(network).attribute(
        inputs,
        baseline,
        target=torch.from_numpy(classes),
        n_steps=16,
        method="riemann_middle",
    )
    expected = expected.permute(0, 2, 3, 1).detach().numpy()
    found = maps.integrated_gradients(
        loaded.params,
        jnp.asarray(pixels),
        jnp.asarray(classes),
        model=loaded.model,
        steps=16,
    )
    expected = maps.by_patch(jnp.asarray(expected), loaded.model)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
