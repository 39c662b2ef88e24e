"""Cases of tests that the default run leaves to `pytest -m slow`."""

from typing import Any

import pytest


def slow(*values: Any):
    """Returns a case that is one more of its kind: a default case does what it does."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(cases, *kept: Any) -> list[Any]:
    """Returns cases, of which those that are not ``kept`` are slow."""
    return [case if case in kept else slow(*_values(case)) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
