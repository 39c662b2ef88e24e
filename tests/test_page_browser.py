"""The page of wf_vit.page in a browser: what a visitor sees, does and links to."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.explorer import TOLERANCE, Explorer, assert_shows, percent
from tests.test_page import (
    ALL_FUSED,
    CAT,
    FUSED,
    GRID,
    HEAD_IMPACT,
    LAYERS,
    LEARNED,
    MASS,
    OTHER,
    PATCHES,
    PREFIX,
    TITLE,
    build,
    meta,
)
from wf_vit import grid as geometry
from wf_vit.fields import responsive_field


@pytest.fixture(scope="module")
def explorer(browser, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(build(title=TITLE), encoding="utf-8")
    return Explorer(browser, path, GRID)


@pytest.mark.browser
def test_hover_and_keys_show_the_arrays_numbers(explorer):
    explorer.open("#layer0=1")
    explorer.hover(8)
    assert_shows(explorer, 8, FUSED[1])
    field = responsive_field(jnp.asarray(FUSED[1]), GRID, mass=MASS)
    words = explorer.read(".measured")
    assert words.startswith("Field of 80 %")
    np.testing.assert_allclose(explorer.arrow(), np.abs(field.excess[8]), atol=0.02)
    shares = ALL_FUSED[1, 10] / ALL_FUSED[1, 10].sum()
    given = re.findall(r"([\d.]+) %", explorer.read(".given"))
    np.testing.assert_allclose([float(x) / 100 for x in given], shares[:2], atol=1e-4)
    mask = explorer.driver.execute_script(
        "return [...stackOf('fused').maskOf(1, 8)].sort((a, b) => a - b);"
    )
    np.testing.assert_array_equal(mask, np.flatnonzero(field.mask[8]))
    area = words.partition("area ")[2]
    assert percent(area) == pytest.approx(float(field.area[8]), abs=1e-4)

    explorer.press("\ue014", "\ue015")  # Right, down.
    assert_shows(explorer, 8 + 1 + GRID[1], FUSED[1])
    explorer.press("]")
    explorer.until(lambda: "layer 2" in explorer.read(".patch"))
    assert_shows(explorer, 15, FUSED[2])
    explorer.press("H")  # As with Shift or Caps Lock.
    explorer.until(lambda: "head 0" in explorer.read(".patch"))
    assert_shows(explorer, 15, HEAD_IMPACT[2, 0])
    words = explorer.read("p.learned")
    x, y, across, down = map(float, re.findall(r"[\d.]*\d", words))
    x, y = x * (-1 if "left" in words else 1), y * (-1 if "up" in words else 1)
    centre, widths = np.split(LEARNED[2, 0, 15], 2)
    np.testing.assert_allclose([x, y], centre, atol=0.06)
    np.testing.assert_allclose([across, down], geometry.HALF * widths, atol=0.06)
    assert explorer.complaints() == []


@pytest.mark.browser
@pytest.mark.parametrize(("length", "drawn"), [(0.3, 1.5), (0.002, 1.5), (1e-4, 0.15)])
def test_arrows_are_scaled_up_unless_they_may_be_rounding(explorer, length, drawn):
    explorer.open()
    factor = explorer.driver.execute_script(f"return arrowFactor([[0, {length}]], 1);")
    assert factor * length == pytest.approx(drawn)


@pytest.mark.browser
def test_a_held_patch_and_another_show_what_they_give_each_other(explorer):
    explorer.open("#layer0=0")
    explorer.hover(3, click=True)
    explorer.hover(20)
    explorer.until(lambda: "listens" in explorer.read("#pair"))
    shares = FUSED[0] / FUSED[0].sum(-1, keepdims=True)
    to, by = (percent(part) for part in explorer.read("#pair").split(";"))
    assert abs(to - shares[3, 20]) < TOLERANCE
    assert abs(by - shares[20, 3]) < TOLERANCE
    assert_shows(explorer, 3, FUSED[0])
    explorer.press("\ue00c")  # Escape.
    explorer.hover(21)
    assert_shows(explorer, 21, FUSED[0])


@pytest.mark.browser
def test_indicator_comparison_and_link(explorer):
    explorer.open("#patch=7&layer0=0&layer1=2&show=impact.compare")
    assert_shows(explorer, 7, FUSED[0], panel=0)
    assert_shows(explorer, 7, FUSED[2], panel=1)
    explorer.choose("#indicator", 1)
    explorer.until(lambda: explorer.find(".head")[0].get_attribute("length") == "1")
    assert_shows(explorer, 7, OTHER[0], panel=0)
    explorer.choose(".layer", 1, "input")
    explorer.until(lambda: "layer 1" in explorer.read(".patch"))
    explorer.find("#copy")[0].click()
    link = explorer.driver.current_url.partition("#")[2]
    explorer.open(f"#{link}")
    assert explorer.find("#indicator")[0].get_attribute("value") == "1"
    assert_shows(explorer, 7, OTHER[1], panel=0)
    assert_shows(explorer, 7, OTHER[2], panel=1)
    assert explorer.complaints() == []


@pytest.mark.browser
def test_a_foreign_link_does_no_harm(explorer):
    explorer.open("#patch=999&layer0=-1&head0=x&indicator=7&show=script.field")
    assert explorer.complaints() == []
    assert explorer.read("h1") == TITLE


@pytest.mark.browser
def test_the_picture_shows_the_impact_where_it_is(explorer):
    """Reads the canvas: the picture is left as it is where impact is below even."""
    explorer.open("#patch=9&layer0=1&show=")
    explorer.hover(9)
    assert_shows(explorer, 9, FUSED[1])
    shares = FUSED[1, 9] / FUSED[1, 9].sum() * PATCHES

    def pixels():
        return np.array(explorer.driver.execute_script(
            "drawAll();"
            "const canvas = document.querySelector('.grid');"
            "const [rows, columns] = arguments;"
            "const context = canvas.getContext('2d');"
            "const cell = [canvas.width / columns, canvas.height / rows];"
            "return Array.from({length: rows * columns}, (_, p) => {"
            "  const x = (p % columns + 0.3) * cell[0];"
            "  const y = (Math.floor(p / columns) + 0.3) * cell[1];"
            "  const {data} = context.getImageData(x, y, 9, 9);"
            "  return [...data]; });",
            *GRID,
        ), float)  # fmt: skip

    picture = pixels()
    explorer.driver.execute_script("state.flags.add('impact')")
    painted = pixels()
    changed = np.abs(painted - picture).mean(1)
    others = np.arange(PATCHES) != 9
    assert changed[others & (shares < 1)].max() == 0
    assert changed[others & (shares > 1.2)].min() > 1
    # The original, while the key is held.
    explorer.driver.execute_script("showOriginal(true)")
    np.testing.assert_array_equal(pixels(), picture)
    explorer.driver.execute_script("showOriginal(false); state.opacity = 0")
    np.testing.assert_array_equal(pixels(), picture)


@pytest.mark.browser
def test_prefix_tokens_are_chosen_like_patches(explorer):
    explorer.open("#layer0=1")
    chips = explorer.find("#prefix button")
    assert [chip.text for chip in chips] == list(PREFIX)
    chips[0].click()
    explorer.until(lambda: explorer.read(".patch").startswith("CLS"))
    listens, heard = explorer.table()
    shares = ALL_FUSED[1, 0, 2:] / ALL_FUSED[1, 0, 2:].sum()
    for patch, share in listens.items():
        assert abs(share - shares[patch]) < TOLERANCE
    from_cls = ALL_FUSED[1, 2:, 0] / ALL_FUSED[1, 2:].sum(-1)
    for patch, share in heard.items():
        assert abs(share - from_cls[patch]) < 1e-4
    explorer.press("C")
    explorer.until(lambda: explorer.read(".patch").startswith("register 1"))
    assert explorer.complaints() == []


@pytest.mark.browser
def test_a_class_is_shown_with_signs(explorer):
    explorer.open("#indicator=2&direction=map&layer0=1")
    explorer.until(lambda: "Class map" in explorer.read(".patch"))
    assert "<cat>, of probability 63 %" in explorer.read(".measured")
    explorer.hover(7)
    added = re.search(r"adds ([+\N{MINUS SIGN}])([\d.]*\d)", explorer.read(".measured"))
    value = float(added[2]) * (1 if added[1] == "+" else -1)
    assert value == pytest.approx(CAT.class_map[7], rel=0.1)
    explorer.choose("[name=direction]", "to", panel=0)
    cells = explorer.find("table td")
    assert re.fullmatch(r"[+\N{MINUS SIGN}][\d.]+", cells[1].text)
    assert explorer.complaints() == []


@pytest.mark.browser
def test_the_overview_leads_to_a_layer_and_head(explorer):
    explorer.open("#layer0=0&show=impact.overview")
    overview = explorer.find(".overview")[0]
    explorer.until(lambda: overview.size["height"] > 50)
    explorer.driver.execute_script(
        "const o = document.querySelector('.overview');"
        "const {side, high, gap} = panels[0].layout;"
        "const box = o.getBoundingClientRect();"
        "o.dispatchEvent(new MouseEvent('click', {clientX: box.x + 2.5 * (side + gap),"
        " clientY: box.y + 1.5 * (high + gap), bubbles: true}));"
    )
    explorer.until(lambda: "layer 1, head 1" in explorer.read(".patch"))
    assert_link_carries(explorer, "layer0=1", "head0=1", "overview")


def assert_link_carries(explorer, *parts):
    explorer.find("#copy")[0].click()
    link = explorer.driver.current_url.partition("#")[2]
    assert all(part in link for part in parts), link


@pytest.mark.browser
def test_a_link_carries_everything(explorer):
    wanted = (
        "indicator=0&direction=by&patch=25&held=1&opacity=40"
        "&show=impact.colors.overview&layer0=2&head0=1&layer1=0&head1=all"
    )
    explorer.open(f"#{wanted}")
    assert_link_carries(explorer, *wanted.split("&"))
    assert "head 1" in explorer.read("#head-legend")


@pytest.mark.browser
def test_what_did_not_fit_is_said_where_it_is_missed(browser, tmp_path):
    whole = len(build().encode())
    for limit in range(whole, 0, -whole // 100):
        small = build(max_bytes=limit, layers=[0, 5, 11])
        kept = meta(small)["layers"]
        if len(kept) < LAYERS:
            break
    (tmp_path / "page.html").write_text(small, encoding="utf-8")
    visit = Explorer(browser, tmp_path / "page.html", GRID)
    visit.open("#show=impact.compare")
    gone = [str(layer) for layer in (0, 5, 11) if layer not in kept]
    for panel in (0, 1):
        assert f"Layers {', '.join(gone)} are not" in visit.read(".absent", panel)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (1024, 768), (390, 844)])
def test_picture_legend_and_controls_fit_the_window(explorer, size, scheme):
    width, height = size
    phone = width < 500
    with explorer.window(width, height, scheme, mobile=phone):
        explorer.open("#patch=9&show=impact.field.arrow.learned")
        page_size = explorer.driver.execute_script(
            "return [document.documentElement.scrollWidth,"
            " document.documentElement.scrollHeight]"
        )
        assert page_size[0] <= width
        ground = explorer.driver.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        # The longest words that a grid of two digits puts into the table.
        overflow = explorer.driver.execute_script(
            "return [...document.querySelectorAll('.readout tbody td')].slice(0, 4)"
            ".map((cell, k) => { cell.textContent = k % 2 ? '88.88 %' : '(36, 36)';"
            " return cell.scrollWidth - cell.clientWidth; })"
        )
        assert max(overflow) <= 0
        if phone:
            return
        assert page_size[1] <= height
        for selector in (".grid", "#scale", "#controls", "#copy", "#pair"):
            box = explorer.find(selector)[0].rect
            assert box["y"] + box["height"] <= height, selector
        assert explorer.find(".grid")[0].size["width"] > 0.35 * width
    assert explorer.complaints() == []


@pytest.mark.browser
def test_a_screen_reader_hears_the_numbers(explorer):
    explorer.open("#layer0=0")
    explorer.hover(5)
    status = explorer.find("#status")[0]
    explorer.until(lambda: "row 0, column 5" in status.get_attribute("textContent"))
    assert "Listens most to" in status.get_attribute("textContent")
    canvas = explorer.find(".grid")[0]
    assert canvas.get_attribute("aria-label") == "layer 0, all heads, patch (0, 5)"
