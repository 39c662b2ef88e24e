"""Tests of wf_vit.explain: images as people have them, results that survive a kill."""

import base64
import csv
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from configs.explain import get_config
from tests.explorer import Explorer, assert_shows
from wf_vit import fields
from wf_vit import indicators as matrices
from wf_vit.errors import UsageError
from wf_vit.explain import draw, explain, images, summary, task
from wf_vit.explain.explanation import ARRAYS, Explanation
from wf_vit.models import pretrained, recording, registry
from wf_vit.page import coding

# Two layers, two heads, patches of 4 pixels, a CLS token.
VIT = Path(__file__).parent / "models/fixtures/timm_vit"
SIZE, GRID = (16, 24), (4, 6)
PATCHES, LAYERS, HEADS = 24, 2, 2
RNG = np.random.default_rng(0)


def noise(height, width, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


DATA_ONLY = {"figures": False, "page": False}


def make_config(weights=VIT, **changes):
    config = get_config()
    with config.ignore_type():
        changes = {"image_size": SIZE, "num_probes": 4} | changes
        config.update(weights=str(weights), **changes)
    return config


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with a subfolder, a file that is no image, and one that is broken."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "more").mkdir()
    for name in ("b.png", "a.png", "a.jpg", "more/a.png"):
        Image.fromarray(noise(30, 40)).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    return folder


NAMES = ["a.jpg", "a.png", "b.png", "more/a.png"]


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    """A run over the folder in batches of two, data only."""
    workdir = tmp_path_factory.mktemp("run")
    config = make_config(images=str(photographs), batch_size=2, **DATA_ONLY)
    with pytest.raises(UsageError, match=r"(?s)1 of 5 images.*broken\.jpg: "):
        explain(config, workdir)
    return workdir


def arrays_of(workdir, name):
    with np.load(workdir / "images" / name / "data.npz") as file:
        return dict(file)


# --- Images -------------------------------------------------------------------------


def test_images_are_found_once_under_names_of_their_own(photographs, tmp_path):
    (photographs / ".hidden").mkdir(exist_ok=True)
    Image.fromarray(noise(4, 4)).save(photographs / ".hidden/c.png")
    found = images.find(str(photographs), leave_out=tmp_path)
    assert [source.name for source in found] == sorted([*NAMES, "broken.jpg"])
    assert all(source.path == photographs / source.name for source in found)
    paths = [photographs / "more", photographs / "a.png", photographs / "more/a.png"]
    found = images.find(", ".join(map(str, paths)), leave_out=tmp_path)
    assert [source.name for source in found] == ["a.png", "more/a.png"]
    found = images.find(str(photographs), leave_out=photographs / "more")
    assert "more/a.png" not in [source.name for source in found]


def test_a_file_may_have_a_comma_in_its_name_and_any_suffix(tmp_path):
    path = tmp_path / "me, myself.image"
    Image.fromarray(noise(4, 4)).save(path, format="png")
    assert images.find(str(path), leave_out=tmp_path / "x") == [(path.name, path)]


def test_a_name_that_is_no_text_becomes_one(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    (source,) = images.find(str(tmp_path), leave_out=tmp_path / "x")
    assert source.name == r"caf\xe9.png"
    assert source.path.exists()


@pytest.mark.parametrize("paths", ["nowhere", "", ","])
def test_no_images_is_an_error(paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"config\.images"):
        images.find(paths, leave_out=tmp_path)


def saved(tmp_path, image, suffix="png", **options):
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    return images.read(path)


def test_any_kind_of_image_becomes_rgb(tmp_path):
    gray = noise(5, 7, 1)[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=-1)
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(gray)), expected)
    deep = Image.fromarray(257 * gray.astype(np.uint16))
    np.testing.assert_array_equal(saved(tmp_path, deep), expected)
    palette = Image.fromarray(gray).convert("P")
    np.testing.assert_array_equal(saved(tmp_path, palette), expected)
    cmyk = saved(tmp_path, Image.new("CMYK", (7, 5), (0, 255, 0, 0)), "jpg")
    assert np.abs(cmyk.astype(int) - (255, 0, 255)).max() < 10


