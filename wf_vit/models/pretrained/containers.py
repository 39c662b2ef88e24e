"""What a training checkpoint holds beside the parameters, and which of them are meant.

A file may nest state dicts among optimizers, counters and arguments. One level is
opened at a time: the entry that is meant for use is taken, and the rest is named.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from wf_vit.arrays import as_array
from wf_vit.errors import UsageError

_LOG = logging.getLogger(__name__)

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
    arrays = {
        str(name): np.asarray(as_array(value, str(name)))
        for name, value in content.items()
        if hasattr(value, "shape") and hasattr(value, "dtype")
    }
    rest = [str(name) for name in content if str(name) not in arrays]
    if rest:
        _LOG.info("Left out, as it is no array: %s.", ", ".join(rest[:8]))
    return arrays


def _is_array(value: Any) -> bool:
    """Whether a value is an array of numbers, and not one number alone."""
    return bool(getattr(value, "shape", ()))


def _entries(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Returns the entries of one level that hold arrays by name, at any depth."""

    def holds(value: Mapping[Any, Any]) -> bool:
        return any(
            isinstance(name, str)
            and (_is_array(inner) or (isinstance(inner, Mapping) and holds(inner)))
            for name, inner in value.items()
        )

    return {
        str(name): value
        for name, value in content.items()
        if isinstance(value, Mapping) and holds(value)
    }


def _entry(content: Mapping[Any, Any], wanted: str) -> Mapping[Any, Any]:
    """Returns the entry of a name, at any depth; raises UsageError without one."""
    level, seen = [content], []
    while level:
        entries = [_entries(c) for c in level]
        for found in entries:
            if wanted in found:
                return found[wanted]
            seen += found
        level = [value for found in entries for value in found.values()]
    raise UsageError(
        f"which is {wanted!r}, but the checkpoint has "
        f"{', '.join(map(repr, seen)) or 'no entries, only parameters'}: name one of "
        "those, or leave it out."
    )
