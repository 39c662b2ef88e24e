"""Calling the indicators: what they refuse, how they trace, what they import."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.indicators.layer import Layer, random_attention
from wf_vit import indicators
from wf_vit.errors import UsageError
from wf_vit.indicators import checks


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (indicators.interaction_indicator, 1),
        (indicators.mean_attention_distance, 1),
        (indicators.knockout_impact, 4),
    ],
)
def test_functions_are_traced_once_per_shape(function, arrays, monkeypatch):
    traced = []
    count = checks.count_tokens
    monkeypatch.setattr(
        checks, "count_tokens", lambda *a: traced.append(a) or count(*a)
    )
    # A shape of its own, which no other test has compiled.
    inputs = [Layer(tokens=26, seed=seed).arrays()[:arrays] for seed in range(3)]
    for given in inputs:
        function(*given, num_prefix_tokens=1)
    assert len(traced) == 1


def test_recorded_arrays_may_be_constants_of_a_traced_function():
    attention = random_attention(2, 5)
    scaled = jax.jit(
        lambda x: x * indicators.interaction_indicator(attention, num_prefix_tokens=1)
    )
    np.testing.assert_allclose(scaled(2.0), 2 * attention[:, 1:, 1:].mean(0), rtol=1e-6)


def test_inside_jit_values_are_not_checked_and_nan_keeps_to_its_row():
    attention, values, kernel, scale = Layer().arrays()
    attention = attention.at[1, 4, 2].set(jnp.nan)
    impact = jax.jit(
        lambda attention: indicators.knockout_impact(
            attention, values, kernel, scale, num_prefix_tokens=0
        )
    )(attention)
    assert np.isnan(impact[4]).all()
    assert np.isfinite(np.delete(impact, 4, axis=0)).all()


def test_inside_jit_rows_are_taken_as_if_divided_by_their_sum():
    attention, values, kernel, scale = Layer().arrays()
    expected, scaled = (
        jax.jit(
            lambda attention: indicators.knockout_impact(
                attention, values, kernel, scale, num_prefix_tokens=0
            )
        )(factor * attention)
        for factor in (1.0, 0.5)
    )
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.at[0, 1, 2].set(jnp.nan), "NaN or infinity"),
        (lambda a: jnp.log(a), "negative numbers"),
        (lambda a: a.at[0, 0].multiply(-1), "negative numbers"),
        (lambda a: a.swapaxes(-1, -2), "swap its last two axes"),
        (lambda a: 2 * a, "away from summing to 1"),
        (lambda a: a[..., 1:], r"expected \[..., H, N, N\]"),
        (lambda a: a[0], r"expected \[..., H, N, N\]"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_attention_that_is_no_distribution_is_refused(change, message):
    attention = change(random_attention(2, 5, spread=2.0))
    with pytest.raises(UsageError, match=message):
        indicators.interaction_indicator(attention, num_prefix_tokens=1)
    with pytest.raises(UsageError, match=message):
        indicators.mean_attention_distance(attention, num_prefix_tokens=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prefix_tokens": 17}, "leaves no patches"),
        ({"num_prefix_tokens": -1}, "leaves no patches"),
        ({"num_prefix_tokens": 1, "grid": (5, 5)}, "grid"),
        ({"num_prefix_tokens": 0, "method": "distance"}, "no square grid"),
        ({"num_prefix_tokens": 1, "method": "random"}, "key=jax.random.key"),
        ({"num_prefix_tokens": 1, "method": "median"}, "choose one of mean, max"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_options_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        indicators.interaction_indicator(random_attention(2, 17), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_fusion": "median"}, "expected mean, max or min"),
        ({"residual_weight": 1.5}, "expected 0 to 1"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_rollout_refuses_options(arguments, message):
    with pytest.raises(UsageError, match=message):
        indicators.attention_rollout(
            random_attention(2, 3, 5), num_prefix_tokens=1, **arguments
        )


@pytest.mark.usefixtures("no_type_checks")
def test_rollout_needs_a_layer_axis():
    with pytest.raises(UsageError, match="layers in front"):
        indicators.attention_rollout(random_attention(3, 5), num_prefix_tokens=1)


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (1, lambda x: x.swapaxes(0, 1), "values has shape"),
        (1, lambda x: x.at[0, 0, 0].set(jnp.inf), "values of shape .* infinity"),
        (2, lambda x: x.reshape(-1, 8), "output_kernel has shape"),
        (2, lambda x: x[None], "output_kernel has shape"),
        (2, lambda x: x.at[0].set(jnp.nan), "output_kernel of shape .* NaN"),
        (3, lambda x: x[:-1], "residual_scale has shape"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_layers_that_do_not_fit_are_refused(position, change, message):
    arrays = list(Layer().arrays())
    arrays[position] = change(arrays[position])
    with pytest.raises(UsageError, match=message):
        indicators.knockout_impact(*arrays, num_prefix_tokens=1)


@pytest.mark.usefixtures("no_type_checks")
def test_effect_refuses_cotangents_of_another_model():
    attention, values, kernel, scale = Layer().arrays()
    with pytest.raises(UsageError, match="cotangents has shape"):
        indicators.knockout_effect(
            attention, values, kernel, jnp.ones((14, 9)), scale, num_prefix_tokens=1
        )


def test_one_probe_has_no_error():
    attention, values, kernel, scale = Layer().arrays()
    with pytest.raises(UsageError, match="use knockout_effect"):
        indicators.propagated_knockout(
            attention,
            values,
            kernel,
            lambda probe: jnp.ones((14, 8)),
            scale,
            num_probes=1,
            num_prefix_tokens=1,
        )


def test_import_is_light():
    code = (
        "import sys, wf_vit.indicators, wf_vit.fields; "
        "sys.exit(any(name in sys.modules for name in ('flax', 'tensorflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
