"""Figures and page of an image."""

import base64
import csv
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.explanation.example import (
    DATA_ONLY,
    GRID,
    HEADS,
    LAYERS,
    PATCHES,
    make_config,
)
from tests.explorer import Explorer, assert_shows
from wf_vit import grid as geometry
from wf_vit.explanation import draw
from wf_vit.explanation.explanation import Explanation
from wf_vit.explanation.task import explain
from wf_vit.page import coding


def block(text, name):
    return re.search(rf'id="data-{name}">(.*?)</script>', text, re.DOTALL).group(1)


def test_chosen_layers_and_patch_are_the_ones_that_are_shown(photographs, tmp_path):
    config = make_config(
        images=str(photographs / "a.png"),
        indicators=("mean,knockout",),
        layers=(1,),
        patch=8,
        figures=False,
    )
    explain(config, tmp_path)
    folder = tmp_path / "images/a"
    explanation = Explanation.load(folder)
    assert explanation.layers.tolist() == [1]
    assert explanation.indicator == "knockout"
    drawings = draw.image_drawings(explanation, patch=8)
    for name in ("interactions", "fields", "tendency", "indiscriminative"):
        assert drawings[name]().axes[0].get_title() == "layer 1"
    (mark,) = drawings["interactions"]().axes[0].lines
    np.testing.assert_allclose(mark.get_xydata(), [[2, 1]])
    whole = explanation.impact["knockout"]
    assert whole.shape == (1, PATCHES + 1, PATCHES + 1)
    page = (folder / "page.html").read_text()
    meta = json.loads(block(page, "meta"))
    assert meta["layers"] == [1]
    assert meta["title"] == "a"
    assert meta["prefix"] == ["CLS"]
    names = [indicator["name"] for indicator in meta["indicators"]]
    assert names == ["knockout, effect in its layer", "mean attention"]
    rows = np.concatenate([whole[:, 1:], whole[:, :1]], axis=1)  # CLS comes last.
    coded = coding.encode(coding.row_shares(rows[..., 1:]), 255)
    packed = zlib.decompress(base64.b64decode(block(page, "0-fused-codes")))
    np.testing.assert_array_equal(np.frombuffer(packed, np.uint8), coded.codes.ravel())
    bits = zlib.decompress(base64.b64decode(block(page, "0-fused-mask")))
    masks = np.packbits(explanation.field.mask, axis=-1)
    np.testing.assert_array_equal(np.frombuffer(bits, np.uint8), masks.ravel())


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
    explanation = Explanation.load(tmp_path / "images/a")
    # Untrained fields lie around their patch and have the initial size of their layer.
    assert explanation.learned.shape == (LAYERS, HEADS, PATCHES, 4)
    assert not np.any(explanation.learned[..., :2])
    for layer, fields in enumerate(explanation.learned):
        reach = geometry.HALF * fields[..., 2:]
        np.testing.assert_allclose(reach, 1.0 + layer, rtol=1e-5)
    assert explanation.field_heads.extents.shape == (LAYERS, HEADS, PATCHES, 4)
    learned = draw.image_drawings(explanation)["learned"]()
    assert [panel.get_ylabel() for panel in learned.axes] == [
        "learned",
        "",
        "measured",
        "",
    ]
    assert (tmp_path / "figures/field_area_heads.png").exists()
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert np.shape(statistics["field_area_heads"]["mean"]) == (LAYERS, HEADS)
    with (tmp_path / "table.csv").open(newline="") as file:
        areas = [float(row["field_area"]) for row in csv.DictReader(file)]
    expected = explanation.field_heads.area[1, 1].mean()
    assert areas[-1] == pytest.approx(expected)


@pytest.mark.slow
def test_a_real_page_holds_all_heads(shared, tmp_path):
    data = pytest.importorskip("skimage.data")
    Image.fromarray(data.chelsea()).save(tmp_path / "chelsea.png")
    config = make_config(
        shared / "weights/dinov2_s14.safetensors",
        images=str(tmp_path / "chelsea.png"),
        image_size=(224,),
        fit="whole",
        heads=True,
    )
    explain(config, tmp_path / "run")
    folder = tmp_path / "run/images/chelsea"
    assert (folder / "page.html").stat().st_size < 25_000_000
    meta = json.loads(block((folder / "page.html").read_text(), "meta"))
    assert len(meta["layers"]) == 12
    assert all("heads" in note["stacks"] for note in meta["indicators"])
    assert Explanation.load(folder).field_heads.area.shape[:2] == (12, 6)


@pytest.mark.browser
def test_the_page_shows_the_numbers_of_the_data(browser, photographs, tmp_path):
    image = photographs / "b.png"
    explain(make_config(images=str(image), figures=False), tmp_path)
    found = Explanation.load(tmp_path / "images/b")
    visit = Explorer(browser, tmp_path / "images/b/page.html", GRID)
    visit.open("#layer0=1")
    for patch in (0, 9, 23):
        visit.hover(patch)
        assert_shows(visit, patch, found.patch_impact()[1])
        arrow = np.abs(found.field.excess[1, patch])
        np.testing.assert_allclose(visit.arrow(), arrow, atol=0.02)
    assert visit.complaints() == []
