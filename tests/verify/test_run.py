"""The task: everything on digits, a kill in between, and what it refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit.errors import UsageError
from wf_vit.verify import run
from wf_vit.verify.pixels import STEPS
from wf_vit.verify.removal import RULES as REMOVAL_RULES
from wf_vit.verify.store import Store
from wf_vit.verify.subject import FILLS, INDICATORS, Subject
from wf_vit.verify.windows import RULES


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where a run that nothing interrupted has left its results."""
    return tmp_path_factory.mktemp("whole")


def outcomes(folder):
    files = sorted((folder / "outcomes").glob("*.npz"))
    arrays = [dict(np.load(path)) for path in files]
    names = sorted({name for part in arrays for name in part})
    return {n: np.concatenate([p[n] for p in arrays if n in p]) for n in names}


def test_everything_is_there_and_a_kill_changes_nothing(
    config, whole, tmp_path, monkeypatch
):
    results = run.verify(config, whole)
    written = json.loads((whole / "verify.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert written["images"] == config.num_images.to_dict()
    found = outcomes(whole)
    shapes = {name: outcome.shape for name, outcome in found.items()}
    pixels = (3, 6, len(FILLS), 2, STEPS + 1)
    assert shapes == {
        "whole/top1": (10,),
        **{
            f"windows/{measure}": (10, len(RULES), 2)
            for measure in ("top1", "cosine", "patch_cosine")
        },
        **{
            f"removal/{measure}": (7, 2, len(REMOVAL_RULES), 1)
            for measure in ("top1", "cosine", "patch_cosine")
        },
        **{
            f"pixels/{kind}_{measure}": pixels
            for kind in ("predicted", "true")
            for measure in ("probability", "top1")
        },
        "faithfulness/correlation": (1, 2, len(INDICATORS), 2),
    }
    by_rule = written["windows"]["measures"]["cosine"]["nearest"]
    expected = found["windows/cosine"][:, RULES.index("nearest"), 1].mean()
    assert by_rule["0.25"]["mean"] == pytest.approx(expected, rel=1e-4)
    # The margin is over the controls, not the other way round.
    own = found["windows/cosine"][:, 0, 1].mean()
    margin = written["windows"]["margins"]["cosine"]["nearest"]["0.25"]["mean"]
    assert margin == pytest.approx(own - expected, rel=1e-3)
    table = (whole / "table.md").read_text()
    for rule in (*RULES, *REMOVAL_RULES, *INDICATORS, "rollout"):
        assert f"| {rule} |" in table
    assert (whole / "figures" / "windows.png").stat().st_size
    _killed_and_resumed(config, tmp_path, monkeypatch)
    for name, outcome in outcomes(tmp_path).items():
        np.testing.assert_array_equal(outcome, found[name])
    again = json.loads((tmp_path / "verify.json").read_text())
    assert again | {"command": ""} == written | {"command": ""}


def _killed_and_resumed(config, workdir, monkeypatch):
    measured = []
    real = Subject.outcomes

    def dies(self, images, labels, counts, key):
        if measured:
            raise KeyboardInterrupt
        measured.append(counts)
        return real(self, images, labels, counts, key)

    with monkeypatch.context() as patch:
        patch.setattr(Subject, "outcomes", dies)
        with pytest.raises(KeyboardInterrupt):
            run.verify(config, workdir)
    assert not (workdir / "verify.json").exists()

    def counts_batches(self, images, labels, counts, key):
        measured.append(counts)
        return real(self, images, labels, counts, key)

    with monkeypatch.context() as patch:
        patch.setattr(Subject, "outcomes", counts_batches)
        run.verify(config, workdir)
    # The second batch only, which has images of two protocols left.
    assert measured[1:] == [
        {"windows": 4, "removal": 1, "pixels": 0, "faithfulness": 0}
    ]


def test_outcomes_of_other_settings_are_not_mixed(config, tmp_path):
    params = {"kernel": jnp.ones(3)}
    store = Store(tmp_path, {"seed": 0, "bootstrap_samples": 9}, params)
    store.save(0, {"a/b": np.zeros(2)})
    Store(tmp_path, {"seed": 0, "bootstrap_samples": 99}, params)
    with pytest.raises(UsageError, match="seed was 0 and is now 1"):
        Store(tmp_path, {"seed": 1, "bootstrap_samples": 9}, params)
    with pytest.raises(UsageError, match="parameters_sha256"):
        Store(tmp_path, {"seed": 0}, {"kernel": jnp.zeros(3)})


def test_stored_batches_come_back_in_their_order(tmp_path):
    store = Store(tmp_path, {}, {})
    store.save(10, {"a": np.array([3.0])})
    store.save(9, {"a": np.array([1.0, 2.0]), "b": np.array([7.0])})
    assert store.has(9)
    assert not store.has(0)
    np.testing.assert_array_equal(store.load()["a"], [1, 2, 3])
    np.testing.assert_array_equal(store.load()["b"], [7])


def test_first_layers_of_quarters():
    assert run.first_of_quarters(12) == (0, 3, 6, 9)
    assert run.first_of_quarters(6) == (0, 1, 3, 4)
    assert run.first_of_quarters(2) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": ""}, "--config.weights"),
        ({"protocols": ("window",)}, "name some of windows"),
        ({"protocols": ()}, "name some of windows"),
        ({"layers": (0, 2)}, "0 to 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image_size": 18}, "18"),
        ({"split": "validation"}, "validation"),
    ],
)
def test_says_what_is_wrong(config, tmp_path, settings, message):
    config.update(settings)
    with pytest.raises(UsageError, match=message):
        run.verify(config, tmp_path)
