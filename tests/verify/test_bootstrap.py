"""Intervals where the answer is known."""

import numpy as np
import pytest

from wf_vit.errors import UsageError
from wf_vit.verify.bootstrap import intervals

RNG = np.random.default_rng(0)


def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    outcomes = RNG.normal(3.0, 2.0, size=(400, 2)).astype(np.float32)
    found = intervals(outcomes, seed=0, samples=4000)
    np.testing.assert_allclose(found.mean, outcomes.mean(0), rtol=1e-6)
    half = 1.96 * outcomes.std(0) / 20
    np.testing.assert_allclose(found.high - found.mean, half, rtol=0.1)
    np.testing.assert_allclose(found.mean - found.low, half, rtol=0.1)
    narrow = intervals(outcomes, seed=0, samples=4000, level=0.5)
    assert (narrow.high - narrow.low < 0.5 * (found.high - found.low)).all()


def test_conditions_share_their_resamples():
    outcomes = RNG.normal(size=(50, 1, 3)).astype(np.float32)
    both = np.concatenate([outcomes, outcomes + 1], axis=1)
    found = intervals(both, seed=1)
    for ends in found:
        assert ends.shape == (2, 3)
        np.testing.assert_allclose(ends[1], ends[0] + 1, rtol=1e-6)


def test_the_seed_decides():
    outcomes = RNG.normal(size=(50,)).astype(np.float32)
    first, same, other = (intervals(outcomes, seed=s) for s in (0, 0, 1))
    assert first == same
    assert first.low != other.low


def test_blocks_of_resamples_do_not_matter():
    outcomes = RNG.normal(size=(40, 2)).astype(np.float32)
    # More than are held at once.
    found = intervals(outcomes, seed=0, samples=120_000)
    weights = np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), 120_000)
    low, high = np.quantile(weights @ outcomes / 40, (0.025, 0.975), axis=0)
    np.testing.assert_allclose(found.low, low, rtol=1e-5)
    np.testing.assert_allclose(found.high, high, rtol=1e-5)


def test_images_without_an_outcome_do_not_count():
    outcomes = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]], np.float32)
    found = intervals(outcomes, seed=0)
    assert found.mean[0] == 2
    assert 1 <= found.low[0] <= 2 <= found.high[0] <= 3
    assert np.isnan([ends[1] for ends in found]).all()


@pytest.mark.parametrize(
    ("count", "options"), [(0, {}), (3, {"samples": 0}), (3, {"level": 1.0})]
)
def test_nothing_to_resample_is_refused(count, options):
    with pytest.raises(UsageError, match="resamples"):
        intervals(np.ones((count, 1), np.float32), seed=0, **options)
