"""Intervals of means over images, by the bootstrap."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from wf_vit.errors import UsageError

# Numbers of one block of resamples that are held at once.
_BLOCK = 4_000_000


class Interval(NamedTuple):
    """A mean, and the percentile interval of the bootstrap (Efron 1979).

    Attributes:
      mean: over the images.
      low: lower end of the interval.
      high: upper end.
    """

    mean: Float[np.ndarray, "*conditions"]
    low: Float[np.ndarray, "*conditions"]
    high: Float[np.ndarray, "*conditions"]


def intervals(
    outcomes: Float[np.ndarray, " images *conditions"],
    *,
    seed: int,
    samples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Returns the mean over images of each condition, with its interval.

    Images are drawn with replacement, the same ones for all conditions. Intervals of a
    difference are those of the outcomes' differences, which pair the conditions.

    Args:
      outcomes: for each image and condition; NaN where an image says nothing.
      seed: of the resampling.
      samples: resamples.
      level: share of the resampled means that lies within the interval.

    Returns:
      The means; NaN for conditions that no image has.

    Raises:
      UsageError: no images, no resamples or a level out of range.
    """
    if not len(outcomes) or samples < 1 or not 0 < level < 1:
        raise UsageError(
            f"There are {len(outcomes)} images, {samples} resamples and a level of "
            f"{level}, expected at least 1 of both and a level between 0 and 1."
        )
    flat = outcomes.reshape(len(outcomes), -1).astype(np.float64)
    counted = np.isfinite(flat)
    flat = np.where(counted, flat, 0.0)
    rng = np.random.default_rng(seed)
    uniform = np.full(len(flat), 1 / len(flat))
    block = max(1, _BLOCK // len(flat))
    means = np.concatenate(
        [
            _means(
                rng.multinomial(len(flat), uniform, min(block, samples - start)),
                flat,
                counted,
            )
            for start in range(0, samples, block)
        ]
    )
    tail = (1 - level) / 2
    shape = outcomes.shape[1:]
    mean = _means(np.ones((1, len(flat))), flat, counted)[0]
    # A resample may have none of the few images that count.
    means = np.where(np.isnan(means), mean, means)
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return Interval(mean.reshape(shape), low.reshape(shape), high.reshape(shape))


def _means(weights, values, counted):
    """Returns weighted means over images, ``[resamples, conditions]``."""
    total = weights @ counted.astype(np.float64)
    return (weights @ values) / np.where(total > 0, total, np.nan)
