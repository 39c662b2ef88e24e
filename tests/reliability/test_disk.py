"""A disk that is full, before and while a run writes."""

import contextlib
import os
import subprocess

import pytest

from tests.reliability.processes import Run, whole
from wf_vit.models.pretrained import stored

pytestmark = pytest.mark.reliability


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MB and 400 files, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=4m,nr_inodes=400",
        "tmpfs",
        str(folder),
    ]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, leave):
    """Fills a file system but for so many bytes."""
    usage = os.statvfs(folder)
    free = usage.f_bavail * usage.f_frsize
    with (folder / "ballast").open("wb") as file, contextlib.suppress(OSError):
        file.write(bytes(free - leave))


def test_a_disk_that_is_too_small_is_known_at_the_start(disk):
    fill(disk, 50_000)
    with Run(disk / "run", settings={"model.width": 64}) as run:
        assert run.wait() == [1]
        assert "The disk is full: a checkpoint needs" in run.text()
        assert "Step 1 of" not in run.text()
        assert "Traceback" not in run.text()


def use_up_the_files(folder):
    """Leaves room for no more files: what is written next fails on its way."""
    with contextlib.suppress(OSError):
        for number in range(1000):
            (folder / f"ballast{number}").touch()


@pytest.mark.parametrize("leave", [0, 4096, 60_000, None])
def test_a_disk_that_fills_up_leaves_what_was_saved(disk, leave):
    settings = {"total_steps": 100_000, "checkpoint_steps": 20, "eval_steps": 100_000}
    with Run(disk / "run", settings=settings) as run:
        run.wait_for("step 28/")
        if leave is None:
            use_up_the_files(disk)
        else:
            fill(disk, leave)
        assert run.wait(timeout=60) == [1], run.text()
        *_, message = run.text().splitlines()
        assert message.startswith("Error: The disk ")
        assert "Make room and run again to continue" in message
        # Orbax logs what it meets on its way.
        assert leave is None or "Traceback" not in run.text()
    for ballast in disk.glob("ballast*"):
        ballast.unlink()
    saved = int(stored.step_folders(disk / "run" / "checkpoints")[-1].name)
    settings["total_steps"] = saved + 40
    settings["on_change"] = "continue"
    (text,) = whole(disk / "run", settings=settings)
    assert f"Resuming after step {saved}" in text