def test_what_is_transparent_lies_on_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 51, 255)
    opaque = saved(tmp_path, Image.fromarray(pixels, "RGBA"))
    np.testing.assert_array_equal(opaque[0, :, 0], [255, 204, 0])
    gray = Image.fromarray(pixels[..., 2:], "LA")
    np.testing.assert_array_equal(saved(tmp_path, gray), opaque)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(tmp_path, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # How a camera that was held so stores it: EXIF 2.32, tag 274.
    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    image = Image.fromarray(np.ascontiguousarray(turned))
    got = saved(tmp_path, image, "jpg", exif=exif, quality=95)
    assert np.abs(got.astype(int) - upright).max() < 80


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n0000"])
def test_a_broken_file_is_an_error_that_says_why(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(images.UnreadableImageError, match="Error: "):
        images.read(tmp_path / "image.png")


# --- Data ---------------------------------------------------------------------------


def test_the_arrays_are_what_the_library_computes(run, photographs):
    loaded = pretrained.load(VIT, image_size=SIZE)
    # The first place of the second batch, of b.png and broken.jpg.
    arrays = arrays_of(run, "b.png")
    photograph = loaded.preprocess.fit(images.read(photographs / "b.png"))
    np.testing.assert_array_equal(arrays["photograph"], photograph)
    prepared = loaded.preprocess.normalize(photograph[None])
    (recorded,) = recording.record(loaded.model, loaded.params, prepared)
    options = {"num_prefix_tokens": 1}
    attention, values = recorded.attention[:, 0], recorded.values[:, 0]
    (propagated,) = recording.propagate(
        loaded.model,
        loaded.params,
        prepared,
        target="tokens",
        num_probes=4,
        key=jax.random.fold_in(jax.random.key(0), 2),
    )
    expected = {
        "mean": attention.mean(1)[:, 1:, 1:],
        "knockout": matrices.knockout_impact(
            attention,
            values,
            *recording.output_projection(loaded.model, loaded.params),
            **options,
        ),
        "propagated": propagated.impact[:, 0],
    }
    for name, impact in expected.items():
        np.testing.assert_allclose(
            arrays[f"impact/{name}"], impact, rtol=2e-4, atol=1e-7
        )
    mass = make_config().mass
    field = fields.responsive_field(propagated.impact[:, 0], GRID, mass=mass)
    for part, array in field._asdict().items():
        np.testing.assert_allclose(arrays[f"field/{part}"], array, atol=2e-4)
    np.testing.assert_allclose(
        arrays["discriminability"],
        fields.discriminability(propagated.impact[:, 0]),
        rtol=2e-4,
    )
    np.testing.assert_allclose(
        arrays["attention_distance"],
        matrices.mean_attention_distance(attention, grid=GRID, **options),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        arrays["relative_error"], propagated.relative_error[:, 0], rtol=1e-3
    )


def test_what_is_saved_is_loaded(run):
    folder = run / "images/a.png"
    explanation = Explanation.load(folder)
    explanation.save(run / "copy")
    first, second = arrays_of(run, "a.png"), np.load(run / "copy/data.npz")
    assert set(first) == set(second.files)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert explanation.indicator == "propagated"


def test_every_array_and_column_is_documented(run):
    patterns = [
        re.escape(name).replace("NAME", r"\w+").replace(r"\.\.\.", r"\w+")
        for name in ARRAYS
    ]
    for name in arrays_of(run, "a.png"):
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
    text = (run / "README.md").read_text()
    for name in (*ARRAYS, *summary.COLUMNS, *summary.STATISTICS_KEYS):
        assert f"`{name}`" in text
    statistics = json.loads((run / "statistics.json").read_text())
    assert set(statistics) == set(summary.STATISTICS_KEYS) - {"field_area_heads"}


def test_the_table_has_a_row_for_each_image_layer_and_head(run):
    with (run / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [
        (name, str(layer), head)
        for name in NAMES
        for layer in range(LAYERS)
        for head in ("all", "0", "1")
    ] == [(row["image"], row["layer"], row["head"]) for row in rows]
    arrays = arrays_of(run, "more/a.png")
    together, _, second = rows[-3:]
    reach = [
        float(together[f"reach_{side}"]) for side in ("left", "top", "right", "bottom")
    ]
    np.testing.assert_allclose(reach, arrays["field/box"][1].mean(0), rtol=1e-5)
    arrow = arrays["field/displacement"][1]
    got = [float(together[f"tendency_{part}"]) for part in ("x", "y", "length")]
    expected = [*arrow.mean(0), np.linalg.norm(arrow, axis=-1).mean()]
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    area = arrays["field/area"][1]
    assert float(together["field_area"]) == pytest.approx(area.mean())
    assert float(together["field_area_std"]) == pytest.approx(area.std())
    assert second["field_area"] == ""
    distance = arrays["attention_distance"][1]
    assert float(second["attention_distance"]) == pytest.approx(distance[1])
    assert float(together["attention_distance"]) == pytest.approx(distance.mean())


def test_the_statistics_are_over_all_images_and_patches(run):
    statistics = json.loads((run / "statistics.json").read_text())
    assert (statistics["images"], statistics["indicator"]) == (4, "propagated")
    every = [arrays_of(run, name) for name in NAMES]
    area = np.stack([arrays["field/area"] for arrays in every])
    np.testing.assert_allclose(
        statistics["field_area"]["mean"], area.mean((0, 2)), rtol=1e-5
    )
    np.testing.assert_allclose(
        statistics["field_area"]["std"], area.std((0, 2)), rtol=1e-4
    )
    distance = np.stack([arrays["attention_distance"] for arrays in every])
    np.testing.assert_allclose(
        statistics["attention_distance"]["std"], distance.std(0), rtol=1e-3
    )


# --- Figures and page ---------------------------------------------------------------


def test_chosen_layers_and_patch_are_the_ones_that_are_shown(photographs, tmp_path):
    config = make_config(
        images=str(photographs / "a.png"),
        indicators=("mean,knockout",),
        layers=(1,),
        patch=8,
        figures=False,
    )
    explain(config, tmp_path)
    folder = tmp_path / "images/a.png"
    explanation = Explanation.load(folder)
    assert explanation.layers.tolist() == [1]
    assert explanation.indicator == "knockout"
    drawings = draw.image_drawings(explanation, 8)
    for name in ("interactions", "fields", "tendency", "indiscriminative"):
        assert drawings[name]().axes[0].get_title() == "layer 1"
    (mark,) = drawings["interactions"]().axes[0].lines
    np.testing.assert_allclose(mark.get_xydata(), [[2, 1]])
    whole = arrays_of(tmp_path, "a.png")["impact/knockout"]
    assert whole.shape == (1, PATCHES, PATCHES)
    page = (folder / "page.html").read_text()
    meta = json.loads(block(page, "meta"))
    assert meta["layers"] == [1]
    assert meta["title"] == "a.png"
    names = [indicator["name"] for indicator in meta["indicators"]]
    assert names == ["knockout, effect in its layer", "mean attention"]
    coded = coding.encode(coding.row_shares(whole), 255)
    packed = zlib.decompress(base64.b64decode(block(page, "0-fused-codes")))
    np.testing.assert_array_equal(np.frombuffer(packed, np.uint8), coded.codes.ravel())


def block(text, name):
    return re.search(rf'id="data-{name}">(.*?)</script>', text, re.DOTALL).group(1)


@pytest.fixture(scope="module")
def windowfree_run(tmp_path_factory):
    """The folder of a trained window-free transformer."""
    folder = tmp_path_factory.mktemp("windowfree")
    config = registry.default_config("windowfree", "mu/4")
    config.dtype = "float32"
    model = registry.create_model(config, num_classes=5, image_size=SIZE)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SIZE, 3)))["params"]
    state = {"step": jnp.int32(1), "params": params, "ema_params": None}
    meta = {"model": registry.to_json(model)}
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        items = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave(meta),
        }
        manager.save(1, args=ocp.args.Composite(**items), metrics={"top1": 0.5})
    data = {
        "augment": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "resize_method": "bilinear",
        "eval_resize": 1.0,
    }
    (folder / "config.json").write_text(json.dumps({"data": data}))
    return folder


