"""The task: interruptions that cost nothing, and settings it refuses."""

import json
import re
import shutil
import subprocess
import sys
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from tests.explanation.example import DATA_ONLY, NAMES, arrays_of, make_config, noise
from wf_vit.errors import UsageError
from wf_vit.explanation import draw, progress, task
from wf_vit.explanation.explanation import Explanation
from wf_vit.explanation.task import explain


class Killed(BaseException):
    """What nothing catches."""


def kill(*_, **__):
    raise Killed


def test_a_killed_run_continues_to_the_same_numbers(
    run, photographs, tmp_path, monkeypatch
):
    config = make_config(images=str(photographs), batch_size=2, **DATA_ONLY)
    save_data, batches = Explanation.save_data, []

    def save_or_die(self, folder, **options):
        # The second image of the first batch is lost.
        if folder.name == "a.png" and not batches:
            raise Killed
        save_data(self, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Explanation, "save_data", save_or_die)
        with pytest.raises(Killed):
            explain(config, tmp_path)
    done = tmp_path / "images/a.jpg/data.npz"
    before = done.stat().st_mtime_ns
    assert not (tmp_path / "images/a.png").exists()
    assert not (tmp_path / "table.csv").exists()

    explain_batch = task.explain_batch

    def counted(loaded, photographs, *others):
        batches.append(photographs.any((1, 2, 3)).tolist())
        return explain_batch(loaded, photographs, *others)

    monkeypatch.setattr(task, "explain_batch", counted)
    with pytest.raises(UsageError, match="1 of 5"):
        explain(config, tmp_path)
    # In batches of one size, which the last one is filled up to.
    assert batches == [[True, True], [True, False]]
    assert done.stat().st_mtime_ns == before
    for name in ("table.csv", "statistics.json"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    for name in NAMES:
        expected = arrays_of(run, name)
        for key, array in arrays_of(tmp_path, name).items():
            np.testing.assert_array_equal(array, expected[key])

    with pytest.raises(UsageError, match="1 of 5"):
        explain(config, tmp_path)
    assert len(batches) == 2


def test_photographs_are_added_to_a_run(run, photographs, tmp_path):
    for name in ("b.png", "more/a.png"):
        explain(make_config(images=str(photographs / name), **DATA_ONLY), tmp_path)
    # One at a time and in a batch, an image has the same numbers.
    for own, name in {"b": "b", "a": "more/a"}.items():
        np.testing.assert_allclose(
            arrays_of(tmp_path, own)["field/excess"],
            arrays_of(run, name)["field/excess"],
            atol=1e-3,
        )
    table = (tmp_path / "table.csv").read_text()
    assert {row.split(",")[0] for row in table.splitlines()[1:]} == {"a", "b"}
    with pytest.raises(UsageError, match=r"explains another image than .*a\.jpg"):
        explain(make_config(images=str(photographs / "a.jpg"), **DATA_ONLY), tmp_path)


def test_a_photograph_is_known_again_among_those_of_another_folder(
    photographs, tmp_path, caplog
):
    first, second = photographs / "more", tmp_path / "others"
    second.mkdir()
    Image.fromarray(noise(30, 40)).save(second / "c.png")
    workdir = tmp_path / "run"
    explain(make_config(images=str(first), **DATA_ONLY), workdir)
    with caplog.at_level("INFO", "wf_vit"):
        explain(make_config(images=f"{first},{second}", **DATA_ONLY), workdir)
    assert "1 of 2 images to measure" in caplog.text
    statistics = json.loads((workdir / "statistics.json").read_text())
    assert statistics["images"] == 2


def test_whole_photographs_have_grids_of_their_own(tmp_path):
    for name, size in {"wide": (20, 80), "tall": (80, 20), "square": (30, 30)}.items():
        Image.fromarray(noise(*size)).save(tmp_path / f"{name}.png")
    config = make_config(
        images=str(tmp_path), image_size=(16,), fit="whole", **DATA_ONLY
    )
    explain(config, tmp_path / "run")
    grids = {"wide": [2, 8], "tall": [8, 2], "square": [4, 4]}
    for name, grid in grids.items():
        arrays = arrays_of(tmp_path / "run", name)
        assert arrays["grid"].tolist() == grid
        assert arrays["photograph"].shape == (4 * grid[0], 4 * grid[1], 3)
    assert json.loads((tmp_path / "run/statistics.json").read_text())["images"] == 3


def test_the_front_page_leads_to_every_photograph(photographs, tmp_path):
    image = tmp_path / "<b> & co.png"
    shutil.copy(photographs / "b.png", image)
    workdir = tmp_path / "run"
    explain(make_config(images=str(image), indicators=("mean",)), workdir)
    text = (workdir / "index.html").read_text()
    assert "&lt;b&gt; &amp; co" in text
    assert "<b>" not in text
    links = [unquote(link) for link in re.findall(r'href="([^"#:]+)"', text)]
    assert "images/<b> & co/page.html" in links
    assert "images/<b> & co/figures/interactions.png" in links
    assert all((workdir / link).exists() for link in links)


def test_there_is_a_sign_of_life(photographs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    config = make_config(images=str(photographs / "b.png"), **DATA_ONLY)
    with caplog.at_level("INFO", "wf_vit"):
        explain(config, tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert re.match(
        r"1 of 1 images to measure, 2 layers.* s each here \(.*GFLOP", said[0]
    )
    assert re.fullmatch(r"0 of 1 images, about \d\d:\d\d left", said[1])


def starts(folder):
    """Returns the first four bytes of the files of a folder, by name."""
    return {file.name: file.read_bytes()[:4] for file in folder.iterdir()}


def test_drawings_can_be_had_later_and_are_whole(photographs, tmp_path, monkeypatch):
    one = {"images": str(photographs / "b.png"), "indicators": ("mean",)}
    config = make_config(**one, **DATA_ONLY)
    explain(config, tmp_path)
    folder = tmp_path / "images/b"
    assert [path.name for path in folder.iterdir()] == ["data.npz"]
    config.figures = config.page = True
    with monkeypatch.context() as patch:
        patch.setattr(draw, "depth_drawings", lambda *_, **__: {"x": kill})
        with pytest.raises(Killed):
            explain(config, tmp_path)
    assert not (folder / "figures").exists()
    monkeypatch.setattr(task, "explain_batch", kill)
    explain(config, tmp_path)
    drawn = {
        "interactions",
        "fields",
        "field_size",
        "tendency",
        "indiscriminative",
        "class_attention",
        "class_impact",
        "principal_components",
        "field_area",
        "attention_distance",
    }
    assert starts(folder / "figures") == {f"{n}.png": b"\x89PNG" for n in drawn}
    assert (folder / "page.html").stat().st_size > 10_000
    config.pdf = True
    explain(config, tmp_path)
    pdfs = {f"{n}.pdf": b"%PDF" for n in drawn}
    assert starts(folder / "figures").items() >= pdfs.items()
    assert starts(tmp_path / "figures")["field_area.pdf"] == b"%PDF"
    explain(config, tmp_path)  # There is nothing left to draw.
    assert len(starts(folder / "figures")) == 2 * len(drawn)


def test_drawings_follow_the_settings(photographs, tmp_path):
    one = {"images": str(photographs / "b.png"), "indicators": ("mean",)}
    other = {**one, "images": str(photographs / "a.jpg")}
    for images in (one, other):
        explain(make_config(**images), tmp_path)

    def drawn(name):
        folder = tmp_path / "images" / name
        return [(folder / f).read_bytes() for f in ("figures/fields.png", "page.html")]

    before = {name: drawn(name) for name in ("b", "a")}
    explain(make_config(**one, patch=5), tmp_path)
    for name, (fields, page) in before.items():
        assert drawn(name)[0] != fields
        assert drawn(name)[1] == page
    most = min(len(page) for _, page in before.values()) - 100
    explain(make_config(**one, patch=5, page_bytes=most), tmp_path)
    assert all(len(drawn(name)[1]) <= most for name in before)


def test_results_of_other_settings_are_not_mixed(photographs, tmp_path, windowfree_run):
    one = {"images": str(photographs / "b.png"), "indicators": ("mean",)}
    config = make_config(**one, **DATA_ONLY)
    workdir = tmp_path / "run"
    explain(config, workdir)
    config.batch_size = 3
    explain(config, workdir)
    with pytest.raises(UsageError, match=r"mass was 0\.5 and is now 0\.9"):
        explain(make_config(**one, **DATA_ONLY, mass=0.9), workdir)
    assert json.loads((workdir / "config.json").read_text())["mass"] == 0.5
    other = make_config(windowfree_run, **one, **DATA_ONLY)
    with pytest.raises(UsageError, match="parameters_sha256"):
        explain(other, workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ""}, "pass a checkpoint and a photograph"),
        ({"weights": ""}, "pass a checkpoint and a photograph"),
        ({"indicators": ("mean", "atention")}, "rollout"),
        ({"indicators": ("rollout",), "layers": (1,)}, "needs all layers"),
        ({"layers": (2,)}, "layers 0 to 1"),
        ({"target": "logit"}, "tokens, cls, pooled"),
        ({"target": "clas:3", "indicators": ("mean",)}, "class or class:NAME"),
        ({"target": "class:9"}, "no class '9'"),
        ({"fit": "pad"}, "choose one of whole"),
        ({"mass": 1.5}, r"mass is 1\.5"),
        ({"patch": 24}, "expected 0 to 23"),
    ],
)
def test_settings_that_cannot_work(photographs, tmp_path, changes, message):
    changes = {"images": str(photographs / "a.png")} | changes
    with pytest.raises(UsageError, match=message):
        explain(make_config(**changes), tmp_path)
    assert not (tmp_path / "images").exists()


def test_the_task_needs_no_tensorflow():
    code = "import sys, wf_vit.explanation.task; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "wf_vit.explanation.task" in modules
    assert not {"tensorflow", "clu", "tensorflow_datasets"} & set(modules)
