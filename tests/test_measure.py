import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import slow
from tests.networks import apply
from wf_vit import indicators, measure
from wf_vit.errors import UsageError
from wf_vit.models import parameters, recording
from wf_vit.models.attention import DROPPED, REPORT
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
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes
    )


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(5, 8, 12, 3)).astype(np.float32)


def impact_of(*args, **options):
    return measure.propagate(*args, **options)[0].impact


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
def test_a_recording_is_what_the_model_records(model_class, images):
    model = model_class(**SIZES)
    params = random_params(model)
    logits, out = apply(model, params, images, record=True)
    got = measure.record(model, params, images, layers=(1, 0))
    for kind in ("attention", "values"):
        whole = np.stack([out["records"][layer][kind] for layer in (1, 0)])
        np.testing.assert_allclose(getattr(got, kind), whole, atol=1e-6)
    np.testing.assert_allclose(got.logits, logits, atol=1e-5)
    np.testing.assert_allclose(got.tokens, out["tokens"], atol=1e-5)
    if model_class is ViT:
        assert got.gaussians is None
    else:
        gaussians = np.stack([out["fields"][layer].gaussians for layer in (1, 0)])
        np.testing.assert_allclose(got.gaussians, gaussians, rtol=1e-5)


@pytest.mark.parametrize("layers", [None, (1,)])
def test_the_stated_memory_is_what_is_returned(params, images, layers):
    batch = measure.record(MODEL, params, images, layers=layers)
    size = sum(array.nbytes for array in jax.tree.leaves(batch))
    assert size == len(images) * recording.bytes_per_image(MODEL, layers)


def test_the_scales_are_what_the_layer_norms_divide_by(params, images):
    batch = measure.record(MODEL, params, images)
    run = functools.partial(apply, MODEL, params)
    streams = [run(jnp.asarray(images), method="embed")]
    for layer in range(MODEL.depth):
        stream, _ = run(streams[-1], start=layer, stop=layer + 1, method="encode")
        streams.append(stream)
    expected = np.sqrt(np.stack(streams).var(-1) + MODEL.norm_epsilon)
    np.testing.assert_allclose(batch.scale, expected, rtol=1e-5)


def test_the_gain_of_a_head_is_that_of_its_map(params):
    gain = parameters.head_gain(MODEL, params)
    assert gain.shape == (MODEL.depth, MODEL.num_heads)
    block = params["blocks_1"]
    norm, attention = block["attention_norm"]["scale"], block["attention"]

    values, out = attention["value"]["kernel"], attention["out"]["kernel"]

    @jax.jit
    def write(stream, head):
        normed = (stream - stream.mean()) * norm
        return normed @ values[:, head] @ out[head] * block["attention_scale"]

    directions = jnp.eye(MODEL.width)
    for head in range(MODEL.num_heads):
        written = [write(direction, head) for direction in directions]
        expected = np.sqrt(np.square(written).sum() / MODEL.width)
        assert float(gain[1, head]) == pytest.approx(float(expected), rel=1e-5)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    again = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    np.testing.assert_array_equal(
        parameters.head_gain(MODEL, half), parameters.head_gain(MODEL, again)
    )


def test_the_documented_size_of_a_small_vit():
    model = ViT(0, (224, 224), (14, 14), 384, 12, 1536, 6)
    assert round(recording.bytes_per_image(model) / 1e6, 1) == 24.2


def test_recordings_are_float32_whatever_the_model_computes_in(params, images):
    half = MODEL.clone(dtype=jnp.bfloat16)
    batch = measure.record(half, params, images)
    assert {array.dtype for array in jax.tree.leaves(batch)} == {jnp.dtype(jnp.float32)}
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
        measure.record(MODEL, params, images, layers=layers)


def test_images_that_are_not_normalised_are_refused(params, images):
    with pytest.raises(UsageError, match=r"uint8, expected normalised"):
        measure.record(MODEL, params, images.astype(np.uint8))


# Propagation. The reference is the exact derivative by an additive attention bias.


