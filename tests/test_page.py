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
from wf_vit.page import coding

GRID = (4, 6)
PATCHES = 24
LAYERS, HEADS = 3, 2
MASS = 0.8

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (64, 96, 3), dtype=np.uint8)
HEAD_IMPACT = RNG.gamma(0.3, size=(LAYERS, HEADS, PATCHES, PATCHES)).astype(np.float32)
FUSED = HEAD_IMPACT.mean(1)
OTHER = RNG.gamma(0.3, size=(LAYERS, PATCHES, PATCHES)).astype(np.float32)
EXTENTS = RNG.gamma(2.0, size=(LAYERS, HEADS, PATCHES, 4)).astype(np.float32)


def build(**options):
    indicators = {
        "mean": page.Indicator(FUSED, HEAD_IMPACT),
        "other": page.Indicator(OTHER),
    }
    options = {"extents": EXTENTS, "mass": MASS, **options}
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
    coded = coding.encode(coding.row_shares(HEAD_IMPACT), 255)
    np.testing.assert_array_equal(unpack(text, "0-heads-codes"), coded.codes.ravel())
    low, high = unpack(text, "0-heads-field").reshape(2, 7, LAYERS, HEADS, PATCHES)
    numbers = (low.astype(np.uint16) | high.astype(np.uint16) << 8).view(np.int16)
    field = responsive_field(jnp.asarray(HEAD_IMPACT), GRID, mass=MASS)
    np.testing.assert_allclose(
        np.moveaxis(numbers[:4], 0, -1) / 64, field.extents, atol=1 / 128 + 1e-4
    )
    np.testing.assert_allclose(
        np.moveaxis(numbers[4:6], 0, -1) / 64, field.displacement, atol=1 / 128 + 1e-4
    )
    np.testing.assert_allclose(numbers[6] / PATCHES, field.area, atol=1e-5)


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
        assert page_meta["allLayers"] == LAYERS
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
    [(-FUSED, "negative"), (FUSED * np.nan, "non-finite"), (FUSED[:, 1:, 1:], "grid")],
)
def test_wrong_impact_is_an_error(impact, message):
    with pytest.raises(UsageError, match=message):
        page.explorer(IMAGE, {"mean": page.Indicator(impact)}, GRID)


def test_indicators_of_different_depth_are_an_error():
    indicators = {"a": page.Indicator(FUSED), "b": page.Indicator(OTHER[:2])}
    with pytest.raises(UsageError, match=r"'b'.*3 layers"):
        page.explorer(IMAGE, indicators, GRID)


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
    np.testing.assert_allclose(explorer.field()[:4], field.extents[8], atol=0.06)
    np.testing.assert_allclose(
        explorer.field()[4:], np.abs(field.displacement[8]), atol=0.02
    )
    area = words.partition("area ")[2]
    assert percent(area) == pytest.approx(float(field.area[8]), abs=1e-4)

    explorer.press("\ue014", "\ue015")  # Right, down.
    assert_shows(explorer, 8 + 1 + GRID[1], FUSED[1])
    explorer.press("]")
    explorer.until(lambda: "layer 2" in explorer.read(".patch"))
    assert_shows(explorer, 15, FUSED[2])
    explorer.press("h")
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
    """Reads the canvas: the strongest patch must be the brightest in viridis."""
    explorer.open("#patch=9&layer0=1&show=impact")
    explorer.hover(9)
    assert_shows(explorer, 9, FUSED[1])
    shares = FUSED[1] / FUSED[1].sum(-1, keepdims=True)
    pixels = explorer.driver.execute_script(
        "const canvas = document.querySelector('.grid');"
        "const [rows, columns] = arguments;"
        "const context = canvas.getContext('2d');"
        "const cell = [canvas.width / columns, canvas.height / rows];"
        "return Array.from({length: rows * columns}, (_, p) => {"
        "  const x = (p % columns) * cell[0], y = Math.floor(p / columns) * cell[1];"
        "  const {data} = context.getImageData(x, y, cell[0], cell[1]);"
        "  let sum = 0; for (let k = 1; k < data.length; k += 4) sum += data[k];"
        "  return sum / (data.length / 4); });",
        *GRID,
    )
    # Green rises along viridis; the frame of the patch itself is left out.
    others = np.arange(PATCHES) != 9
    order = np.argsort(np.argsort(np.array(pixels)[others]))
    true = np.argsort(np.argsort(shares[9, others]))
    assert np.corrcoef(order, true)[0, 1] > 0.85


@pytest.mark.browser
def test_a_screen_reader_hears_the_numbers(explorer):
    explorer.open("#layer0=0")
    explorer.hover(5)
    status = explorer.find("#status")[0]
    explorer.until(lambda: "row 0, column 5" in status.get_attribute("textContent"))
    assert "Listens most to" in status.get_attribute("textContent")
    canvas = explorer.find(".grid")[0]
    assert canvas.get_attribute("aria-label") == "layer 0, all heads, patch (0, 5)"
