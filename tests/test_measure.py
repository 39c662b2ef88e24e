import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit.errors import UsageError
from wf_vit import measure
from wf_vit.models.windowfree import DROPPED
from wf_vit.models.vit import ViT
from wf_vit.models.windowfree import WindowFreeViT

SIZES = {
    "num_classes": 3,
    "image_size": (8, 12),
    "patch_size": (4, 4),
    "width": 8,
    "depth": 2,
    "mlp_dim": 16,
    "num_heads": 2,
    "num_registers": 1,
    "layer_scale": 1.0,
}
MODEL = ViT(**SIZES)
PREFIX, PATCHES, TOKENS = 2, 6, 8
OPTIONS = {"target": "cls", "key": jax.random.key(0), "num_probes": 2}


def random_params(model: ViT, seed: int = 0):
    """Parameters of which none is special, so that every one of them matters."""
    images = jnp.zeros((1, *model.image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [
        0.5 * jax.random.normal(k, leaf.shape)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(noise)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(5, 8, 12, 3)).astype(np.float32)


def record_of(model, params, images, kind, **options):
    """Joins the batches of one kind of recorded array."""
    axis = 1 if kind in ("attention", "values") else 0
    batches = measure.record(model, params, images, **options)
    return np.concatenate([getattr(batch, kind) for batch in batches], axis)


def impact_of(*args, **options):
    return np.concatenate([b.impact for b in measure.propagate(*args, **options)], 1)


def logit_effect_of(*args, **options):
    return np.concatenate(list(measure.propagate_logit(*args, **options)), 1)


def by_bias(model, params, images, read):
    """Differentiates an output by what is added to each attention logit.

    With a the attention, that is ``1 - a`` times what a cut does to first order.

    Returns:
      The derivative, layers and then the axes of the output in front.
    """
    shape = (model.depth, len(images), 2, TOKENS, TOKENS)

    def output(bias):
        variables = {"params": params}
        logits, out = model.apply(variables, images, bias=list(bias), record=True)
        records = [out["records"][layer] for layer in range(model.depth)]
        return read(logits, out), jnp.stack([r["attention"] for r in records])

    jacobian, attention = jax.jit(jax.jacrev(output, has_aux=True))(jnp.zeros(shape))
    return np.asarray(jacobian) / (1 - np.asarray(attention))


# Recording.


@pytest.mark.parametrize("model_class", [ViT, WindowFreeViT])
def test_batches_join_to_what_the_model_records_at_once(model_class, images):
    model = model_class(**SIZES)
    params = random_params(model)
    whole = jax.jit(functools.partial(model.apply, record=True))
    logits, out = whole({"params": params}, images)
    chosen = {"layers": (1, 0), "batch_size": 2}
    for kind in ("attention", "values"):
        got = record_of(model, params, images, kind, **chosen)
        whole = np.stack([out["records"][layer][kind] for layer in (1, 0)])
        np.testing.assert_allclose(got, whole, atol=1e-6)
    for kind, whole in (("logits", logits), ("tokens", out["tokens"])):
        got = record_of(model, params, images, kind, **chosen)
        np.testing.assert_allclose(got, whole, atol=1e-5)


def test_a_shorter_last_batch_is_not_traced_again(params, images):
    before = recording._record._cache_size()
    batches = measure.record(MODEL, params, images, layers=(1,), batch_size=2)
    assert [len(batch.logits) for batch in batches] == [2, 2, 1]
    list(measure.record(MODEL, params, images[:4], layers=(1,), batch_size=2))
    assert recording._record._cache_size() == before + 1


@pytest.mark.parametrize("layers", [None, (1,)])
def test_the_stated_memory_is_what_is_returned(params, images, layers):
    (batch,) = measure.record(MODEL, params, images, layers=layers)
    size = sum(array.nbytes for array in batch)
    assert size == len(images) * measure.bytes_per_image(MODEL, layers)


def test_the_scales_are_what_the_layer_norms_divide_by(params, images):
    (batch,) = measure.record(MODEL, params, images)
    apply = functools.partial(MODEL.apply, {"params": params})
    streams = [apply(jnp.asarray(images), method="embed")]
    for layer in range(MODEL.depth):
        stop = layer + 1
        stream, _ = apply(streams[-1], start=layer, stop=stop, method="encode")
        streams.append(stream)
    expected = jnp.sqrt(jnp.stack(streams).var(-1) + MODEL.norm_epsilon)
    np.testing.assert_allclose(batch.scale, expected, rtol=1e-5)


def test_the_gain_of_a_head_is_that_of_its_map(params):
    gain = parameters.head_gain(MODEL, params)
    assert gain.shape == (MODEL.depth, MODEL.num_heads)
    block = params["blocks_1"]
    norm, attention = block["attention_norm"]["scale"], block["attention"]

    def write(stream, head):
        normed = (stream - stream.mean()) * norm
        value = normed @ attention["value"]["kernel"][:, head]
        return value @ attention["out"]["kernel"][head] * block["attention_scale"]

    directions = jnp.eye(MODEL.width)
    for head in range(MODEL.num_heads):
        written = jax.vmap(write, in_axes=(0, None))(directions, head)
        expected = jnp.sqrt(jnp.square(written).sum() / MODEL.width)
        assert float(gain[1, head]) == pytest.approx(float(expected), rel=1e-5)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    again = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    np.testing.assert_array_equal(
        parameters.head_gain(MODEL, half), parameters.head_gain(MODEL, again)
    )


def test_the_documented_size_of_a_small_vit():
    model = ViT(0, (224, 224), (14, 14), 384, 12, 1536, 6)
    assert round(measure.bytes_per_image(model) / 1e6, 1) == 24.2


def test_recordings_are_float32_whatever_the_model_computes_in(params, images):
    half = MODEL.clone(dtype=jnp.bfloat16)
    (batch,) = measure.record(half, params, images)
    assert {array.dtype for array in batch} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(batch.attention.sum(-1), 1, atol=1e-5)


def test_output_projection_is_that_of_the_layers_asked_for(params):
    kernel, scale = parameters.output_projection(MODEL, params, (1, 0))
    for place, block in enumerate((params["blocks_1"], params["blocks_0"])):
        np.testing.assert_array_equal(
            kernel[place], block["attention"]["out"]["kernel"]
        )
        np.testing.assert_array_equal(scale[place], block["attention_scale"])
    plain = MODEL.clone(layer_scale=None)
    assert parameters.output_projection(plain, random_params(plain))[1] is None


@pytest.mark.parametrize("layers", [(), (2,), (-1,), (0, 0)])
def test_unknown_layers_are_refused(params, images, layers):
    with pytest.raises(UsageError, match="layers 0 to 1"):
        next(measure.record(MODEL, params, images, layers=layers))


def test_images_that_are_not_normalised_are_refused(params, images):
    with pytest.raises(UsageError, match=r"uint8, expected normalised"):
        next(measure.record(MODEL, params, images.astype(np.uint8)))
    with pytest.raises(UsageError, match="batch_size is 0"):
        next(measure.record(MODEL, params, images, batch_size=0))


# Propagation. The reference is the exact derivative by an additive attention bias.


def test_logit_effects_are_the_derivative_of_a_cut(params, images):
    classes = np.array([2, 0, 1, 1, 2])

    def read(logits, out):
        return logits[np.arange(5), classes].sum()

    exact = by_bias(MODEL, params, jnp.asarray(images), read)
    options = {"classes": classes, "prefix_tokens": True, "batch_size": 3}
    got = logit_effect_of(MODEL, params, images, per_head=True, **options)
    np.testing.assert_allclose(got, exact, atol=1e-4 * np.abs(exact).max())
    # To the logits, only what the CLS token sees matters in the last layer.
    assert np.abs(got[-1, :, :, 0]).max() > 0
    np.testing.assert_array_equal(got[-1, :, :, 1:], 0)


@pytest.mark.parametrize(
    ("target", "per_head"), [("tokens", False), ("cls", True), ("pooled", False)]
)
def test_propagated_impacts_converge_to_the_exact_jacobian(
    params, images, target, per_head
):
    model = MODEL.clone(pool="mean")
    images = images[:1]

    def read(logits, out):
        return {**out, "cls": out["tokens"][:, 0]}[target].reshape(-1)

    exact = by_bias(model, params, jnp.asarray(images), read)
    exact = np.moveaxis(exact if per_head else exact.sum(3), 0, -1)
    exact = np.linalg.norm(exact, axis=-1)
    options = {"target": target, "per_head": per_head, "prefix_tokens": True}
    (got,) = measure.propagate(
        model, params, images, key=jax.random.key(1), num_probes=1000, **options
    )
    assert got.impact.shape == exact.shape
    error = np.linalg.norm(got.impact - exact, axis=(-2, -1))
    norm = np.linalg.norm(exact, axis=(-2, -1))
    # The stated standard error is that of the sum of squares: allow for four.
    assert (error <= 0.05 * norm + 1e-6).all()
    assert (got.relative_error[norm > 0] < 0.05).all()


def test_cutting_one_interaction_changes_the_logit_as_predicted(params, images):
    """The cut is real; the difference to the prediction is of second order."""
    image = jnp.asarray(images[:1])
    last = MODEL.depth - 1
    weak = jax.tree.map(lambda x: x, params)
    # A small step on the residual stream keeps the second order small.
    weak["blocks_1"] = {
        **params["blocks_1"],
        "attention_scale": 0.01 * params["blocks_1"]["attention_scale"],
    }
    effect = logit_effect_of(
        MODEL, weak, images[:1], classes=1, layers=[last], prefix_tokens=True
    )[0, 0]

    @jax.jit
    def logit(bias):
        biases = [None] * last + [bias]
        return MODEL.apply({"params": weak}, image, bias=biases)[0][0, 1]

    whole = logit(jnp.zeros((1, 1, TOKENS, TOKENS)))
    for key in range(TOKENS):
        bias = jnp.zeros((1, 1, TOKENS, TOKENS)).at[..., 0, key].set(DROPPED)
        change = whole - logit(bias)
        assert abs(change - effect[0, key]) <= 0.05 * np.abs(effect[0]).max()


@pytest.fixture(scope="module")
def impact(params, images):
    return impact_of(MODEL, params, images, **OPTIONS)


def test_patches_and_layers_are_cut_out_of_the_whole(params, images, impact):
    assert impact.shape == (2, 5, PATCHES, PATCHES)
    reverse = impact_of(MODEL, params, images, layers=(1, 0), **OPTIONS)
    np.testing.assert_allclose(reverse[::-1], impact, rtol=1e-4, atol=1e-5)
    # Shrinking looks at all interactions, and there are more with the prefix tokens.
    whole, patches = (
        impact_of(MODEL, params, images, prefix_tokens=p, shrink=False, **OPTIONS)
        for p in (True, False)
    )
    np.testing.assert_allclose(
        whole[..., PREFIX:, PREFIX:], patches, rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(patches, impact, rtol=1e-2)


def test_results_do_not_depend_on_the_batch_size(params, images, impact):
    padded = impact_of(MODEL, params, images, batch_size=3, **OPTIONS)
    np.testing.assert_allclose(padded, impact, rtol=1e-4, atol=1e-5)
    # Every image has probes of its own.
    same = impact_of(MODEL, params, images[[0, 0, 0]], batch_size=3, **OPTIONS)
    assert np.abs(same[0, 0] - same[0, 1]).max() > 1e-3


@pytest.mark.parametrize("option", [{"remat": True}, {"dtype": jnp.bfloat16}])
def test_memory_savers_compute_the_same(params, images, impact, option):
    got = impact_of(MODEL.clone(**option), params, images, **OPTIONS)
    assert got.dtype == np.float32
    assert np.corrcoef(got.ravel(), impact.ravel())[0, 1] > 0.98


def test_the_window_free_model_propagates_too(images, impact):
    model = WindowFreeViT(**SIZES)
    got = impact_of(model, random_params(model), images, **OPTIONS)
    assert got.shape == impact.shape
    assert np.isfinite(got).all()


def test_unknown_targets_and_classes_are_refused(params, images):
    key = jax.random.key(0)
    with pytest.raises(UsageError, match="call propagate_logit"):
        next(measure.propagate(MODEL, params, images, target="logits", key=key))
    model = MODEL.clone(cls_token=False, pool="mean")
    with pytest.raises(UsageError, match="no CLS token"):
        next(measure.propagate(model, params, images, target="cls", key=key))
    for classes in (3, [0, 1, 2, 3, 0], -1):
        with pytest.raises(UsageError, match="has 3"):
            next(measure.propagate_logit(MODEL, params, images, classes=classes))
    with pytest.raises(UsageError, match="one class, or one for each of 5 images"):
        next(measure.propagate_logit(MODEL, params, images, classes=[0, 1]))
