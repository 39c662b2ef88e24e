"""What comes in: shapes are always checked, values outside of ``jax.jit`` only."""

import inspect
from functools import wraps

import jax
import jax.numpy as jnp

from wf_vit.arrays import takes_arrays
from wf_vit.errors import UsageError

# A softmax in bfloat16 leaves rows up to 4e-3 away from 1.
_ROW_SUM_TOLERANCE = 1e-2
_FINITE = (
    "values",
    "output_kernel",
    "residual_scale",
    "cotangents",
    "gradients",
    "head_gain",
    "token_scale",
)


# Arguments that may be arrays from anywhere.
ARRAYS = ("attention", *_FINITE)


def checked(*static: str):
    """Compiles a function of attention; checks the values it gets outside of jit.

    Its arrays may come from anywhere (`wf_vit.arrays`).
    """

    def decorate(function):
        compiled = jax.jit(function, static_argnames=static)
        names = tuple(inspect.signature(function).parameters)

        @takes_arrays(*ARRAYS)
        @wraps(function)
        def checked(*args, **kwargs):
            # First, because tracing reports shapes and options that do not fit.
            result = compiled(*args, **kwargs)
            for name, value in (dict(zip(names, args, strict=False)) | kwargs).items():
                if name == "attention":
                    _check_distributions(value)
                elif name in _FINITE:
                    _check_finite(name, value)
            return result

        return checked

    return decorate


def count_tokens(attention, num_prefix_tokens) -> int:
    """Returns N; raises UsageError unless some of the tokens are patches."""
    shape = attention.shape
    if len(shape) < 3 or shape[-1] != shape[-2]:
        raise UsageError(
            f"attention has shape {shape}, expected [..., H, N, N]: reorder its axes, "
            "and keep the head axis even for one head."
        )
    if not 0 <= num_prefix_tokens < shape[-1]:
        raise UsageError(
            f"num_prefix_tokens is {num_prefix_tokens} with {shape[-1]} tokens, which "
            "leaves no patches: count the CLS, register and distillation tokens."
        )
    return shape[-1]


def check_shapes(attention, values, output_kernel, residual_scale, cotangents=None):
    """Raises UsageError unless the arrays belong to the same layers."""
    *batch, heads, tokens, _ = attention.shape
    *_, head_width, width = (0, 0, *output_kernel.shape)
    layer = batch[:1] if output_kernel.ndim == 4 else []
    for name, array, letters, *shapes in (
        ("output_kernel", output_kernel, "H, K, D", (*layer, heads, head_width, width)),
        ("values", values, "N, H, K", (*batch, tokens, heads, head_width)),
        ("residual_scale", residual_scale, "D", (width,), (*layer, width)),
        ("cotangents", cotangents, "N, D", (*batch, tokens, width)),
    ):
        if array is not None and array.shape not in shapes:
            raise UsageError(
                f"{name} has shape {array.shape}, expected [..., {letters}] = "
                f"{shapes[-1]} beside attention of shape {attention.shape} and "
                f"output_kernel of shape {output_kernel.shape}: pass the arrays of the "
                "same layers, layers in front."
            )


@jax.jit
def _row_error(attention):
    attention = attention.astype(jnp.float32)
    return jnp.abs(attention.sum(-1) - 1).max(), attention.min()


@jax.jit
def _all_finite(array):
    return jnp.isfinite(array).all()


def _is_traced(array) -> bool:
    return isinstance(array, jax.core.Tracer)


def _check_distributions(attention):
    if _is_traced(attention):
        return
    # Recorded arrays may be constants of a function that is being traced.
    with jax.ensure_compile_time_eval():
        error, minimum = (float(x) for x in _row_error(attention))
        if error <= _ROW_SUM_TOLERANCE and minimum >= 0:
            return
        if not _all_finite(attention):
            found = "contains NaN or infinity: find out where the model produced it"
        elif minimum < 0:
            found = "contains negative numbers: pass the weights after the softmax"
        elif _row_error(jnp.swapaxes(attention, -1, -2))[0] <= _ROW_SUM_TOLERANCE:
            found = "has columns that sum to 1, not rows: swap its last two axes"
        else:
            found = (
                f"has rows up to {error:.3g} away from summing to 1: pass the weights "
                "after the softmax and before dropout, of all tokens"
            )
    raise UsageError(
        f"attention of shape {attention.shape} {found}; expected rows that are "
        "distributions over the keys."
    )


def _check_finite(name, array):
    if array is None or _is_traced(array):
        return
    with jax.ensure_compile_time_eval():
        finite = bool(_all_finite(array))
    if not finite:
        raise UsageError(
            f"{name} of shape {array.shape} contains NaN or infinity, expected finite "
            "numbers: find out where the model produced it."
        )