def test_a_window_free_transformer_shows_learned_beside_measured(
    windowfree_run, photographs, tmp_path
):
    config = make_config(
        windowfree_run,
        images=str(photographs / "a.png"),
        target="pooled",
        indicators=("rollout", "propagated"),
        **DATA_ONLY,
    )
    explain(config, tmp_path)
    explanation = Explanation.load(tmp_path / "images/a.png")
    # Untrained fields have the initial radius on every side.
    np.testing.assert_allclose(
        explanation.learned.extents,
        np.full((LAYERS, HEADS, PATCHES, 4), 1.5),
        rtol=1e-5,
    )
    assert explanation.field_heads.box.shape == (LAYERS, HEADS, PATCHES, 4)
    learned = draw.image_drawings(explanation, None)["learned"]()
    assert [panel.get_ylabel() for panel in learned.axes] == [
        "learned",
        "",
        "measured",
        "",
    ]
    assert (tmp_path / "figures/field_area_heads.pdf").exists()
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert np.shape(statistics["field_area_heads"]["mean"]) == (LAYERS, HEADS)
    with (tmp_path / "table.csv").open(newline="") as file:
        areas = [float(row["field_area"]) for row in csv.DictReader(file)]
    expected = explanation.field_heads.area[1, 1].mean()
    assert areas[-1] == pytest.approx(expected)


# --- Interruptions, and other settings ----------------------------------------------


class Killed(BaseException):
    """What nothing catches."""


