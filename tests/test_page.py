"""The page of wf_vit.page: the coding, and what is embedded."""

import base64
import json
import re
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from wf_vit import page
from wf_vit.errors import UsageError
from wf_vit.fields import responsive_field
from wf_vit.grid import distances
from wf_vit.page import coding

GRID = (4, 6)
PATCHES = 24
LAYERS, HEADS = 3, 2
MASS = 0.8
TITLE = "Field & <arrow>"

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
EFFECT[0] *= 9  # The first layer is the first to go where a page is too large.
BY_LAYER = EFFECT.sum(1)[:, 2:]
CAT = page.ClassEffect(EFFECT, BY_LAYER.sum(0), BY_LAYER, "<cat>", 0.625)
LEARNED = RNG.gamma(2.0, size=(LAYERS, HEADS, PATCHES, 4)).astype(np.float32)
LEARNED[..., :2] -= 2


def build(**options):
    indicators = {
        "mean": page.Indicator(ALL_FUSED, ALL_HEADS),
        "other": page.Indicator(ALL_OTHER),
    }
    given = {"prefix": PREFIX, "class_effect": CAT, "learned": LEARNED, "mass": MASS}
    options = given | options
    return page.explorer(IMAGE, indicators, GRID, **options)


@pytest.fixture(scope="module")
def text():
    return build(title=TITLE, model="ViT </script> 3")


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
    arrows = np.moveaxis(numbers[:2], 0, -1) / meta(text)["arrowSteps"]
    np.testing.assert_allclose(arrows, field.excess, atol=2e-4)
    np.testing.assert_allclose(numbers[2] / PATCHES, field.area, atol=1e-5)
    bits = unpack(text, "0-heads-mask").reshape(LAYERS, HEADS, PATCHES, -1)
    masks = np.unpackbits(bits, axis=-1, count=PATCHES)
    np.testing.assert_array_equal(masks, field.mask)


def test_fields_are_those_of_the_exact_impact_where_codes_are_equal():
    # The last patches are above the first by less than a step of a code.
    impact = np.tile(1 + 1e-4 * np.arange(PATCHES, dtype=np.float32), (1, PATCHES, 1))
    text = page.explorer(IMAGE, {"x": page.Indicator(impact)}, GRID, mass=MASS)
    assert len(set(unpack(text, "0-fused-codes"))) == 1
    bits = unpack(text, "0-fused-mask").reshape(PATCHES, -1)
    field = responsive_field(jnp.asarray(impact[0]), GRID, mass=MASS)
    masks = np.unpackbits(bits, axis=-1, count=PATCHES)
    np.testing.assert_array_equal(masks, field.mask)


@pytest.mark.parametrize(("largest", "dtype"), [(3e38, "float32"), (6e4, "float16")])
def test_impact_of_any_size_is_shown(largest, dtype):
    impact = (FUSED / FUSED.max() * largest).astype(dtype)
    np.testing.assert_allclose(coding.row_shares(impact).sum(-1), 1, rtol=1e-5)
    large = np.pad(impact, ((0, 0), (2, 0), (2, 0)), constant_values=largest)
    text = page.explorer(IMAGE, {"x": page.Indicator(large)}, GRID, prefix=PREFIX)
    given = unpack16(text, "0-fused-given").reshape(LAYERS, TOKENS, 2)
    rows = np.float64(np.roll(large, -2, axis=1))
    expected = rows[..., :2] / rows.sum(-1, keepdims=True)
    np.testing.assert_allclose(given / 65535, expected, atol=1e-5)


def test_who_listens_to_nothing_listens_to_no_prefix_token():
    impact = ALL_FUSED.copy()
    impact[-1, 2:] = 0
    text = page.explorer(IMAGE, {"x": page.Indicator(impact)}, GRID, prefix=PREFIX)
    given = unpack16(text, "0-fused-given").reshape(LAYERS, TOKENS, 2)
    assert not given[-1, :PATCHES].any()
    assert given[-1, PATCHES:].all()


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
    np.testing.assert_allclose(maps[:-1], BY_LAYER, atol=5e-3)
    np.testing.assert_allclose(maps[-1], CAT.class_map, atol=5e-3)


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(3e38, "float32"), (1e-36, "float32"), (6e4, "float16"), (0, "float16")],
)
@pytest.mark.filterwarnings("error")
def test_effects_of_any_size_are_shown(largest, dtype):
    effect = (EFFECT / np.abs(EFFECT).max() * largest).astype(dtype)
    by_layer = effect[:, 0, 2:]
    cat = page.ClassEffect(effect, by_layer[1], by_layer, "cat", 0.5)
    text = build(class_effect=cat)
    note = meta(text)["indicators"][-1]
    maps = unpack16(text, "class-maps").view(np.int16).reshape(LAYERS + 1, PATCHES)
    found = maps / 32767 * note["mapLargest"]
    np.testing.assert_allclose(found[:-1], by_layer, atol=2e-5 * largest)
    codes = unpack(text, "class-codes").reshape(LAYERS, TOKENS, PATCHES)
    scales = (unpack16(text, "class-scales") / 65535.0) ** 2
    row = scales.reshape(LAYERS, TOKENS, 1) * note["largest"]
    size = ((codes & 127) / 127) ** 2 * row
    rows = np.float64(np.roll(np.abs(effect), -2, axis=1)[..., 2:])
    assert (np.abs(size - rows) <= 0.0085 * row + 1e-6 * largest).all()


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
        # The layer with the largest numbers may be gone: they mean the same.
        maps = unpack16(text, "class-maps").view(np.int16).reshape(-1, PATCHES)
        maps = maps * pages[-1]["indicators"][-1]["mapLargest"] / 32767
        np.testing.assert_allclose(maps[-1], CAT.class_map, atol=1e-2)
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
