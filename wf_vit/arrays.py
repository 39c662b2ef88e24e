"""Arrays from anywhere: of JAX, NumPy or PyTorch, and one for each layer.

PyTorch is never imported: a tensor is known by its methods.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from wf_vit.errors import UsageError

_Function = TypeVar("_Function", bound=Callable)

# What functions that convert take: an array of JAX, NumPy or PyTorch, or a list of the
# arrays of all layers.
AnyArray = Any

_NO_ATTENTION = (
    "Attention that is computed in one fused kernel is not returned. In transformers, "
    'pass attn_implementation="eager" to from_pretrained and output_attentions=True '
    "to the model; in timm, call timm.layers.set_fused_attn(False) before the model "
    "is made."
)


def as_array(values: AnyArray, name: str) -> jax.Array | np.ndarray:
    """Returns an array of JAX or NumPy; inside ``jax.jit`` what it is given.

    Args:
      values: an array of JAX or NumPy, a tensor of PyTorch on any device, or a list or
        tuple of these, one for each layer, which are stacked.
      name: of the argument, for the messages.

    Raises:
      UsageError: it is no array, an empty list, a list with None in it, or the arrays
        in it differ in shape.
    """
    if isinstance(values, jax.Array | np.ndarray):
        return values
    if is_tensor(values):
        return _from_torch(values)
    if isinstance(values, list | tuple):
        return _stacked(values, name)
    if values is None:
        raise UsageError(f"{name} is None, expected an array. {_NO_ATTENTION}")
    if isinstance(values, np.generic) or hasattr(values, "__array__"):
        return np.asarray(values)
    raise UsageError(
        f"{name} is a {type(values).__name__}, expected an array of JAX, NumPy or "
        "PyTorch, or a list with one for each layer."
    )


def takes_arrays(*names: str) -> Callable[[_Function], _Function]:
    """Lets a function take arrays from anywhere as some of its arguments."""

    def decorate(function: _Function) -> _Function:
        parameters = inspect.signature(function).parameters

        def convert(name: str, value: Any) -> Any:
            optional = name in parameters and parameters[name].default is None
            # A function may stand for an array: the probes of a propagation.
            if name not in names or callable(value) or (value is None and optional):
                return value
            return jnp.asarray(as_array(value, name))

        @functools.wraps(function)
        def converting(*args, **kwargs):
            named = dict(zip(parameters, args, strict=False))
            args = [convert(name, value) for name, value in named.items()]
            kwargs = {name: convert(name, value) for name, value in kwargs.items()}
            return function(*args, **kwargs)

        return converting

    return decorate


def check_keys(key: Any, count: int) -> None:
    """Raises UsageError unless a key is one for all images, or one for each.

    Args:
      key: of ``jax.random``.
      count: of images.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise UsageError(
            f"key is an array of {key.dtype}, expected a key: pass "
            "jax.random.key(seed) in place of jax.random.PRNGKey(seed)."
        )
    if key.shape not in ((), (count,)):
        raise UsageError(
            f"key has the shape {key.shape}, expected () or ({count},): pass one key "
            f"for all {count} images, or jax.random.split(key, {count})."
        )


def is_tensor(values: Any) -> bool:
    """Whether something is a tensor of PyTorch."""
    return all(hasattr(values, method) for method in ("detach", "cpu", "numpy"))


def is_module(values: Any) -> bool:
    """Whether something is a module of PyTorch."""
    return callable(getattr(values, "state_dict", None))


def shapes_of(values: tuple) -> str:
    """Returns the members of a named tuple by shape and dtype: a short ``repr``."""
    members = (
        f"{name}={_shape_of(value)}"
        for name, value in zip(values._fields, values, strict=True)
    )
    return f"{type(values).__name__}({', '.join(members)})"


def _shape_of(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {_shape_of(v)}" for key, v in value.items())
        return f"{{{inner}}}"
    return repr(value)


def _from_torch(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16.
    return (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()


def _stacked(values: Sequence[Any], name: str) -> jax.Array | np.ndarray:
    if not values:
        raise UsageError(
            f"{name} is an empty {type(values).__name__}, expected one array for each "
            f"layer. {_NO_ATTENTION}"
        )
    missing = [layer for layer, value in enumerate(values) if value is None]
    if missing:
        raise UsageError(
            f"{name} is None in the layers {missing}, expected one array for each "
            f"layer. {_NO_ATTENTION}"
        )
    if not all(hasattr(value, "shape") for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise UsageError(
            f"{name} is a list of {kinds}, expected an array, or a list with one array "
            "for each layer: convert it with numpy.asarray."
        )
    layers = [as_array(value, name) for value in values]
    shapes = list(dict.fromkeys(layer.shape for layer in layers))
    if len(shapes) > 1:
        raise UsageError(
            f"{name} has layers of the shapes {', '.join(map(str, shapes))}, expected "
            "one shape: pass the layers of a hierarchical model one by one."
        )
    if any(isinstance(layer, jax.Array) for layer in layers):
        return jnp.stack(layers)
    return np.stack(layers)