def test_logit_effects_are_the_derivative_of_a_cut(params, images):
    classes = np.array([2, 0, 1, 1, 2])

    def read(logits, out):
        return logits[np.arange(5), classes].sum()

    exact = by_bias(MODEL, params, jnp.asarray(images), read)
    options = {"classes": classes, "prefix_tokens": True}
    got = measure.propagate_logit(MODEL, params, images, per_head=True, **options)
    got = np.asarray(got)
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
    got, _ = measure.propagate(
        model, params, images, key=jax.random.key(1), num_probes=1000, **options
    )
    got = got.heads if per_head else got
    assert got.impact.shape == exact.shape
    error = np.linalg.norm(got.impact - exact, axis=(-2, -1))
    norm = np.linalg.norm(exact, axis=(-2, -1))
    # The stated standard error is that of the sum of squares: allow for four.
    assert (error <= 0.05 * norm + 1e-6).all()
    assert (got.relative_error[norm > 0] < 0.05).all()


@pytest.mark.parametrize("model_class", [ViT, WindowFreeViT])
def test_cutting_one_interaction_changes_the_logit_as_predicted(model_class, images):
    """The cut is real; the difference to the prediction is of second order."""
    model = model_class(**SIZES)
    # An indicator follows values; what heads report of their attention is left out.
    params = jax.tree.map_with_path(
        lambda path, x: 0 * x if REPORT in str(path) else x, random_params(model)
    )
    image = jnp.asarray(images[:1])
    last = model.depth - 1
    weak = jax.tree.map(lambda x: x, params)
    # A small step on the residual stream keeps the second order small.
    weak["blocks_1"] = {
        **params["blocks_1"],
        "attention_scale": 0.01 * params["blocks_1"]["attention_scale"],
    }
    effect = measure.propagate_logit(
        model, weak, images[:1], classes=1, layers=[last], prefix_tokens=True
    )[0, 0]

    @jax.jit
    def logit(bias):
        biases = [None] * last + [bias]
        return model.apply({"params": weak}, image, bias=biases)[0][0, 1]

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


def test_an_image_does_not_depend_on_the_others(params, images, impact):
    some = impact_of(MODEL, params, images[:3], **OPTIONS)
    np.testing.assert_allclose(some, impact[:, :3], rtol=1e-4, atol=1e-5)
    # Every image has probes of its own.
    same = impact_of(MODEL, params, images[[0, 0, 0]], **OPTIONS)
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
        measure.propagate(MODEL, params, images, target="logits", key=key)
    model = MODEL.clone(cls_token=False, pool="mean")
    with pytest.raises(UsageError, match="no CLS token"):
        measure.propagate(model, params, images, target="cls", key=key)
    for classes in (3, [0, 1, 2, 3, 0], -1):
        with pytest.raises(UsageError, match="has 3"):
            measure.propagate_logit(MODEL, params, images, classes=classes)
    with pytest.raises(UsageError, match="one class, or one for each of 5 images"):
        measure.propagate_logit(MODEL, params, images, classes=[0, 1])


# Indicators by name.


@pytest.mark.parametrize("name", measure.INDICATORS)
def test_every_indicator_by_its_name(params, images, name):
    options = {"key": jax.random.key(0), "num_probes": 2}
    found = measure.impact(MODEL, params, images, name, per_head=True, **options)
    recorded, prefix = found.recording, {"num_prefix_tokens": PREFIX}
    matching = {
        "knockout": lambda **o: indicators.knockout_impact(
            recorded.attention,
            recorded.values,
            *parameters.output_projection(MODEL, params),
            **prefix,
            **o,
        ),
        "rollout": lambda **o: indicators.attention_rollout(
            recorded.attention, **prefix, **o
        ),
        "propagated": lambda per_head=False: (
            impact_of(MODEL, params, images, target="tokens", **options)
            if not per_head
            else measure.propagate(
                MODEL, params, images, target="tokens", per_head=True, **options
            )[0].heads.impact
        ),
    }
    expected = matching.get(
        name,
        lambda **o: indicators.interaction_indicator(
            recorded.attention,
            method=name,
            grid=(2, 3),
            key=options["key"],
            **prefix,
            **o,
        ),
    )
    shape = (2, 5, PATCHES, PATCHES)
    assert found.impact.shape == shape
    assert found.heads.shape == (*shape[:2], 2, *shape[2:])
    np.testing.assert_allclose(found.impact, expected(), rtol=1e-5, atol=1e-6)
    heads = expected(per_head=True)
    np.testing.assert_allclose(found.heads, heads, rtol=1e-5, atol=1e-6)
    assert (found.relative_error is not None) == (name == "propagated")


