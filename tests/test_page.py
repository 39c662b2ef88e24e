"""Tests of wf_vit.page: the coding, what is embedded, and the page in a browser."""

import base64
import html
import json
import re
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from tests.explorer import TOLERANCE, Explorer, assert_shows, percent
from wf_vit import page
from wf_vit.errors import UsageError
from wf_vit.fields import responsive_field
from wf_vit.grid import distances
from wf_vit.page import coding

GRID = (4, 6)
PATCHES = 24
LAYERS, HEADS = 3, 2
MASS = 0.8

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (64, 96, 3), dtype=np.uint8)
PREFIX = ("CLS", "register 1")
TOKENS = PATCHES + len(PREFIX)
# With the prefix tokens; and of patches alone, which most numbers are of.
ALL_HEADS = RNG.gamma(0.3, size=(LAYERS, HEADS, TOKENS, TOKENS)).astype(np.float32)
ALL_FUSED = ALL_HEADS.mean(1)
HEAD_IMPACT, FUSED = ALL_HEADS[..., 2:, 2:], ALL_FUSED[..., 2:, 2:]
ALL_OTHER = RNG.gamma(0.3, size=(LAYERS, TOKENS, TOKENS)).astype(np.float32)
OTHER = ALL_OTHER[..., 2:, 2:]
EFFECT = RNG.normal(size=(LAYERS, TOKENS, TOKENS)).astype(np.float32)
BY_LAYER = EFFECT.sum(1)[:, 2:]
CAT = page.ClassEffect(EFFECT, BY_LAYER.sum(0), BY_LAYER, "<cat>", 0.625)
EXTENTS = RNG.gamma(2.0, size=(LAYERS, HEADS, PATCHES, 4)).astype(np.float32)


def build(**options):
    indicators = {
        "mean": page.Indicator(ALL_FUSED, ALL_HEADS),
        "other": page.Indicator(ALL_OTHER),
    }
    given = {"prefix": PREFIX, "class_effect": CAT, "extents": EXTENTS, "mass": MASS}
    options = given | options
    return page.explorer(IMAGE, indicators, GRID, **options)


@pytest.fixture(scope="module")
def text():
    return build(title="Field & <arrow>", model="ViT </script> 3")


def block(text, name):
    return re.search(rf'id="data-{name}">(.*?)</script>', text, re.DOTALL).group(1)


def meta(text):
    return json.loads(block(text, "meta"))


def unpack(text, name):
    return np.frombuffer(zlib.decompress(base64.b64decode(block(text, name))), np.uint8)


def unpack16(text, name):
    low, high = unpack(text, name).reshape(2, -1).astype(np.uint16)
    return low | high << 8


# --- Coding -------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [255, 31])
def test_coding_keeps_its_error_bound_and_small_shares(levels):
    shares = coding.row_shares(FUSED)
    coded = coding.encode(shares, levels)
    largest = shares.max(-1, keepdims=True)
    error = np.abs(coded.decode() - shares) / largest
    assert error.max() <= coded.error_bound() + 1e-4
    # Equal steps would be off by 1 / (2 levels) also where shares are small.
    small = (shares < 0.01 * largest) & (shares > 0)
    assert error[small].max() < 0.3 / levels


def test_a_row_without_impact_is_the_patch_itself():
    impact = np.zeros((3, 3), np.float32)
    impact[0] = (0, 2, 2)
    np.testing.assert_allclose(
        coding.row_shares(impact), [[0, 0.5, 0.5], [0, 1, 0], [0, 0, 1]]
    )


def test_packed_numbers_of_two_bytes_are_planes():
    packed = coding.pack(np.array([1, -2, 300], np.int16))
    planes = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)
    low, high = planes.reshape(2, 3).astype(np.uint16)
    np.testing.assert_array_equal((low | high << 8).view(np.int16), [1, -2, 300])


# --- What is embedded ---------------------------------------------------------------


def test_the_page_needs_no_network_and_no_markup_escapes(text):
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text)
    assert "default-src 'none'" in text
    assert "<title>Field &amp; &lt;arrow&gt;</title>" in text
    assert meta(text)["model"] == "ViT </script> 3"
    assert text.count("</script>") == text.count("<script")


def test_codes_and_fields_are_the_arrays(text):
    note = meta(text)["indicators"][0]
    assert note["stacks"]["heads"]["levels"] == 255
    # Rows of patches first, then those of prefix tokens; columns of patches.
    rows = np.concatenate([ALL_HEADS[..., 2:, :], ALL_HEADS[..., :2, :]], axis=-2)
    coded = coding.encode(coding.row_shares(rows[..., 2:]), 255)
    np.testing.assert_array_equal(unpack(text, "0-heads-codes"), coded.codes.ravel())
    given = unpack16(text, "0-heads-given").reshape(LAYERS, HEADS, TOKENS, 2)
    expected = rows[..., :2] / rows.sum(-1, keepdims=True)
    np.testing.assert_allclose(given / 65535, expected, atol=1e-5)
    numbers = unpack16(text, "0-heads-field").view(np.int16)
    numbers = numbers.reshape(3, LAYERS, HEADS, PATCHES)
    field = responsive_field(jnp.asarray(HEAD_IMPACT), GRID, mass=MASS)
    np.testing.assert_allclose(
        np.moveaxis(numbers[:2], 0, -1) / 64, field.excess, atol=1 / 128 + 1e-3
    )
    np.testing.assert_allclose(numbers[2] / PATCHES, field.area, atol=1e-5)


