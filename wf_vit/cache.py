"""JAX's cache of compiled programs, which the command keeps from one start to the next.

Only the command turns it on. A program that uses the package as a library decides
for itself how JAX is set up.
"""

import logging
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import filelock
import jax

_LOG = logging.getLogger(__name__)

_LIMITS = {
    # In bytes: beyond it, the programs go first that were not used for longest.
    "jax_compilation_cache_max_size": 2**30,
    # Everything is kept. JAX's own value is 1 s; but a task has many small programs,
    # each of which is read in a tenth of the time that it compiles in.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}


def keep_compiled_programs() -> Path | None:
    """Lets JAX keep what it compiles in a folder of the user, and read it from there.

    What the user has set of JAX stays: a folder, no cache at all, or a limit. Call it
    before anything is compiled.

    Returns:
      The folder, or None if JAX is left as it is. That the folder cannot be written is
      no error: everything is compiled, and a line of the log says why.
    """
    named = "JAX_COMPILATION_CACHE_DIR" in os.environ
    named = named or jax.config.jax_compilation_cache_dir is not None
    if named or not jax.config.jax_enable_compilation_cache or _crashes():
        return None
    try:
        folder = cache_folder()
        # Whoever can write here can run code as this user.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # JAX's own lock: on some file systems there is none.
        with (
            filelock.FileLock(folder / ".lockfile", timeout=10),
            tempfile.TemporaryFile(dir=folder),
        ):
            _repair(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home, or no locks.
        _LOG.info(
            "Compiled programs are not kept for the next start (%s). "
            "JAX_COMPILATION_CACHE_DIR=FOLDER keeps them elsewhere.",
            error,
        )
        return None
    for name, value in _LIMITS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def cache_folder() -> Path:
    """Returns where compiled programs are kept: ``~/.cache/wf-vit/jax``.

    ``XDG_CACHE_HOME`` takes the place of ``~/.cache`` if it is an absolute path.

    Raises:
      RuntimeError: the user has no home.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path.home() / ".cache"
    return base / "wf-vit" / "jax"


def _crashes() -> bool:
    """Whether reading a large program may crash: jaxlib before 0.10 on macOS."""
    release = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2])
    return sys.platform == "darwin" and release < (0, 10)


def _repair(folder: Path) -> None:
    """Removes programs without a time of use, beside which JAX could write no other.

    A process that is killed while it writes leaves such a file behind. Without a limit
    of the size, no program has a time of use, and none is needed.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE") == "-1":
        return
    for program in folder.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("-cache") + "-atime")
        if not used.exists():
            program.unlink(missing_ok=True)
