"""The command keeps the memory that it frees, where nobody else decides."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from wf_vit import memory

ROOT = Path(__file__).resolve().parents[1]

# Needs 64 MiB for a moment, twice; how many pages the system cleared the second time.
FAULTS = """
import ctypes, resource
from wf_vit import memory
print(memory.keep())
def need():
    block = ctypes.CDLL(None).malloc
    block.restype = ctypes.c_void_p
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    found = block(ctypes.c_size_t(2**26))
    ctypes.memset(found, 1, 2**26)
    free(found)
need()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
need()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def output(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_memory_that_was_freed_is_used_again():
    kept, faults = output(FAULTS)
    if kept == "False":
        pytest.skip("the C library is another, or set up by the user")
    assert int(faults) < 100
    unkept, faults = output(FAULTS, MALLOC_ARENA_MAX="8")
    assert unkept == "False"
    assert int(faults) > 100


def test_other_systems_keep_their_allocator(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep()


def test_beside_an_accelerator_the_allocator_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: [group])
    assert not memory.keep()