def test_a_killed_run_continues_to_the_same_numbers(
    run, photographs, tmp_path, monkeypatch
):
    config = make_config(images=str(photographs), batch_size=2, **DATA_ONLY)
    save, batches = Explanation.save, []

    def save_or_die(self, folder):
        # The second image of the first batch is lost.
        if folder.name == "a.png" and not batches:
            raise Killed
        save(self, folder)

    monkeypatch.setattr(Explanation, "save", save_or_die)
    with pytest.raises(Killed):
        explain(config, tmp_path)
    done = tmp_path / "images/a.jpg/data.npz"
    before = done.stat().st_mtime_ns
    assert not (tmp_path / "images/a.png").exists()
    assert not (tmp_path / "table.csv").exists()

    measure = task.measure

    def counted(loaded, photographs, **options):
        batches.append(photographs.any((1, 2, 3)).tolist())
        return measure(loaded, photographs, **options)

    monkeypatch.setattr(task, "measure", counted)
    with pytest.raises(UsageError, match="1 of 5"):
        explain(config, tmp_path)
    assert batches == [[False, True], [True, False], [True, False]]
    assert done.stat().st_mtime_ns == before
    for name in ("table.csv", "statistics.json"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    for name in NAMES:
        expected = arrays_of(run, name)
        for key, array in arrays_of(tmp_path, name).items():
            np.testing.assert_array_equal(array, expected[key])

    with pytest.raises(UsageError, match="1 of 5"):
        explain(config, tmp_path)
    assert len(batches) == 3
    monkeypatch.setattr(Explanation, "save", save)


def test_drawings_can_be_had_later_and_are_whole(photographs, tmp_path, monkeypatch):
    one = {"images": str(photographs / "b.png"), "indicators": ("mean",)}
    config = make_config(**one, **DATA_ONLY)
    explain(config, tmp_path)
    folder = tmp_path / "images/b.png"
    assert [path.name for path in folder.iterdir()] == ["data.npz"]
    config.figures = config.page = True
    with monkeypatch.context() as patch:
        patch.setattr(draw, "depth_drawings", lambda *_, **__: {"x": kill})
        with pytest.raises(Killed):
            explain(config, tmp_path)
    assert not (folder / "figures").exists()
    monkeypatch.setattr(task, "measure", kill)
    explain(config, tmp_path)
    files = list((folder / "figures").iterdir())
    assert {file.name for file in files} == {
        f"{name}.{suffix}"
        for name in (
            "interactions",
            "fields",
            "tendency",
            "indiscriminative",
            "field_area",
            "attention_distance",
        )
        for suffix in ("pdf", "png")
    }
    for file in files:
        start = {".pdf": b"%PDF", ".png": b"\x89PNG"}[file.suffix]
        assert file.read_bytes().startswith(start)
    assert (folder / "page.html").stat().st_size > 10_000


def kill(*_, **__):
    raise Killed


def test_results_of_other_settings_are_not_mixed(photographs, tmp_path, windowfree_run):
    one = {"images": str(photographs / "b.png"), "indicators": ("mean",)}
    config = make_config(**one, **DATA_ONLY)
    workdir = tmp_path / "run"
    with pytest.raises(UsageError, match=r"mass is 1\.5"):
        explain(make_config(**one, **DATA_ONLY, mass=1.5), workdir)
    # Nothing was measured yet, so the settings may still change.
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
        ({"patch": 24}, "expected 0 to 23"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work(photographs, tmp_path, changes, message):
    changes = {"images": str(photographs / "a.png")} | changes
    with pytest.raises(UsageError, match=message):
        explain(make_config(**changes), tmp_path)
    assert not (tmp_path / "images").exists()


@pytest.mark.slow
def test_a_real_page_with_heads_is_small(shared, tmp_path):
    data = pytest.importorskip("skimage.data")
    Image.fromarray(data.chelsea()).save(tmp_path / "chelsea.png")
    config = make_config(
        shared / "weights/dinov2_s14.safetensors",
        images=str(tmp_path / "chelsea.png"),
        image_size=224,
        heads=True,
    )
    explain(config, tmp_path / "run")
    folder = tmp_path / "run/images/chelsea.png"
    assert (folder / "page.html").stat().st_size < 5_000_000
    assert Explanation.load(folder).field_heads.area.shape == (12, 6, 256)


def test_the_task_needs_no_tensorflow():
    code = "import sys, wf_vit.explain; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "wf_vit.explain" in modules
    assert not {"tensorflow", "clu", "tensorflow_datasets"} & set(modules)


@pytest.mark.browser
def test_the_page_shows_the_numbers_of_the_data(browser, photographs, tmp_path):
    image = photographs / "b.png"
    explain(make_config(images=str(image), figures=False), tmp_path)
    arrays = arrays_of(tmp_path, "b.png")
    visit = Explorer(browser, tmp_path / "images/b.png/page.html", GRID)
    visit.open("#layer0=1")
    for patch in (0, 9, 23):
        visit.hover(patch)
        assert_shows(visit, patch, arrays["impact/propagated"][1])
        box = arrays["field/box"][1, patch]
        np.testing.assert_allclose(visit.field()[:4], box, atol=0.06)
        arrow = np.abs(arrays["field/displacement"][1, patch])
        np.testing.assert_allclose(visit.field()[4:], arrow, atol=0.02)
    assert visit.complaints() == []
