"""The processes of a run watch one another: none waits for ever for one that is gone.

A collective operation waits for all processes, and JAX aborts those that wait, after a
minute or more. So each process leaves a sign of life in the working directory, which
they share, and looks at those of the others.
"""

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from wf_vit.errors import RunError, UsageError
from wf_vit.workdir import replacing

_LOG = logging.getLogger(__name__)

# In the working directory; a file for each process.
FOLDER = ".processes"

# The exit status of a process that leaves because another one is gone.
STATUS = 1

# How long a process may take to end by itself after another one has, in seconds.
_GRACE = 5.0


@contextlib.contextmanager
def watched(workdir: Path, *, seconds: float) -> Iterator[None]:
    """Ends this process if another one of the run is gone; alone it does nothing.

    It then prints which one, and leaves with ``STATUS``, whatever it waits for. The
    last checkpoint is kept. A process is watched from its first sign of life on, so
    that nothing happens where the working directory is not shared.

    Args:
      workdir: of the run.
      seconds: without a sign of life until a process counts as gone.

    """
    if jax.process_count() == 1:
        yield
        return
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    over = threading.Event()
    _LOG.info(
        "Watching the other processes of the run: %g s without a sign of life end it.",
        seconds,
    )
    thread = threading.Thread(target=_watch, args=(folder, seconds, over), daemon=True)
    thread.start()
    reason = ""
    try:
        with _aborts_explained():
            yield
    except BaseException as error:
        expected = isinstance(error, UsageError | RunError | KeyboardInterrupt)
        reason = str(error) if expected else repr(error)
        raise
    finally:
        over.set()
        thread.join()
        _write(folder, {"ended": reason})


@contextlib.contextmanager
def _aborts_explained() -> Iterator[None]:
    """Gives an abort a message, too.

    JAX aborts a process at once if process 0, which coordinates the run, is gone.
    Python's own handlers would come too late: this one is C's, through ctypes.
    """
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype = ctypes.c_void_p
    set_handler.argtypes = [ctypes.c_int, ctypes.c_void_p]
    handler = handler_type(
        lambda _: _leave(
            "JAX ended the run, since a process of it is gone (see above)."
        )
    )
    before = set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGABRT, before)


def _watch(folder: Path, seconds: float, over: threading.Event) -> None:
    """Leaves signs of life, and looks for those of the others, until it is over."""
    others = set(range(jax.process_count())) - {jax.process_index()}
    first = {index: _read(folder, index) for index in others}
    last: dict[int, tuple[dict[str, Any], float]] = {}
    beat = 0
    while not over.wait(min(seconds / 6, 5.0)):
        beat += 1
        own = {"beat": beat, "host": socket.gethostname(), "process": os.getpid()}
        _write(folder, own)
        now = time.monotonic()
        for index in sorted(others):
            sign = _read(folder, index)
            if sign is None or sign == first[index]:
                continue
            first[index] = None
            if index not in last or sign != last[index][0]:
                last[index] = (sign, now)
            silent = now - last[index][1]
            if "ended" in sign:
                if sign["ended"] and silent > _GRACE and not over.is_set():
                    _leave(f"Process {index} of the run ended: {sign['ended']}")
            elif silent > seconds and not over.is_set():
                _leave(
                    f"Process {index} of the run ({sign.get('process')} on "
                    f"{sign.get('host')}) has given no sign of life for {silent:.0f} s."
                )


def _write(folder: Path, sign: dict[str, Any]) -> None:
    # A full disk or a file server that hangs is found by what it stops.
    path = folder / f"{jax.process_index()}.json"
    with contextlib.suppress(OSError), replacing(path) as partial:
        partial.write_text(json.dumps(sign))


def _read(folder: Path, index: int) -> dict[str, Any] | None:
    try:
        sign = json.loads((folder / f"{index}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return sign if isinstance(sign, dict) else None


def _leave(message: str) -> None:
    print(
        f"Error: {message} This process ends too; the last checkpoint is kept. Start "
        "all processes again to continue.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(STATUS)
