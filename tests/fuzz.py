"""Random inputs, drawn by hypothesis: a few by default, thousands when asked for.

A test takes the parameter ``examples`` from ``AMOUNTS``; CONTRIBUTING.md has the
command for the thousands.
"""

import hypothesis
import pytest

AMOUNTS = pytest.mark.parametrize(
    "examples",
    [
        pytest.param(15, id="few"),
        pytest.param(2000, id="many", marks=pytest.mark.slow),
    ],
)


def fuzz(check, examples, **strategies):
    """Calls ``check`` with values of the strategies; the few are always the same."""
    options = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 100,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    options(hypothesis.given(**strategies)(check))()
