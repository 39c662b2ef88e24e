"""What a training checkpoint holds beside the parameters, and which of them are meant.

A file may nest state dicts among optimizers, counters and arguments. One level is
opened at a time: the entry that is meant for use is taken, and the rest is named.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from wf_vit.arrays import as_array
from wf_vit.errors import UsageError
from wf_vit.models.pretrained import guards

_LOG = logging.getLogger(__name__)

_MOST_LEVELS = 32

# Entries that hold the parameters, in the order in which they are preferred: averages
# first (as timm does), then the teachers that self-distilled models are used by.
ENTRIES = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "params_ema",
    "ema_params",
    "ema",
    "teacher",
    "target_encoder",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "backbone",
    "encoder",
    "params",
    "student",
)


def arrays_in(content: Any, *, which: str | None) -> dict[str, np.ndarray]:
    """Returns the parameters by name.

    Args:
      content: a state dict, or what a training checkpoint wraps it in.
      which: the entry that is meant, such as "student" or "state_dict", where there
        are several; None for the first of ``ENTRIES`` that is there.

    Returns:
      The arrays under their own names.

    Raises:
      UsageError: there are no arrays, or no entry of the name ``which``.
    """
    if not isinstance(content, Mapping):
        raise UsageError(
            f"The checkpoint holds a {type(content).__name__}, expected a state dict, "
            "parameters by name: save model.state_dict()."
        )
    if which is not None:
        content = _entry(content, which)
    while True:
        entries = _entries(content)
        known = [name for name in ENTRIES if name in entries]
        if not known and any(_is_array(value) for value in content.values()):
            break
        if not known and len(entries) == 1:
            known = list(entries)
        if not known:
            raise UsageError(
                f"There is no array by name in {sorted(map(str, content))[:8]}, nor in "
                f"an entry of a known name ({', '.join(ENTRIES[:12])} ...): pass "
                "which= for the entry of the parameters, or save model.state_dict()."
            )
        chosen, *rest = known
        if rest:
            _LOG.warning(
                "The checkpoint holds %s and %s: %s is taken; pass which= for another.",
                chosen,
                " and ".join(rest),
                chosen,
            )
        content = entries[chosen]
    guards.check_names(map(str, content), "The checkpoint")
    arrays = {
        str(name): _to_numpy(value, str(name))
        for name, value in content.items()
        if hasattr(value, "shape") and hasattr(value, "dtype")
    }
    rest = [str(name) for name in content if str(name) not in arrays]
    if rest:
        _LOG.info("Left out, as it is no array: %s.", ", ".join(rest[:8]))
    return arrays


def bytes_in(content: Any) -> int:
    """Returns the size of all arrays by name, at any depth, as their shapes say it."""
    return sum(value.nbytes for value in _values(content) if _is_array(value))


def _to_numpy(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(as_array(value, name))
    except (NotImplementedError, RuntimeError, TypeError) as error:
        # PyTorch has kinds that NumPy lacks: quantised, sparse, of 8 bits, on "meta".
        raise UsageError(
            f"{name} is {value.dtype} {tuple(value.shape)}, which has no equal in "
            f"NumPy: convert it to float32 first. ({error})"
        ) from error


def _is_array(value: Any) -> bool:
    """Whether a value is an array of numbers, and not one number alone."""
    return bool(getattr(value, "shape", ()))


def _values(content: Any) -> Iterator[Any]:
    """Yields what a mapping holds by text, at any depth, each mapping once.

    Raises:
      UsageError: it is nested too deeply to be a checkpoint.
    """
    # A stack of its own, and a memory: files may nest as deeply, or repeat an entry as
    # often, as they like.
    stack, seen = [(content, 0)], set()
    while stack:
        value, depth = stack.pop()
        if not isinstance(value, Mapping):
            yield value
        elif depth > _MOST_LEVELS:
            raise UsageError(
                f"The checkpoint nests more than {_MOST_LEVELS} levels of entries: "
                "save model.state_dict()."
            )
        elif id(value) not in seen:
            seen.add(id(value))
            stack += [(v, depth + 1) for n, v in value.items() if isinstance(n, str)]


def _entries(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Returns the entries of one level that hold arrays by name, at any depth."""
    return {
        str(name): value
        for name, value in content.items()
        if isinstance(value, Mapping) and any(map(_is_array, _values(value)))
    }


def _entry(content: Mapping[Any, Any], wanted: str) -> Mapping[Any, Any]:
    """Returns the entry of a name, at any depth; raises UsageError without one."""
    level, seen = [content], []
    for _ in range(_MOST_LEVELS):
        entries = [_entries(c) for c in level]
        for found in entries:
            if wanted in found:
                return found[wanted]
            seen += found
        # An entry that is there under many names is looked into once.
        level = list({id(v): v for found in entries for v in found.values()}.values())
    raise UsageError(
        f"which is {wanted!r}, but the checkpoint has "
        f"{', '.join(map(repr, seen)) or 'no entries, only parameters'}: name one of "
        "those, or leave it out."
    )
