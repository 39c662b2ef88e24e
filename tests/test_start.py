"""The measurement of starts counts the right process until the right line."""

import sys

import pytest

from benchmarks import start
from wf_vit.errors import UsageError

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc"
)

COMMAND = """
import sys, time
def work(seconds):
    while time.process_time() < seconds:
        pass
work(0.3)
print("12:00:00 step 1/9 loss 1", file=sys.stderr, flush=True)
work(float(sys.argv[1]))
sys.exit(sys.argv[1] == "0")
"""


@pytest.fixture
def command(monkeypatch, tmp_path):
    (tmp_path / "main.py").write_text(COMMAND)
    monkeypatch.setattr(start, "ROOT", tmp_path)
    return tmp_path / "cache"


def test_a_run_is_measured_to_its_first_step_or_to_its_end(command):
    assert 0.2 < start.measure(["60"], command, start.REPORTED) < 5
    assert start.measure(["0.6"], command) >= 0.5


def test_a_command_that_fails_is_an_error(command):
    with pytest.raises(UsageError, match=r"ended with 1.*step 1/9"):
        start.measure(["0"], command)
    with pytest.raises(UsageError, match="ended with 0"):
        start.measure(["0.4"], command, "never said")


def test_the_table_has_medians_and_all_values():
    text = start.table({"first step, warm": [3.0, 1.0, 2.04]})
    assert "| first step, warm | 2.0 | 3.0, 1.0, 2.0 |" in text