def test_a_recording_of_other_images_or_layers_is_refused(params, images):
    of_all = measure.record(MODEL, params, images)
    for shown, layers in ((images[:2], None), (images, [1])):
        with pytest.raises(UsageError, match="record the same images and layers"):
            measure.impact(
                MODEL, params, shown, "mean", layers=layers, recording=of_all
            )


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("indicator", ["random", "propagated"])
def test_keys_of_other_images_are_refused(params, images, indicator):
    keys = jax.random.split(jax.random.key(0), 4)
    with pytest.raises(UsageError, match=r"shape \(4,\), expected \(\) or \(5,\)"):
        measure.impact(MODEL, params, images, indicator, key=keys)


def test_what_both_heads_of_a_distilled_model_read_is_pooled(images):
    model = ViT(**SIZES, distillation_token=True)
    params = random_params(model)
    one = measure.record(model, params, images)
    np.testing.assert_allclose(
        one.pooled, one.tokens[:, :2].reshape(len(images), -1), atol=1e-6
    )
    size = sum(array.nbytes for array in jax.tree.leaves(one))
    assert size == len(images) * recording.bytes_per_image(model)


def test_what_an_indicator_needs_is_asked_for(params, images):
    impact = functools.partial(measure.impact, MODEL, params, images)
    with pytest.raises(UsageError, match=r"'odd': choose one of mean, .*odds"):
        impact("odd")
    for name in ("propagated", "random"):
        with pytest.raises(UsageError, match=r"no key: pass key=jax\.random\.key"):
            impact(name)
    with pytest.raises(UsageError, match="needs all layers"):
        impact("rollout", layers=(1,))
    everything = impact("rollout", layers=(0, 1)).impact
    np.testing.assert_array_equal(everything, impact("rollout").impact)


class Counted:
    """A model that counts how often it is run, and pulled back through."""

    def readout(self, tokens):
        return super().readout(_counted(tokens))


class CountedViT(Counted, ViT):
    pass


class CountedWinfT(Counted, WindowFreeViT):
    pass


COUNTS = {"forward": 0, "backward": 0}


def _count(kind, *_):
    COUNTS[kind] += 1


@jax.custom_vjp
def _counted(tokens):
    return tokens


def _counted_forward(tokens):
    jax.debug.callback(functools.partial(_count, "forward"))
    return tokens, None


def _counted_backward(_, cotangent):
    # Probes that run together differ in this number: each is counted.
    jax.debug.callback(functools.partial(_count, "backward"), cotangent.sum())
    return (cotangent,)


_counted.defvjp(_counted_forward, _counted_backward)


@pytest.mark.parametrize(
    ("model_class", "num_probes"),
    [(CountedViT, 5), (CountedWinfT, 3), slow(CountedViT, 2)],
)
def test_all_indicators_share_one_forward_pass(images, model_class, num_probes):
    """A photograph: every indicator, fused and per head, and their recording."""
    model, recording = model_class(**SIZES), None
    params = random_params(model)
    COUNTS.update(forward=0, backward=0)
    for name in ("propagated", "mean", "knockout", "rollout"):
        found = measure.impact(
            model,
            params,
            images[:1],
            name,
            per_head=True,
            key=jax.random.key(0),
            num_probes=num_probes,
            recording=recording,
        )
        recording = found.recording
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert {"forward": 1, "backward": num_probes} == COUNTS
