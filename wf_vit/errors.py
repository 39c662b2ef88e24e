"""The two exceptions whose message is meant for a person: the command prints it."""


class UsageError(ValueError):
    """Something the caller gave cannot work.

    The message names what was given, what was expected and what to do next.
    The command prints it without a traceback and exits with status 2.
    """


class RunError(RuntimeError):
    """A run cannot go on: it diverged, the disk is full, a process is gone.

    The message says what happened, what is kept and what to do next. The command prints
    it without a traceback and exits with status 1.
    """
