"""Effects on the output: exact where the rest is linear, and how probes err."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.indicators.layer import Layer
from wf_vit import indicators


def test_propagated_knockout_of_a_linear_model_is_exact():
    # All sign vectors of a three-dimensional output: no sampling error is left.
    layers = [Layer(seed=seed) for seed in range(2)]
    jacobian = np.random.default_rng(9).normal(size=(2, 14, 3, 8))
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, 8).T
    probes = jnp.asarray(np.einsum("me,lned->mlnd", signs, jacobian), jnp.float32)
    attention, values, kernel, scale = (
        jnp.stack(x) for x in zip(*(layer.arrays() for layer in layers), strict=True)
    )

    @jax.jit
    def run(attention, values, per_head_cotangents):
        return [
            indicators.propagated_knockout(
                attention,
                values,
                kernel,
                lambda probe: per_head_cotangents[probe],
                scale,
                num_probes=8,
                num_prefix_tokens=1,
                per_head=per_head,
                shrink=False,
            )
            for per_head in (False, True)
        ]

    fused, both = run(attention, values, probes)
    assert fused.heads is None
    np.testing.assert_allclose(both.impact, fused.impact, rtol=1e-5)
    for i, layer in enumerate(layers):
        moved = np.einsum("hijd,ied->hije", layer.displacements(), jacobian[i])
        expected = np.linalg.norm(moved.sum(0), axis=-1)[1:, 1:]
        np.testing.assert_allclose(fused.impact[i], expected, rtol=1e-4)
        expected = np.linalg.norm(moved, axis=-1)[:, 1:, 1:]
        np.testing.assert_allclose(both.heads.impact[i], expected, rtol=1e-4)


class Propagation:
    """A layer before a linear map of each token, and estimates of what cuts do."""

    def __init__(self, jacobian, layer=None):
        self.layer = layer or Layer()
        self.jacobian = jacobian
        moved = np.einsum("hijd,ied->hije", self.layer.displacements(), jacobian)
        self.exact = np.linalg.norm(moved.sum(0), axis=-1)
        self.exact_per_head = np.linalg.norm(moved, axis=-1)

    def estimate(self, seeds, **options):
        def one(seed):
            def cotangents(probe):
                key = jax.random.fold_in(jax.random.key(seed), probe)
                signs = jax.random.rademacher(key, self.jacobian.shape[:2], jnp.float32)
                return jnp.einsum("ne,ned->nd", signs, self.jacobian.astype("float32"))

            attention, values, kernel, scale = self.layer.arrays()
            options_ = {"num_prefix_tokens": 0} | options
            return indicators.propagated_knockout(
                attention, values, kernel, cotangents, scale, **options_
            )

        drawn = jax.lax.map(jax.jit(one), jnp.arange(seeds))
        return jax.tree.map(np.asarray, drawn)

    def log_error(self, estimates):
        """The root mean square of the logarithms of estimated over exact impacts."""
        ratio = np.log(estimates / self.exact)
        return np.sqrt(np.square(ratio).mean())


def stretching_alike(rng):
    """Jacobians of tokens that stretch all directions alike, each to its own size."""
    turned = np.linalg.qr(rng.normal(size=(14, 40, 8)))[0]
    return turned * np.exp(rng.normal(size=(14, 1, 1)))


def stretching_two(rng):
    """Jacobians of tokens that keep two directions of eight."""
    return rng.normal(size=(14, 40, 2)) @ rng.normal(size=(14, 2, 8))


def test_relative_error_of_probes_is_the_error_seen():
    case = Propagation(np.random.default_rng(1).normal(size=(14, 40, 8)))
    drawn = case.estimate(40, num_probes=32, shrink=False)
    square = np.square(case.exact)
    errors = np.square(square * (drawn.impact / case.exact - 1))
    seen = np.sqrt(errors.sum((1, 2)).mean() / np.square(square).sum())
    assert drawn.relative_error.mean() == pytest.approx(seen, rel=0.2)


def test_shrinking_finds_jacobians_that_stretch_alike():
    case = Propagation(stretching_alike(np.random.default_rng(2)))
    plain = case.log_error(case.estimate(10, num_probes=8, shrink=False).impact)
    shrunk = case.log_error(case.estimate(10, num_probes=8).impact)
    # Left is the error of each token's own size, of which every probe says much.
    assert shrunk < plain / 2


def test_shrinking_does_no_harm_where_jacobians_do_not_stretch_alike():
    case = Propagation(stretching_two(np.random.default_rng(3)))
    plain = case.log_error(case.estimate(10, num_probes=16, shrink=False).impact)
    shrunk = case.log_error(case.estimate(10, num_probes=16).impact)
    assert shrunk < 1.02 * plain


@pytest.mark.parametrize("num_probes", [4, 32])
def test_shrinking_keeps_the_mean_where_jacobians_stretch_alike(num_probes):
    case = Propagation(stretching_alike(np.random.default_rng(4)))
    drawn = case.estimate(400, num_probes=num_probes)
    ratio = np.square(drawn.impact).mean(0) / np.square(case.exact)
    assert ratio.mean() == pytest.approx(1, abs=0.05)


def test_shrinking_per_head():
    case = Propagation(stretching_alike(np.random.default_rng(5)))
    drawn = case.estimate(200, num_probes=32, per_head=True).heads.impact
    np.testing.assert_allclose(drawn.mean(0), case.exact_per_head, rtol=0.2)


def test_many_probes_are_hardly_shrunk():
    case = Propagation(stretching_two(np.random.default_rng(6)))
    drawn, plain = (
        case.estimate(1, num_probes=2000, shrink=shrink).impact
        for shrink in (True, False)
    )
    np.testing.assert_allclose(drawn, plain, rtol=0.02)


def test_keys_without_weight_and_outputs_out_of_extent_have_no_impact():
    layer = Layer()
    layer.logits[:, :, 3] = -np.inf
    attention, values, kernel, scale = layer.arrays()
    estimate = jax.jit(
        lambda gradient: indicators.propagated_knockout(
            attention,
            values,
            kernel,
            lambda probe: gradient,
            scale,
            num_probes=2,
            num_prefix_tokens=1,
        )
    )
    seen = estimate(jnp.ones((14, 8)))
    assert (seen.impact[:, 2] == 0).all()
    assert (np.delete(seen.impact, 2, 1) > 0).all()
    unseen = estimate(jnp.zeros((14, 8)))
    assert (unseen.impact == 0).all()
    assert unseen.relative_error == 0
