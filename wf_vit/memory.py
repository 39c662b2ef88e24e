"""How the command lets its process keep the memory that it frees.

Only the command does this. A program that uses the package as a library decides for
itself.
"""

import ctypes
import importlib.util
import os
import sys
from importlib import metadata

# Of glibc's malloc.h, for mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST = 2**31 - 1
# With one of these, a user has set up the allocator.
_USERS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep() -> bool:
    """Lets a process that computes on a CPU keep what it frees, for its next need.

    Each training step needs hundreds of megabytes for a moment. glibc hands them back
    to the system after the step, and the system clears them for the next one, page by
    page. Call it before JAX starts its threads; for threads that run it is too late.

    Returns:
      Whether it was done: not where JAX can use an accelerator, not without glibc, nor
      if an environment variable of the user sets up the allocator.
    """
    if any(name.startswith(_USERS) for name in os.environ):
        return False
    if not sys.platform.startswith("linux") or _has_accelerator_plugin():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # Another C library.
        return False
    # Large blocks lie on the heap. Only the first arena's heap may grow without limit,
    # so that all threads share it.
    options = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST}
    done = [mallopt(name, value) for name, value in options.items()]
    return all(done)


def _has_accelerator_plugin() -> bool:
    """Whether what JAX drives a GPU or TPU with is installed."""
    if metadata.entry_points(group="jax_plugins"):
        return True
    return any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
