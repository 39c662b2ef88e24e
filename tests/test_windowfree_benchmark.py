"""The benchmark of WinfT: what is stopped goes on, and the whole cost is counted."""

import shutil

import jax
import numpy as np
import pytest

from benchmarks import sweep, windowfree
from tests.test_sweep import CLASSES, TEST, random_split, tiny_config
from wf_vit.errors import UsageError
from wf_vit.models.pretrained import load

DATA = {"train": random_split(0, 30), "test": TEST}


MUON = {"optimizer.name": "muon", "ema_decay": 0.9}


@pytest.fixture(scope="module", autouse=True)
def one_threshold():
    """Hard mode is evaluated once: each threshold is a program more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windowfree, "HARD", (0.05,))
        yield


def config_of(name, teachers=None, **changes):
    config = windowfree.configure(tiny_config(), name, teachers)
    config.total_epochs, config.eval_epochs = 3.0, 2.0
    config.update_from_flattened_dict(changes)
    return config


def run(folder, config, stopping=lambda: False, seeds=(3, 5), name="winft"):
    return windowfree.run_variant(
        config, list(seeds), DATA, CLASSES, folder, name, stopping
    )


def without_times(result):
    assert result["seconds"] > 0
    rows = []
    for row in (result, *result["rows"]):
        assert row["train_images_per_second"] > 0
        times = ("seconds", "train_images_per_second", "rows")
        rows.append({name: row[name] for name in row if name not in times})
    return rows


@pytest.fixture(scope="module")
def trained_whole(tmp_path_factory):
    """The folder of a variant that was trained at once, and its results."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, config_of("winft", **MUON))


def test_a_stopped_variant_goes_on_and_ends_the_same(tmp_path, capsys, trained_whole):
    folder, whole = trained_whole
    config = config_of("winft", **MUON)
    # Once in the middle of an interval, and once at the end.
    assert run(tmp_path / "parts", config, lambda: True) is None
    assert run(tmp_path / "parts", config, iter([False, True]).__next__) is None
    parts = run(tmp_path / "parts", config)
    assert "epoch 3  stopped, and saved in" in capsys.readouterr().out
    assert [row["epoch"] for row in whole["rows"]] == [2, 3]
    assert without_times(parts) == without_times(whole)
    one, other = (load(f / "runs/winft") for f in (folder, tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_other_settings_are_not_mixed(tmp_path):
    assert run(tmp_path, config_of("winft"), lambda: True) is None
    rate = {"optimizer.learning_rate": 1e-3}
    with pytest.raises(UsageError, match=r"'winft' was run.*optimizer.*remove .*winft"):
        run(tmp_path, config_of("winft", **rate))
    with pytest.raises(UsageError, match=r"seeds was \[3, 5\] and is now \[4\]"):
        run(tmp_path, config_of("winft"), seeds=[4])
    # How often it is evaluated does not matter.
    assert run(tmp_path, config_of("winft", eval_epochs=1.0))["rows"][0]["epoch"] == 2


def test_the_cost_of_the_teacher_is_counted(tmp_path, trained_whole):
    folder, whole = trained_whole
    runs, results = tmp_path / "runs", {"winft": dict(whole)}
    shutil.copytree(folder / "runs", runs)
    config = config_of("winft_guided", runs, guidance_steps=3)
    config.guidance.indicator = "mean"
    training = sweep.Sweep(config, [0], DATA["train"], DATA["test"], CLASSES).training
    assert windowfree.training_flops(training, config) is None
    windowfree.write_results(tmp_path / windowfree.RESULTS, results)
    results["winft_guided"] = run(tmp_path, config, seeds=[0], name="winft_guided")
    own = results["winft"]["training_flops"]
    assert own == 3 * results["winft"]["flops"] * 3 * 24
    # A third more for a third of the time, and the teacher's own training.
    total = results["winft_guided"]["training_flops"]
    assert total == pytest.approx(own + own / 9 + own, rel=0.01)
    results["winft"]["training_flops"] = 8.3456e15
    results["winft_guided"]["training_flops"] = None
    text = windowfree.table(windowfree.summarize(results))
    assert " | 1.00 | 8,345.6 | " in text
    assert text.count(" |  | ") == 1


def trained(folder, variants, **changes):
    """Writes results as they would be of trainings of one length."""
    results = {
        name: {
            "rows": [{"epoch": 8, "test/top1": top1}],
            "training_flops": cost,
            "parameters": 100,
            "flops": 1e7,
            "train_images_per_second": 50.0,
            "device": "cpu",
            "train_images": 5000,
            "test_images": 10_000,
            **changes,
        }
        for name, (top1, cost) in variants.items()
    }
    folder.mkdir()
    windowfree.write_results(folder / windowfree.RESULTS, results)


def test_trainings_are_compared_by_their_whole_cost(tmp_path):
    long = {"winft": ([0.6, 0.62], 4e13), "winft_guided": ([0.65], 8e13)}
    trained(tmp_path / "long", long)
    trained(tmp_path / "short", {"winft": ([0.5, 0.52], 1e13), "vit": ([0.4], 9e12)})
    folders = [tmp_path / "long", tmp_path / "short"]
    windowfree.compare(folders, tmp_path / "out")
    rows = (tmp_path / "out/costs.md").read_text().splitlines()[2:6]
    assert rows == [
        "| vit | 8 | 9.0 | 40.00 | 1 |",
        "| winft | 8 | 10.0 | 51.00 ± 1.41 | 2 |",
        "| winft | 8 | 40.0 | 61.00 ± 1.41 | 2 |",
        "| winft_guided | 8 | 80.0 | 65.00 | 1 |",
    ]
    assert (tmp_path / "out/costs.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("variants", "changes", "message"),
    [
        ({"vit": ([0.4], 9e12)}, {"train_images": 10_000}, r"\(10000, 10000\)"),
        ({"winft_guided": ([0.4], None)}, {}, "what 'winft_guided' cost"),
        ({}, {}, "has no results.json"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, variants, changes, message):
    trained(tmp_path / "one", {"winft": ([0.5], 1e13)})
    trained(tmp_path / "other", variants, **changes)
    with pytest.raises(UsageError, match=message):
        windowfree.compare([tmp_path / "one", tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
