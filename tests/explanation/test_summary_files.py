"""The table, the statistics and the README over all images."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

from tests.explanation.example import LAYERS, NAMES, arrays_of
from wf_vit import tendency
from wf_vit.explanation import summary
from wf_vit.explanation.explanation import ARRAYS


def test_every_array_and_column_is_documented(run):
    patterns = [
        re.escape(name).replace("NAME", r"\w+").replace(r"\.\.\.", r"[\w/]+")
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
    arrays = arrays_of(run, "more/a")
    together, _, second = rows[-3:]
    reach = [
        float(together[f"extent_{side}"]) for side in ("left", "top", "right", "bottom")
    ]
    np.testing.assert_allclose(reach, arrays["field/extents"][1].mean(0), rtol=1e-5)
    excess, displacement = arrays["field/excess"], arrays["field/displacement"]
    arrow = excess[1]
    got = [float(together[f"excess_{part}"]) for part in ("x", "y", "length")]
    expected = [*arrow.mean(0), np.linalg.norm(arrow, axis=-1).mean()]
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    share = tendency.explained_share(displacement, displacement - excess)
    assert float(together["geometry_share"]) == pytest.approx(float(share[1]), rel=1e-4)
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


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+cmd.png", "'=1+cmd.png"),
        ("+1.png", "'+1.png"),
        ("-1.png", "'-1.png"),
        ("@SUM(A1).png", "'@SUM(A1).png"),
        ("\t=1.png", "'\t=1.png"),
        ("\r=1.png", "'\r=1.png"),
        ("\n1.png", "'\n1.png"),
        (" =1.png", "' =1.png"),
        ('"=1,2".png', '\'"=1,2".png'),
        ("'=1.png", "''=1.png"),
        ("\u200b=1.png", "'\u200b=1.png"),
        ("\uff1d1.png", "'\uff1d1.png"),
        ("a=1.png", "a=1.png"),
        ('a,"b".png', 'a,"b".png'),
        ("1-2.png", "1-2.png"),
    ],
)
def test_a_name_that_a_spreadsheet_would_run_is_a_text(run, tmp_path, name, cell):
    shutil.copytree(run / "images" / NAMES[0], tmp_path / "images" / name)
    summary._write_table(tmp_path, [name])
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {row[0] for row in rows[1:]} == {cell}
    # Numbers stay numbers, those below 0 too.
    assert any(number.startswith("-") for row in rows[1:] for number in row[1:])
    for row in rows[1:]:
        assert all(float(number) is not None for number in row[3:] if number)
