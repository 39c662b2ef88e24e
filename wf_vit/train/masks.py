"""Means over the real examples of the global batch, wherever they lie."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def weights_of(mask: Bool[Array, " b"], axis: str) -> Float[Array, " b"]:
    """Returns weights by which a mean over all examples is one over the real ones.

    The devices of the axis, and equal parts of each one's batch, take the weighted mean
    of what they have; the mean of these is then that over the real examples of the
    global batch, or 0 if there is none.

    Args:
      mask: of this device's examples; false: not real.
      axis: name of the mapped axis.
    """
    mask = mask.astype(jnp.float32)
    share = jax.lax.pmean(mask.mean(), axis)
    return jnp.where(share > 0, mask / jnp.maximum(share, jnp.finfo(share).tiny), 0)


def mean_over(
    values: Float[Array, " B *rest"], weights: Float[Array, " b"] | None
) -> Float[Array, ""]:
    """Returns the mean of all values, each weighted by its example's weight.

    Args:
      values: of each example, or one for all of them.
      weights: of the examples (``weights_of``); None: all are real.
    """
    if weights is None:
        return values.mean()
    return (values.reshape(len(values), -1).mean(-1) * weights).mean()
