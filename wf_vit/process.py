"""How the command sets up its own process, so that it starts and runs sooner.

Only the command does this. A program that uses the package as a library decides for
itself.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

# Of glibc's malloc.h, for mallopt.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST = 2**31 - 1
# With one of these, a user has set up the allocator.
_USERS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")

_LEGACY_KERAS = "TF_USE_LEGACY_KERAS"


def keep_memory() -> bool:
    """Lets the process keep the memory that it frees, for its next need.

    On a CPU each training step needs hundreds of megabytes for a moment. glibc hands
    them back to the system after each step, which then clears them again, page by page:
    a quarter of the CPU time of a step. Call it before threads are started.

    Returns:
      Whether it was done: not without glibc, nor if an environment variable of the user
      sets up the allocator.
    """
    if any(name.startswith(_USERS) for name in os.environ):
        return False
    if not sys.platform.startswith("linux"):
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


@contextlib.contextmanager
def without_keras() -> Iterator[None]:
    """Keeps TensorFlow from loading Keras when it is imported inside.

    It does so for saved models, of which there are none here, and loads Matplotlib's
    and scikit-learn's parts with it: a third of its import. ``tf.keras`` is still there
    for who asks for it. A value of the variable that the user has set stays.
    """
    if _LEGACY_KERAS in os.environ:
        yield
        return
    # The Keras of old is a package of its own, which hardly anyone has.
    os.environ[_LEGACY_KERAS] = "1"
    try:
        yield
    finally:
        os.environ.pop(_LEGACY_KERAS, None)
