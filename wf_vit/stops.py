"""Stop signals: what SIGTERM and SIGINT do to a run of the command.

A scheduler that takes a machine away sends SIGTERM; Ctrl-C sends SIGINT. Both ask a run
to stop. Where work would be lost (``deferred``), it stops at the next safe place, which
it finds by asking (``asked``, ``check``). Elsewhere it stops at once. A second signal
leaves at once from anywhere.

Nothing of this happens unless the command has switched it on (``handled``): a notebook
keeps its own Ctrl-C.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_LOG = logging.getLogger(__name__)

# The command's exit status after a stop: EX_TEMPFAIL, "run it again".
STATUS = 75

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# How long it may then take to clean up. The exception of a signal is lost if it comes
# within a destructor, and then nothing else would end the run.
_CLEANING = 30.0

# How long a run that has nothing to save may take to notice a signal, in seconds. It
# notices none while it compiles, which can take minutes.
_PATIENCE = 3.0


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and did; the message says what is kept.

    It is a ``KeyboardInterrupt``, which libraries let pass and clean up after.
    """


class _Signals:
    """What one ``handled`` has seen, and whether it may be answered at once."""

    def __init__(self):
        self.asked = ""  # The name of the first signal.
        self.deferrals = 0
        self.noticed = threading.Event()


# Of the ``handled`` that is open; of none, nothing is ever asked.
_NONE = _Signals()
_current = _NONE


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Makes SIGTERM and SIGINT ask for a stop, as long as the context is open.

    Within another one, and outside of the main thread, it does nothing.
    """
    global _current
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or _current is not _NONE:
        yield
        return
    _current = _Signals()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    # Python's handlers wait for the main thread, which may be busy in XLA. What arrives
    # here is seen by another thread at once.
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _notice) for number in _SIGNALS}
    threading.Thread(target=_watch, args=(ours, _current), daemon=True).start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        theirs.close()  # The thread ends.
        _current = _NONE


def handle_again() -> None:
    """Takes the signals back from a library that took them from ``handled``."""
    if _current is not _NONE:
        for number in _SIGNALS:
            signal.signal(number, _notice)


def asked() -> str:
    """Returns the name of the signal that asked for a stop, or ''."""
    return _current.asked


def check(kept: str) -> None:
    """Stops here if a stop was asked for.

    Args:
      kept: what is kept, such as "Saved step 200."

    Raises:
      Stopped: it was.
    """
    if _current.asked:
        raise stopped(kept)


def stopped(kept: str) -> Stopped:
    """Returns what to raise at a stop; ``kept`` says what is kept."""
    by = _current.asked or "another process"
    return Stopped(f"Stopped by {by}. {kept} Run the same command again to continue.")


@contextlib.contextmanager
def deferred(kept: str) -> Iterator[None]:
    """Lets no signal interrupt what is inside; it asks by itself.

    Args:
      kept: what is kept when the inside has ended, see ``check``.

    Raises:
      Stopped: at the end, if a stop was asked for and the inside did not look.
    """
    check("What was finished is kept.")
    _current.deferrals += 1
    try:
        yield
    finally:
        _current.deferrals -= 1
    check(kept)


def _notice(number: int, frame: FrameType | None) -> None:
    """Python's handler, in the main thread."""
    del frame
    _current.noticed.set()
    _current.asked = _current.asked or signal.Signals(number).name
    if not _current.deferrals:
        raise stopped("What was finished is kept.")


def _watch(ours: socket.socket, seen: _Signals) -> None:
    """Sees every signal as it comes, whatever the main thread does."""
    count = 0
    while received := _received(ours, seen):
        if received[0] not in _SIGNALS:
            continue
        count += 1
        name = signal.Signals(received[0]).name
        seen.asked = seen.asked or name
        if count > 1:
            _leave(f"Left at once by a second {name}.", 128 + received[0])
        elif seen.deferrals:
            _LOG.info("Stopping soon, by %s; a second signal leaves at once.", name)
        elif not seen.noticed.wait(_PATIENCE):
            _leave(str(stopped("What was finished is kept.")), STATUS)
        else:
            ours.settimeout(_CLEANING)
    ours.close()


def _received(ours: socket.socket, seen: _Signals) -> bytes:
    """Returns the next signal; leaves if a run that should have stopped goes on."""
    while True:
        try:
            return ours.recv(1)
        except TimeoutError:
            if not seen.deferrals:
                _leave(str(stopped("What was finished is kept.")), STATUS)


def _leave(message: str, status: int) -> None:
    """Ends the process, whatever its threads do."""
    print(message, file=sys.stderr, flush=True)
    os._exit(status)
