"""Compiled programs are kept from one start of the command to the next."""

import logging
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest
from PIL import Image

from wf_vit import cache, programs

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "jax_compilation_cache_dir"
MAX_SIZE = "jax_compilation_cache_max_size"
MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
SWITCH = "jax_enable_compilation_cache"
NAMES = (FOLDER, MAX_SIZE, MIN_SECONDS, SWITCH)


def settings():
    return {name: getattr(jax.config, name) for name in NAMES}


@pytest.fixture
def untouched(monkeypatch, tmp_path):
    """JAX as a user has it who has set nothing; what these tests set is taken back."""
    before = settings()
    for name in NAMES:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(FOLDER, None)
    yield settings()
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_and_what_it_holds_is_limited(untouched, tmp_path):
    folder = cache.keep_compiled_programs()
    assert folder == tmp_path / "wf-vit" / "jax"
    assert folder.stat().st_mode & 0o077 == 0  # Programs are trusted.
    now = settings()
    assert now[FOLDER] == str(folder)
    assert now[MAX_SIZE] == 2**30
    assert now[MIN_SECONDS] < 0.1


@pytest.mark.parametrize("base", [None, "", "relative"])
def test_without_an_absolute_xdg_folder_it_is_in_the_home(
    untouched, monkeypatch, tmp_path, base
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if base is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", base)
    folder = cache.keep_compiled_programs()
    assert folder == tmp_path / "home" / ".cache" / "wf-vit" / "jax"


@pytest.mark.parametrize("folder", ["there", ""])
def test_a_folder_of_the_users_own_stays(untouched, monkeypatch, tmp_path, folder):
    monkeypatch.setenv(FOLDER.upper(), folder)
    assert cache.keep_compiled_programs() is None
    assert settings() == untouched
    monkeypatch.delenv(FOLDER.upper())
    jax.config.update(FOLDER, "there")
    assert cache.keep_compiled_programs() is None
    assert settings() == untouched | {FOLDER: "there"}
    assert not list(tmp_path.iterdir())


def test_limits_of_the_users_own_stay(untouched, monkeypatch):
    monkeypatch.setenv(MAX_SIZE.upper(), "-1")
    folder = cache.keep_compiled_programs()
    assert settings()[MAX_SIZE] == untouched[MAX_SIZE]
    (folder / "jit_f-0-cache").touch()  # As JAX writes it if there is no limit.
    jax.config.update(FOLDER, None)
    cache.keep_compiled_programs()
    assert (folder / "jit_f-0-cache").exists()


def test_it_can_be_switched_off(untouched, tmp_path):
    jax.config.update(SWITCH, False)
    assert cache.keep_compiled_programs() is None
    assert settings() == untouched | {SWITCH: False}
    assert not list(tmp_path.iterdir())


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("trouble", ["a file", "no home", "no locks"])
def test_without_a_folder_there_is_a_line_and_no_error(
    untouched, monkeypatch, tmp_path, caplog, trouble
):
    if trouble == "a file":
        (tmp_path / "wf-vit").touch()
    elif trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setattr(cache.filelock, "FileLock", lambda *_, **__: no_home())
    with caplog.at_level(logging.INFO, logger="wf_vit"):
        assert cache.keep_compiled_programs() is None
    assert settings() == untouched
    (line,) = caplog.messages
    assert "JAX_COMPILATION_CACHE_DIR" in line


@pytest.mark.parametrize(
    ("platform", "jaxlib", "kept"),
    [("darwin", "0.9.2", False), ("darwin", "0.10.0", True), ("linux", "0.9.2", True)],
)
def test_it_is_off_where_reading_may_crash(
    untouched, monkeypatch, platform, jaxlib, kept
):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(metadata, "version", {"jaxlib": jaxlib}.get)
    assert (cache.keep_compiled_programs() is not None) == kept


def test_what_a_killed_process_left_is_removed(untouched):
    folder = cache.keep_compiled_programs()
    whole, part = folder / "jit_f-0-cache", folder / "jit_f-1-cache"
    whole.touch()
    (folder / "jit_f-0-atime").write_bytes(bytes(8))
    part.touch()
    jax.config.update(FOLDER, None)
    cache.keep_compiled_programs()
    assert whole.exists()
    assert not part.exists()


def test_work_has_its_programs_as_long_as_all_are_there(untouched):
    folder = cache.keep_compiled_programs()
    with programs.noted("nothing"):
        pass
    assert not programs.are_kept("nothing")
    with programs.noted("sums"):
        for name in ("jit_f-0", "jit_g-0"):
            (folder / f"{name}-cache").touch()
            (folder / f"{name}-atime").touch()
    assert programs.are_kept("sums")
    assert not programs.are_kept("products")
    (folder / "jit_g-0-cache").unlink()
    assert not programs.are_kept("sums")


def test_without_a_folder_no_work_has_programs(untouched):
    with programs.noted("sums"):
        pass
    assert not programs.are_kept("sums")


# A run of the command, and how many programs it compiled and how many it read.
START = """
import sys
import jax
from wf_vit import command

found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
command.run(sys.argv[1:])
counts = [found.count(f"/jax/compilation_cache/cache_{n}") for n in ("misses", "hits")]
print("counts", *counts)
"""


@pytest.fixture
def start(tmp_path):
    """Starts the command anew; returns the counts, and what it logged."""
    photograph = tmp_path / "photograph.png"
    Image.new("RGB", (32, 32), "teal").save(photograph)
    arguments = {
        "weights": ROOT / "tests" / "models" / "fixtures" / "hf_vit",
        "images": photograph,
        "indicators": "knockout",
        "figures": False,
        "page": False,
    }
    flags = [f"--config.{name}={value}" for name, value in arguments.items()]
    runs = iter(range(9))

    def started(**environment):
        inherited = {k: v for k, v in os.environ.items() if k != FOLDER.upper()}
        workdir = f"--workdir={tmp_path / str(next(runs))}"
        result = subprocess.run(
            [sys.executable, "-c", START, "--config=explain", *flags, workdir],
            cwd=ROOT,
            env={**inherited, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        _, misses, hits = result.stdout.splitlines()[-1].split()
        return (int(misses), int(hits)), result.stderr

    return started


def test_a_second_start_reads_what_the_first_compiled(start, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), MIN_SECONDS.upper(): "0"}
    (compiled, _), log = start(**environment)
    assert compiled > 0
    assert "s of compilation" in log
    assert list((tmp_path / "xdg" / "wf-vit" / "jax").glob("*-cache"))
    counts, log = start(**environment)
    assert counts == (0, compiled)
    assert "GFLOP" in log
    assert "compilation" not in log
    # A broken program is compiled again.
    for program in (tmp_path / "xdg" / "wf-vit" / "jax").glob("*-cache"):
        program.write_bytes(program.read_bytes()[:100])
    (_, hits), _ = start(**environment)
    assert hits == 0


def test_a_start_without_a_folder_says_so_and_runs(start, tmp_path):
    (tmp_path / "file").touch()
    counts, log = start(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert counts == (0, 0)
    assert log.count("JAX_COMPILATION_CACHE_DIR") == 1
    assert "Warning" not in log


def test_a_start_with_the_cache_switched_off_leaves_no_folder(start, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), SWITCH.upper(): "false"}
    counts, _ = start(**environment)
    assert counts == (0, 0)
    assert not (tmp_path / "xdg" / "wf-vit").exists()
