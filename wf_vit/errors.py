"""The one exception that means "the input is wrong, here is what to do"."""


class UsageError(ValueError):
    """Something the caller gave cannot work.

    The message names what was given, what was expected and what to do next.
    The command prints it without a traceback and exits with status 2.
    """
