"""Sums, products and roots that are fast on CPUs and exact everywhere.

Squares leave the range of float32 long before their numbers do. So a matrix is first
split into numbers near 1 and a power of two, which is exact.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

# Accelerators multiply float32 in fewer bits unless told otherwise.
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def drop_prefix(matrix, num_prefix_tokens):
    """Returns the rows and columns of the patches."""
    return matrix[..., num_prefix_tokens:, num_prefix_tokens:]


def mean_of_heads(heads):
    """Returns the mean of a list of arrays."""
    # On CPUs several times faster than a reduction over the axis of heads.
    return sum(heads) / len(heads)


def row_products(left, right):
    """Returns the sums of ``left * right`` over the last axis."""
    # On CPUs a product with ones takes half the time of a sum over the last axis.
    return einsum("...k,k->...", left * right, jnp.ones(left.shape[-1], left.dtype))


# Of float32: the exponent of 1, and where subnormal numbers and infinity begin.
_BIAS, _FRACTION, _INFINITY = 127, 23, 0x7F800000
# Subnormal numbers, which many devices take for 0, become normal by this power.
_LIFT = 64


def split(array, axis):
    """Returns numbers of 0 or up to 4, and exponents: their product is the array.

    Args:
      array: of any floats; taken as float32.
      axis: one or several, over which the largest number is between 2 and 4.

    Returns:
      ``numbers`` and whole ``exponents``, which have a length of 1 on the axes, with
      ``array = numbers * 2 ** exponents``, exactly but for numbers below 2^-63 of the
      largest. NaN and infinity stay.
    """
    array = array.astype(jnp.float32)
    bits = lax.bitcast_convert_type(lax.stop_gradient(array), jnp.int32)
    top = (bits & 0x7FFFFFFF).max(axis, keepdims=True)
    small = (top >> _FRACTION) < _LIFT
    top = jnp.where(small, _bits(_lift(top)), top)
    exponent = jnp.clip(top >> _FRACTION, 1, 2 * _BIAS)
    scale = lax.bitcast_convert_type((255 - exponent) << _FRACTION, jnp.float32)
    lifted = array * 2.0**_LIFT
    # The gradient is that of a product; the numbers are right for subnormal ones too.
    lifted += lax.stop_gradient(_lift(bits) - lifted)
    numbers = jnp.where(small, lifted, array) * scale
    return numbers, exponent - 128 - jnp.where(small, _LIFT, 0)


def join(numbers, exponents):
    """Returns ``numbers * 2 ** exponents``, at most the largest float32."""
    # In two steps, neither of which leaves the range if the result does not.
    half = exponents // 2
    result = numbers * power(half) * power(exponents - half)
    largest = jnp.finfo(jnp.float32).max
    return jnp.clip(result, -largest, largest)


def power(exponents):
    """Returns 2 to whole powers, which are taken as -126 at least and 127 at most."""
    biased = jnp.clip(exponents, 1 - _BIAS, _BIAS) + _BIAS
    return lax.bitcast_convert_type(biased << _FRACTION, jnp.float32)


def _bits(array):
    return lax.bitcast_convert_type(array, jnp.int32)


def _lift(bits):
    """Returns numbers times 2^64, from their bits: multiplying may lose small ones."""
    plain = lax.bitcast_convert_type(bits, jnp.float32) * 2.0**_LIFT
    subnormal = (bits & 0x7FFFFF).astype(jnp.float32) * 2.0 ** (_LIFT - 149)
    subnormal = jnp.where(bits < 0, -subnormal, subnormal)
    return jnp.where((bits & _INFINITY) == 0, subnormal, plain)


def normalize_rows(impact):
    """Returns rows that sum to 1; a row of zeros stays so."""
    impact = split(impact, -1)[0]
    total = impact.sum(-1, keepdims=True)
    return impact / jnp.where(total > 0, total, 1.0)


def sqrt(square):
    """Square root that is 0, and so is its gradient, where rounding leaves nothing."""
    positive = ~(square <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
