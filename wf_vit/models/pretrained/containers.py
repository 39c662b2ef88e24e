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
    wanted = which
    while True:
        if not isinstance(content, Mapping):
            raise UsageError(
                f"The checkpoint holds a {type(content).__name__}, expected a state "
                "dict, parameters by name: save model.state_dict()."
            )
        entries = {
            str(name): value
            for name, value in content.items()
            if isinstance(value, Mapping) and _holds_arrays(value)
        }
        if wanted is not None and wanted in entries:
            chosen, wanted = wanted, None
        elif any(hasattr(value, "shape") and value.shape for value in content.values()):
            break
        else:
            chosen = next((name for name in ENTRIES if name in entries), None)
            if chosen is None and len(entries) == 1:
                (chosen,) = entries
        if chosen is None:
            raise UsageError(
                f"There is no array by name in {sorted(map(str, content))[:8]}, nor in "
                f"an entry of a known name ({', '.join(ENTRIES[:12])} ...): pass "
                "which= for the entry of the parameters, or save model.state_dict()."
            )
        rest = [name for name in ENTRIES if name in entries and name != chosen]
        if rest and which is None:
            _LOG.warning(
                "The checkpoint holds %s and %s: %s is taken; pass which= for another.",
                chosen,
                " and ".join(rest),
                chosen,
            )
        content = content[chosen]
    if wanted is not None:
        raise UsageError(
            f"which is {wanted!r}, but the checkpoint has "
            f"{', '.join(map(repr, entries)) or 'no entries, only parameters'}: name "
            "one of those, or leave it out."
        )
    arrays = {
        str(name): np.asarray(as_array(value, str(name)))
        for name, value in content.items()
        if hasattr(value, "shape") and hasattr(value, "dtype")
    }
    rest = [str(name) for name in content if str(name) not in arrays]
    if rest:
        _LOG.info("Left out, as it is no array: %s.", ", ".join(rest[:8]))
    return arrays


def _holds_arrays(value: Mapping[Any, Any]) -> bool:
    """Whether there are arrays by name in it, or in an entry of it."""
    return any(
        isinstance(name, str)
        and (
            (hasattr(inner, "shape") and bool(inner.shape))
            or (isinstance(inner, Mapping) and _holds_arrays(inner))
        )
        for name, inner in value.items()
    )
