"""Checkpoints: kept, checked, and set aside when they are damaged."""

import collections
import errno
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit.errors import RunError, UsageError
from wf_vit.models.pretrained import stored
from wf_vit.train import checkpoint
from wf_vit.train.checkpoint import Checkpoints, chosen, restored
from wf_vit.train.state import TrainState


def make_state(step, scale=1.0):
    params = {
        "head": {"kernel": scale * jnp.arange(600.0).reshape(20, 30)},
        "low": jnp.asarray([scale], jnp.bfloat16),
    }
    return TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state=(jax.tree.map(jnp.ones_like, params), ()),
        ema_params=None,
    )


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 1, 2 and 3, of which 2 is the best."""
    with Checkpoints(tmp_path) as checkpoints:
        for step, top1 in ((1, 0.1), (2, 0.9), (3, None)):
            checkpoints.save(make_state(step, scale=step), {"of": step}, top1)
    return tmp_path


def newest(workdir):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.newest()


def test_what_is_saved_is_read(run):
    saved = newest(run)
    assert saved.meta["of"] == 3
    state = restored(saved, make_state(0))
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3, scale=3))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(
        lambda x: x.dtype, make_state(0)
    )
    assert chosen(run, "best").meta["of"] == 2
    assert chosen(run, "last").meta["of"] == 3
    assert saved.meta[stored.DIGESTS].keys() == saved.arrays.keys()


def test_nothing_is_read_where_there_is_nothing(tmp_path):
    assert newest(tmp_path) is None


# What happens to a checkpoint's folder.
DAMAGES = {
    "an emptied manifest": lambda folder: (
        folder / "state" / "manifest.ocdbt"
    ).write_bytes(b""),
    "a state without its index": lambda folder: (
        folder / "state" / "_METADATA"
    ).unlink(),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "half of meta": lambda folder: (folder / "meta" / "metadata").write_text('{"of": '),
    "a meta with another number": lambda folder: (
        folder / "meta" / "metadata"
    ).write_text(
        (folder / "meta" / "metadata").read_text().replace('"of": 3', '"of": 2')
    ),
    "a meta that is no object": lambda folder: (
        folder / "meta" / "metadata"
    ).write_text("[1]"),
    "no files at all": lambda folder: [shutil.rmtree(f) for f in folder.glob("*/")],
    "metrics that are no numbers": lambda folder: (
        (folder / "metrics").mkdir(),
        (folder / "metrics" / "metrics").write_text("\0\0"),
    ),
    "data that is cut": lambda folder: [
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        for file in folder.glob("state/**/d/*")
    ],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(run, caplog, damage):
    DAMAGES[damage](run / "checkpoints" / "3")
    with caplog.at_level(logging.WARNING, logger="wf_vit"):
        saved = newest(run)
    assert saved.meta["of"] == 2
    assert "checkpoints/3 is damaged" in caplog.text
    assert (run / checkpoint.DAMAGED / "3").is_dir()
    # The step is done again, and saved under its name.
    with Checkpoints(run) as checkpoints:
        checkpoints.save(make_state(3), {"of": 30}, None)
    assert newest(run).meta["of"] == 30


def test_a_changed_array_is_found_by_its_digest(run, caplog, monkeypatch):
    """A flipped bit that Orbax does not notice."""
    read = stored._read

    def flipped(folder, choose):
        saved = read(folder, choose)
        if folder.name == "3":
            bits = saved.arrays["params/head/kernel"].view(np.uint32)
            bits[3, 4] ^= 1 << 30
        return saved

    monkeypatch.setattr(stored, "_read", flipped)
    assert newest(run).meta["of"] == 2
    assert "params/head/kernel is not what was written" in caplog.text


def test_a_checkpoint_without_digests_is_read(run, monkeypatch):
    """As earlier versions wrote them."""
    monkeypatch.setattr(stored, "sealed", lambda meta, _: meta)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(make_state(4), {"of": 4}, None)
    assert newest(run).meta["of"] == 4


def test_if_all_are_damaged_nothing_is_trained_anew_unasked(run):
    for folder in (run / "checkpoints").iterdir():
        shutil.rmtree(folder / "state")
    with pytest.raises(UsageError, match=r"Every checkpoint .* is damaged"):
        newest(run)
    assert newest(run) is None  # Told so, the user may.


def test_a_reader_sets_nothing_aside(run):
    shutil.rmtree(run / "checkpoints" / "3" / "state")
    with pytest.raises(UsageError, match=r"The last checkpoint .* is damaged"):
        chosen(run, "last")
    assert chosen(run, "best").meta["of"] == 2
    assert (run / "checkpoints" / "3").is_dir()


def test_another_model_is_no_damage(run):
    template = make_state(0)
    template.params["head"]["kernel"] = jnp.zeros((20, 31))
    template.params["tail"] = jnp.zeros(3)
    saved = newest(run)
    with pytest.raises(UsageError) as error:
        restored(saved, template)
    assert "params/head/kernel is float32[20,30] and should be float32[20,31]" in str(
        error.value
    )
    assert "params/tail is missing and should be float32[3]" in str(error.value)
    assert (run / "checkpoints" / "3").is_dir()


def test_the_two_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, top1 in enumerate([0.2, 0.9, None, 0.5, None], start=1):
            checkpoints.save(make_state(step), {}, top1)
    assert [f.name for f in stored.step_folders(tmp_path / "checkpoints")] == [
        "2",
        "4",
        "5",
    ]


def test_a_step_is_saved_again_only_if_asked(run):
    with Checkpoints(run) as checkpoints:
        checkpoints.save(make_state(3), {"of": "second"}, 1.0)
        assert chosen(run, "last").meta["of"] == 3
        checkpoints.save(make_state(3), {"of": "third"}, 1.0, again=True)
    assert chosen(run, "last").meta["of"] == "third"
    assert chosen(run, "best").meta["of"] == "third"


def test_a_step_is_kept_until_it_is_saved_again(run, monkeypatch):
    class KilledError(Exception):
        pass

    def kill(*_, **__):
        raise KilledError

    with Checkpoints(run) as checkpoints:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk_with(0))
        with pytest.raises(RunError, match="Step 3 is kept"):
            checkpoints.save(make_state(3), {"of": "again"}, 1.0, again=True)
        assert chosen(run, "last").meta["of"] == 3
        monkeypatch.undo()
        monkeypatch.setattr(checkpoints._manager, "save", kill)
        with pytest.raises(KilledError):
            checkpoints.save(make_state(3), {"of": "again"}, 1.0, again=True)
    assert newest(run).meta["of"] == 3
    assert chosen(run, "best").meta["of"] == 2
    with Checkpoints(run) as checkpoints:
        checkpoints.save(make_state(3), {"of": "again"}, 1.0, again=True)
    assert chosen(run, "best").meta["of"] == "again"
    assert sorted(folder.name for folder in run.iterdir()) == ["checkpoints"]


def disk_with(free):
    usage = collections.namedtuple("usage", "free")
    return lambda _: usage(free)


def test_a_full_disk_is_seen_before_a_checkpoint_is_written(run, monkeypatch, caplog):
    with Checkpoints(run) as checkpoints:
        needed = checkpoints._needed(make_state(4))
        content = sum(leaf.nbytes for leaf in jax.tree.leaves(make_state(4)))
        assert content < needed < 100 * content
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk_with(needed - 1))
        with pytest.raises(RunError, match=r"needs .* GiB.* free\. Step 3 is kept"):
            checkpoints.save(make_state(4), {}, None)
        # Two are there, and there will be four for a moment.
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk_with(2 * needed))
        checkpoints.check_room(make_state(4))
        assert "GiB more" not in caplog.text
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk_with(2 * needed - 1))
        checkpoints.check_room(make_state(4))
        assert "GiB more" in caplog.text


def test_a_disk_that_fills_up_meanwhile_is_explained(run, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(run) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(RunError, match=r"became full .* Step 3 is kept"):
            checkpoints.save(make_state(4), {}, None)


def test_a_folder_that_may_not_be_read_is_no_damage(run, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "meta")

    monkeypatch.setattr(stored, "_read", forbidden)
    with pytest.raises(UsageError, match=r"may not be read.*permissions"):
        newest(run)
    assert (run / "checkpoints" / "3").is_dir()