def test_effects_on_a_class_keep_their_signs(text):
    note = meta(text)["indicators"][-1]
    assert note["name"] == "effect on <cat> (62%)"
    codes = unpack(text, "class-codes").reshape(LAYERS, TOKENS, PATCHES)
    rows = np.concatenate([EFFECT[:, 2:], EFFECT[:, :2]], axis=1)[..., 2:]
    scales = (unpack16(text, "class-scales") / 65535.0) ** 2
    largest = note["largest"] * scales.reshape(LAYERS, TOKENS, 1)
    decoded = np.where(codes & 128, -1, 1) * ((codes & 127) / 127) ** 2 * largest
    assert np.abs(decoded - rows).max() < 0.01 * np.abs(rows).max()
    maps = unpack16(text, "class-maps").view(np.int16).reshape(LAYERS + 1, PATCHES)
    maps = maps * note["mapLargest"] / 32767
    np.testing.assert_allclose(maps[:-1], BY_LAYER, atol=1e-3)
    np.testing.assert_allclose(maps[-1], CAT.class_map, atol=1e-3)


def test_a_smaller_budget_costs_precision_then_heads_then_layers_and_says_so():
    whole = len(build().encode())
    pages = []
    for limit in range(whole, 0, -whole // 200):
        try:
            text = build(max_bytes=limit)
        except UsageError:
            break
        assert len(text.encode()) <= limit
        pages.append(meta(text))
    costs = []
    for page_meta in pages:
        note = page_meta["indicators"][0]
        heads = note["stacks"].get("heads", {"levels": 0})["levels"]
        assert note.get("omittedHeads", 0) == (0 if heads else HEADS)
        assert page_meta["allLayers"] == list(range(LAYERS))
        assert page_meta["layers"][-1] == LAYERS - 1
        costs.append((len(page_meta["layers"]), heads))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == (LAYERS, 255)
    assert any(layers == LAYERS and 0 < heads < 255 for layers, heads in costs)
    assert any(layers == LAYERS and heads == 0 for layers, heads in costs)
    assert costs[-1][0] == 1


def test_layers_keep_their_names():
    assert meta(build(layers=[0, 5, 11]))["layers"] == [0, 5, 11]


def test_an_impossible_budget_is_an_error():
    with pytest.raises(UsageError, match="raise max_bytes"):
        build(max_bytes=10_000)


@pytest.mark.parametrize(
    ("impact", "message"),
    [(-FUSED, "negative"), (FUSED * np.nan, "NaN"), (FUSED[:, 1:, 1:], "grid")],
)
def test_wrong_impact_is_an_error(impact, message):
    with pytest.raises(UsageError, match=message):
        page.explorer(IMAGE, {"mean": page.Indicator(impact)}, GRID)


def test_indicators_of_different_depth_are_an_error():
    indicators = {"a": page.Indicator(FUSED), "b": page.Indicator(OTHER[:2])}
    with pytest.raises(UsageError, match=r"'b'.*3 layers"):
        page.explorer(IMAGE, indicators, GRID)


def test_prefix_tokens_must_be_named():
    with pytest.raises(UsageError, match=r"0 prefix tokens.*name the prefix tokens"):
        page.explorer(IMAGE, {"a": page.Indicator(ALL_FUSED)}, GRID)


@pytest.mark.slow
def test_all_layers_fit_at_37_and_all_heads_at_16():
    def impact(*shape, patches):
        # As uneven as the impact of a DINOv2, which is what packs well.
        near = np.exp(-distances((patches, patches)) / 3).astype(np.float32)
        noise = RNG.gamma(0.5, size=(*shape, patches**2, patches**2))
        return (noise * (near + 0.02)).astype(np.float32)

    large = {str(n): page.Indicator(impact(12, patches=37)) for n in range(3)}
    text = page.explorer(IMAGE, large, (37, 37))
    assert len(text) < 25_000_000
    assert len(meta(text)["layers"]) == 12
    small = {}
    for n in range(3):
        heads = impact(12, 6, patches=16)
        small[str(n)] = page.Indicator(heads.sum(1), heads)
    found = meta(page.explorer(IMAGE, small, (16, 16)))
    assert len(found["layers"]) == 12
    assert all("heads" in note["stacks"] for note in found["indicators"])


def test_no_indicator_is_an_error():
    with pytest.raises(UsageError, match="at least one"):
        page.explorer(IMAGE, {}, GRID)


# --- In a browser -------------------------------------------------------------------


@pytest.fixture(scope="module")
def explorer(browser, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(text, encoding="utf-8")
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
        "const s = stackOf('fused'); const {count} = s.fieldOf(1, 8);"
        "return [...maskOf(s.shares(1, 8, 'to'), count, 8)].sort((a, b) => a - b);"
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
    learned = re.findall(r"([\d.]+) (?:left|up|ri|do)", explorer.read("p.learned"))
    np.testing.assert_allclose(
        [float(number) for number in learned],
        np.minimum(EXTENTS[2, 0, 15], max(GRID)),
        atol=0.06,
    )
    assert explorer.complaints() == []


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
    assert explorer.read("h1") == html.unescape("Field &amp; &lt;arrow&gt;")


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
    assert_title_of_link(explorer, "layer0=1", "head0=1", "overview")


def assert_title_of_link(explorer, *parts):
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
    assert_title_of_link(explorer, *wanted.split("&"))
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
