"""Arrays from anywhere: every function that a person calls with attention or impact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import arrays, fields, indicators, interventions, tendency
from wf_vit.errors import UsageError

RNG = np.random.default_rng(0)


class Tensor:
    """What stands in for a tensor of PyTorch, which is not always there."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.shape, self.dtype = self.values.shape, self.values.dtype

    def detach(self):
        return self

    def cpu(self):
        return self

    def numpy(self):
        return self.values


def attention(*batch, tokens=10):
    weights = RNG.gamma(1.0, size=(*batch, 2, tokens, tokens)).astype(np.float32)
    return weights / weights.sum(-1, keepdims=True)


LAYERS = attention(3, 2)  # [L, B, H, N, N]
FORMS = {
    "numpy": np.asarray,
    "jax": jnp.asarray,
    "tensor": Tensor,
    "list": list,
    "tuple of tensors": lambda x: tuple(Tensor(layer) for layer in x),
    "list of jax": lambda x: [jnp.asarray(layer) for layer in x],
}
IMPACT = LAYERS[:, :, :, 1:, 1:]
FUNCTIONS = {
    "mean": lambda x: indicators.interaction_indicator(x, num_prefix_tokens=1),
    "rollout": lambda x: indicators.attention_rollout(attention=x, num_prefix_tokens=1),
    "distance": lambda x: indicators.mean_attention_distance(x, num_prefix_tokens=1),
    "field": lambda x: fields.responsive_field(x, (2, 5)).excess,
    "discriminability": lambda x: fields.discriminability(indicator=x),
    "tendency": lambda x: tendency.tendency(x, (2, 5)).geometry,
    "keep": lambda x: interventions.keep_strongest(x, 0.5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_form_gives_the_same(name, form):
    function = FUNCTIONS[name]
    expected = function(jnp.asarray(LAYERS))
    np.testing.assert_allclose(function(FORMS[form](LAYERS)), expected, rtol=1e-6)


def test_values_and_kernels_may_be_tensors():
    values = RNG.normal(size=(3, 2, 10, 2, 4)).astype(np.float32)
    kernel = RNG.normal(size=(3, 2, 4, 8)).astype(np.float32)
    exact = indicators.knockout_impact(
        jnp.asarray(LAYERS),
        jnp.asarray(values),
        jnp.asarray(kernel),
        num_prefix_tokens=1,
    )
    got = indicators.knockout_impact(
        [Tensor(layer) for layer in LAYERS],
        Tensor(values),
        output_kernel=Tensor(kernel),
        num_prefix_tokens=1,
    )
    np.testing.assert_array_equal(got, exact)


def test_tracers_pass_untouched():
    @jax.jit
    def mean(x):
        assert arrays.as_array(x, "x") is x
        return indicators.interaction_indicator(x, num_prefix_tokens=1)

    np.testing.assert_allclose(mean(LAYERS), FUNCTIONS["mean"](LAYERS), rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((), r'attention is an empty tuple.*attn_implementation="eager"'),
        ([], "attention is an empty list.*set_fused_attn"),
        (None, "attention is None.*eager"),
        ((LAYERS[0], None), r"None in the layers \[1\].*output_attentions=True"),
        ((LAYERS[0], LAYERS[0, :1]), r"\(2, 2, 10, 10\), \(1, 2, 10, 10\).*one by one"),
        ([[0.5, 0.5], [1.0, 0.0]], "a list of list.*numpy.asarray"),
        ("eager", "attention is a str, expected an array"),
    ],
)
def test_what_is_no_array_is_an_error(values, message):
    with pytest.raises(UsageError, match=message):
        indicators.interaction_indicator(values, num_prefix_tokens=1)


def test_named_tuples_fit_on_a_line():
    field = fields.responsive_field(IMPACT[..., :9, :9], (3, 3))
    assert repr(field).startswith("Field(extents=float32[3, 2, 2, 9, 4], area=")
    assert len(repr(field)) < 400
    assert len(repr(fields.statistics(field, axes=(1,)))) < 1500


def test_real_tensors():
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    layers = [torch.tensor(x, requires_grad=True) for x in LAYERS]
    expected = FUNCTIONS["mean"](LAYERS)
    np.testing.assert_allclose(FUNCTIONS["mean"](layers), expected, rtol=1e-6)
    half = [layer.to(torch.bfloat16) for layer in layers]
    np.testing.assert_allclose(FUNCTIONS["mean"](half), expected, rtol=1e-2)
