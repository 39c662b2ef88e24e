"""Models that run on some of the patches: what is gone neither acts nor is needed."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import slow_but
from tests.networks import SMALL, apply, images_for, random_params
from wf_vit import interventions
from wf_vit.errors import UsageError
from wf_vit.models.positions import DINOV3_ROTARY, Rotary
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import FieldConfig, WindowFreeViT

BATCH, PATCHES, START = 2, 12, 1
SIZE = SMALL | {"num_registers": 2}
MODELS = {
    "vit": ViT(**SIZE),
    "mean-pooled vit": ViT(**SIZE | {"pool": "mean"}),
    "windowfree": WindowFreeViT(**SIZE),
    "rotary": ViT(**SIZE, rotary=DINOV3_ROTARY),
    "relative": ViT(**SIZE, relative_positions=True),
    "rotary windowfree": WindowFreeViT(**SIZE, rotary=Rotary(100.0, (4.0, 3.0), 1.0)),
    "hard windowfree": WindowFreeViT(**SIZE, fields=FieldConfig(threshold=0.2)),
}


@pytest.fixture(
    params=slow_but(MODELS, "mean-pooled vit", "rotary windowfree", "hard windowfree"),
    scope="module",
)
def network(request):
    """A model with random parameters, and the stream before layer ``START``."""
    model = MODELS[request.param]
    images = images_for(model, BATCH)
    run = functools.partial(apply, model, random_params(model, noise=0.2))
    run.model, run.whole = model, run(images)[0]
    embedded = run(images, method="embed")
    run.stream, _ = run(embedded, stop=START, method="encode")
    return run


def gather(network, patches):
    return interventions.gather_patches(
        network.stream, patches, num_prefix_tokens=network.model.num_prefix_tokens
    )


def some_patches(count):
    rng = np.random.default_rng(2)
    return jnp.stack([rng.permutation(PATCHES)[:count] for _ in range(BATCH)])


def test_all_patches_in_any_order_are_the_plain_model(network):
    patches = some_patches(PATCHES)
    tokens, _ = network(
        gather(network, patches), start=START, patches=patches, method="encode"
    )
    logits, _ = network(tokens, method="readout")
    np.testing.assert_allclose(logits, network.whole, atol=1e-5)


def test_survivors_are_as_if_the_others_were_masked(network):
    prefix = network.model.num_prefix_tokens
    patches = some_patches(5)
    left, _ = network(
        gather(network, patches), start=START, patches=patches, method="encode"
    )
    gone = jnp.ones((BATCH, prefix + PATCHES), bool).at[:, :prefix].set(False)
    gone = gone.at[jnp.arange(BATCH)[:, None], prefix + patches].set(False)
    bias = [jnp.where(gone, -1e30, 0.0)[:, None, None]] * network.model.depth
    bias = [
        jnp.broadcast_to(b, (BATCH, 1, prefix + PATCHES, prefix + PATCHES))
        for b in bias
    ]
    masked, _ = network(network.stream, start=START, bias=bias, method="encode")
    survivors = jnp.take_along_axis(masked, prefix + patches[..., None], axis=1)
    np.testing.assert_allclose(left[:, prefix:], survivors, atol=3e-5, rtol=1e-5)
    np.testing.assert_allclose(left[:, :prefix], masked[:, :prefix], atol=3e-5)
    unmasked, _ = network(network.stream, start=START, method="encode")
    assert np.abs(masked - unmasked)[:, :prefix].max() > 1e-3


def test_patches_that_are_not_there_are_noticed(network):
    with pytest.raises(UsageError, match=r"names 5 patches, but there are 12"):
        network(network.stream, patches=some_patches(5), method="encode")
