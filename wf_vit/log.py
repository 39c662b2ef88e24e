"""What the command prints of its own, and of its libraries."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import absl.logging
from absl import flags

from wf_vit import stops


def show_own_log() -> None:
    """Shows what this program logs, and of its libraries only the errors.

    What TensorFlow logs is up to two variables, which it reads when it is imported:
    values that the user has set stay.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only
    # It announces oneDNN whatever the level. Here it decodes and crops images only,
    # which oneDNN has no part in.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Else absl warns of what is logged before.
    absl.logging.set_verbosity(absl.logging.ERROR)
    absl.logging.use_absl_handler()
    formatter = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    absl.logging.get_absl_handler().setFormatter(formatter)
    logging.getLogger("wf_vit").setLevel(logging.INFO)
    _hide_abandoned_operations()


def _hide_abandoned_operations() -> None:
    """Hides what Orbax prints after a failure has been raised.

    One array that cannot be read or written ends the operation, and what was still on
    its way to the others then finds no event loop: a traceback for each of them.
    """
    show = sys.unraisablehook
    if getattr(show, "__name__", "") == _show_unless_abandoned.__name__:
        return
    sys.unraisablehook = functools.wraps(_show_unless_abandoned)(
        functools.partial(_show_unless_abandoned, show)
    )


def _show_unless_abandoned(show: Callable[[Any], None], unraisable: Any) -> None:
    # A stop that was raised where Python lets nothing through is answered later.
    stop = isinstance(unraisable.exc_value, stops.Stopped)
    if not stop and str(unraisable.exc_value) != "Event loop is closed":
        show(unraisable)
