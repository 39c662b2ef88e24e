"""Whether the compiled programs of some work are in JAX's cache already.

JAX does not say it before it compiles. So the names of the programs that a work takes
are noted beside them the first time.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from wf_vit.workdir import write_text

# In nanoseconds: the time of a file may lag behind that of the system.
_CLOCKS_DIFFER = 10**9


def are_kept(work: str) -> bool:
    """Whether the programs of some work are kept, so that none is compiled for it.

    Args:
      work: what the programs depend on, in words, besides the version of JAX and the
        device. Before ``noted`` has seen it, the answer is no.
    """
    note = _note(work)
    try:
        names = json.loads(note.read_bytes()) if note else []
    except (OSError, ValueError):  # None was written, or not all of it.
        return False
    return bool(names) and all((note.parent / name).exists() for name in names)


@contextlib.contextmanager
def noted(work: str) -> Iterator[None]:
    """Notes which kept programs what is inside takes, for ``are_kept``.

    The note lies beside them. Without a folder nothing is noted.
    """
    begin = time.time_ns() - _CLOCKS_DIFFER
    yield
    note = _note(work)
    if note is None or are_kept(work):
        return
    names = set()
    with contextlib.suppress(OSError):
        # JAX writes the time of use whether it keeps a program or reads it.
        for used in note.parent.glob("*-atime"):
            program = used.name.removesuffix("-atime") + "-cache"
            if used.stat().st_mtime_ns >= begin:
                names.add(program)
        write_text(note, json.dumps(sorted(names)))


def _note(work: str) -> Path | None:
    """Returns the file of a note, or None if no programs are kept."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder or not jax.config.jax_enable_compilation_cache:
        return None
    device = jax.devices()[0]
    everything = [work, jax.__version__, device.platform, device.device_kind]
    digest = hashlib.sha256(json.dumps(everything).encode()).hexdigest()
    return Path(folder) / f"{digest}.json"
