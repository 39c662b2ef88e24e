"""Every file of a checkpoint, damaged in every way: no wrong number, and no crash."""

import random
import shutil

import numpy as np
import pytest

from tests.reliability.processes import Run, whole
from wf_vit.errors import UsageError
from wf_vit.models import pretrained
from wf_vit.models.pretrained import stored
from wf_vit.train.checkpoint import DAMAGED, Checkpoints

pytestmark = pytest.mark.reliability

NEWEST, BEFORE = "60", "40"


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def gone(file):
    file.unlink()


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run with the checkpoints 40 and 60."""
    workdir = tmp_path_factory.mktemp("intact") / "run"
    whole(workdir)
    return workdir


@pytest.fixture
def copy(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "run")


def files_of(workdir):
    """Returns the files of the newest checkpoint, in an order that stays."""
    folder = workdir / "checkpoints" / NEWEST
    return sorted(file for file in folder.rglob("*") if file.is_file())


def assert_right_or_set_aside(workdir, intact):
    """Training and ``pretrained.load`` see the right arrays, or say what is wrong.

    Returns:
      Whether the damage was found.
    """
    folders = {n: intact / "checkpoints" / n for n in (NEWEST, BEFORE)}
    expected = {name: stored.read_step(folder) for name, folder in folders.items()}
    original = pretrained.load(intact).params
    try:
        params = _leaves(pretrained.load(workdir).params)
    except UsageError as error:
        message = str(error)
        params = None
    if params is None:
        assert f"{NEWEST} is damaged" in message
    else:
        for path, array in _leaves(original).items():
            np.testing.assert_array_equal(params[path], array, err_msg=path)
    with Checkpoints(workdir) as checkpoints:
        saved = checkpoints.newest()
    step = str(int(saved.arrays["step"]))
    assert saved.arrays.keys() == expected[step].arrays.keys()
    for path, array in expected[step].arrays.items():
        np.testing.assert_array_equal(saved.arrays[path], array, err_msg=path)
    assert saved.meta == expected[step].meta
    found = step == BEFORE
    assert (workdir / DAMAGED / NEWEST).is_dir() == found
    return found


def _leaves(params):
    return {path: np.asarray(leaf) for path, leaf in stored.by_path(params).items()}


@pytest.mark.parametrize("damage", [empty, cut, zeros, gone])
def test_every_file_may_be_damaged(intact, tmp_path, damage):
    found = {}
    for index, file in enumerate(files_of(intact)):
        workdir = shutil.copytree(intact, tmp_path / str(index))
        name = file.relative_to(intact)
        damage(workdir / name)
        found[str(name)] = assert_right_or_set_aside(workdir, intact)
        shutil.rmtree(workdir)
    print(damage.__name__, found)
    assert any(found.values())


def test_65_flipped_bits_are_never_silent(intact, tmp_path):
    """Anywhere in the newest checkpoint, weighted by the size of the files."""
    draw = random.Random(0)
    files = files_of(intact)
    sizes = [file.stat().st_size for file in files]
    found = 0
    for number in range(65):
        workdir = shutil.copytree(intact, tmp_path / str(number))
        (file,) = draw.choices(files, weights=sizes)
        target = workdir / file.relative_to(intact)
        content = bytearray(target.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        target.write_bytes(content)
        found += assert_right_or_set_aside(workdir, intact)
        shutil.rmtree(workdir)
    print(f"{found} of 65 were found, the others changed nothing.")
    # Half of the bytes, such as old nodes of the database, are never looked at.
    assert found > 10


def test_a_run_goes_on_from_the_checkpoint_before(copy, intact):
    """And ends as if nothing had been damaged."""
    empty(copy / "checkpoints" / NEWEST / "state" / "manifest.ocdbt")
    (text,) = whole(copy)
    assert f"checkpoints/{NEWEST} is damaged" in text
    assert f"Resuming after step {BEFORE}" in text
    assert "Traceback" not in text
    assert "Event loop" not in text
    ends = [stored.read_step(w / "checkpoints" / NEWEST) for w in (copy, intact)]
    for path, array in ends[1].arrays.items():
        np.testing.assert_array_equal(ends[0].arrays[path], array, err_msg=path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
@pytest.mark.parametrize("damage", [empty, cut, zeros, gone])
def test_other_files_of_a_run_may_be_damaged(copy, name, damage):
    shutil.rmtree(copy / "checkpoints" / NEWEST)
    damage(copy / name)
    (text,) = whole(copy)
    assert f"Resuming after step {BEFORE}" in text
    assert "Traceback" not in text


def test_another_model_is_told_from_damage(copy):
    with Run(copy, settings={"model.width": 32, "on_change": "continue"}) as run:
        assert run.wait() == [2]
        assert "does not fit the config" in run.text()
        assert "Traceback" not in run.text()
        assert "Event loop" not in run.text()
    assert not (copy / DAMAGED).exists()
