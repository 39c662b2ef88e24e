"""Signals: asked for where work would be lost, at once elsewhere."""

import contextlib
import os
import signal
import threading
import time

import pytest

from wf_vit import stops


def send(number=signal.SIGTERM):
    """Sends this process a signal, and waits until Python has seen it."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)


def signalled(body, *, kept=None):
    """Returns the exception with which ``body`` ends, which sends a signal."""
    region = stops.deferred(kept) if kept else contextlib.nullcontext()
    with pytest.raises(BaseException) as caught, stops.handled(), region:  # noqa: PT011
        body()
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_what_has_nothing_to_save(number):
    done = []

    def body():
        send(number)
        done.append("went on")

    error = signalled(body)
    assert isinstance(error, stops.Stopped)
    assert str(error).startswith(f"Stopped by {number.name}. What was finished is kept")
    assert not done


def test_what_has_something_to_save_is_asked_to_stop():
    def body():
        assert not stops.asked()
        send()
        assert stops.asked() == "SIGTERM"
        stops.check("Saved step 3.")

    error = signalled(body, kept="All is saved.")
    assert isinstance(error, stops.Stopped)
    assert str(error).startswith("Stopped by SIGTERM. Saved step 3. Run the same")


def test_a_stop_that_was_not_looked_for_comes_at_the_end():
    done = []

    def body():
        send()
        done.append("the rest")

    assert "All is saved" in str(signalled(body, kept="All is saved."))
    assert done == ["the rest"]


def test_an_error_is_not_hidden_by_a_stop():
    def body():
        send()
        raise ValueError("an error of its own")

    assert isinstance(signalled(body, kept="All is saved."), ValueError)


@pytest.fixture
def interruptible():
    """Ctrl-C is heard, also where a shell runs the tests in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_handlers_of_before_are_there_again():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stops.handled():
        with stops.handled():  # Once is enough.
            pass
        assert signal.getsignal(signal.SIGINT) is not before[0]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # As a library may do.
        stops.handle_again()
        with pytest.raises(stops.Stopped):
            send()

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not stops.asked()
    with pytest.raises(KeyboardInterrupt):  # As in any program.
        send(signal.SIGINT)


def test_without_the_command_nothing_is_handled():
    with stops.deferred("Nothing."):
        assert not stops.asked()
    stops.check("Nothing.")


def test_other_threads_leave_the_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def inside():
        with stops.handled():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_is_lost_in_a_destructor_is_answered_later():
    """Python lets no exception out of it."""

    class Dying:
        def __del__(self):
            send()

    def body():
        Dying()
        assert stops.asked() == "SIGTERM"
        with stops.deferred("Never reached."):
            pass

    error = signalled(body)
    assert isinstance(error, stops.Stopped)
    assert "What was finished is kept" in str(error)
