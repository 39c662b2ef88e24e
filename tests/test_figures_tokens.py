"""CLS and registers, heads, principal components and class maps, as they are drawn."""

import numpy as np
import pytest

from tests.test_figures_photographs import (
    BY_HEAD,
    EFFECT,
    GRID,
    HEADS,
    IMAGE,
    LAYERS,
    NAMES,
    PATCHES,
    POSITION,
    RNG,
    ROWS,
    TOKENS,
    shown,
)
from wf_vit import figures
from wf_vit.errors import UsageError


def test_class_attention_has_tokens_over_layers_and_over_heads():
    figure = figures.class_attention(IMAGE, ROWS, GRID, NAMES, layer=1)
    panels = iter(figure.axes)
    even = ROWS / ROWS.mean(-1, keepdims=True)
    fused = ROWS.mean(1) / ROWS.mean((1, 3))[..., None]
    for token, layer in np.ndindex(3, LAYERS):
        panel = next(panels)
        np.testing.assert_allclose(shown(panel).ravel(), fused[layer, token], rtol=1e-5)
        assert layer or panel.get_ylabel().split() == NAMES[token].split()
    for token, head in np.ndindex(3, HEADS):
        panel = next(panels)
        np.testing.assert_allclose(
            shown(panel).ravel(), even[1, head, token], rtol=1e-5
        )
        assert token or panel.get_title() == f"head {head}"
    (note,) = figure.texts
    assert "heads of layer 1" in note.get_text()


def test_rows_of_the_largest_numbers_are_drawn_like_others():
    large = ROWS / ROWS.max() * np.finfo(np.float32).max
    figure, expected = (
        figures.class_attention(IMAGE, rows, GRID, NAMES) for rows in (large, ROWS)
    )
    for panel, other in zip(figure.axes[:-1], expected.axes[:-1], strict=True):
        np.testing.assert_allclose(shown(panel), shown(other), rtol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_heads_have_a_row_for_each_layer_and_a_column_for_each_head(signed):
    impact = BY_HEAD - signed
    figure = figures.heads(IMAGE, impact, GRID, patch=7)
    rows = impact[:, :, 7]
    rows = rows if signed else rows / rows.mean(-1, keepdims=True)
    for panel, (layer, head) in zip(
        figure.axes, np.ndindex(LAYERS, HEADS), strict=False
    ):
        np.testing.assert_allclose(shown(panel).ravel(), rows[layer, head], rtol=1e-5)
        np.testing.assert_allclose(panel.lines[0].get_xydata(), POSITION[7][None])
        assert head or panel.get_ylabel().split() == ["layer", str(layer)]
        assert layer or panel.get_title() == f"head {head}"


def test_a_page_has_room_for_more_heads_than_a_column():
    impact = np.tile(BY_HEAD, (1, 6, 1, 1))
    counts = [
        sum(
            "head" in p.get_title()
            for p in figures.heads(IMAGE, impact, GRID, width=w).axes
        )
        for w in (figures.COLUMN, figures.PAGE)
    ]
    assert counts == [6, 12]


def test_principal_components_stand_beside_the_photograph():
    components = figures.components_of(TOKENS)
    photograph, colors = figures.principal_components(IMAGE, components, GRID).axes
    np.testing.assert_array_equal(shown(photograph), IMAGE)
    np.testing.assert_array_equal(shown(colors), components.reshape(*GRID, 3))
    with pytest.raises(UsageError, match="components run from -1"):
        figures.principal_components(IMAGE, components - 1, GRID)


def test_components_are_those_planted_whatever_the_signs_and_axes():
    planted = np.stack(
        [RNG.permuted(np.linspace(0, 1, PATCHES) ** 3) for _ in range(3)], 1
    )
    planted -= planted.mean(0)
    planted, _ = np.linalg.qr(planted)
    tokens = 5 + planted * [9, 5, 2] @ np.linalg.qr(RNG.normal(size=(8, 8)))[0][:3]
    found = figures.components_of(tokens)
    for own, color in zip(planted.T, found.T, strict=True):
        own = own * np.sign(own[np.argmax(np.abs(own))])
        assert np.corrcoef(own, color)[0, 1] > 0.99
        np.testing.assert_allclose([color.min(), color.max()], [0, 1])
    np.testing.assert_allclose(figures.components_of(10 - tokens), found, atol=1e-3)


@pytest.mark.parametrize("largest", [1e-30, np.finfo(np.float32).max])
def test_components_do_not_depend_on_the_unit(largest):
    tokens = TOKENS / np.abs(TOKENS).max() * np.float32(largest)
    expected = figures.components_of(TOKENS)
    np.testing.assert_allclose(figures.components_of(tokens), expected, atol=1e-3)


def test_an_outlier_leaves_contrast_to_the_other_patches():
    tokens = TOKENS.copy()[:, :2] * [10, 1]
    tokens = np.tile(tokens, (5, 1))
    tokens[0, 0] = 1e4
    color = figures.components_of(tokens)[1:, 0]
    assert np.ptp(color) == 1
    assert color.std() > 0.2


@pytest.mark.parametrize("tokens", [np.ones((PATCHES, 8)), np.zeros((1, 2))])
def test_components_without_variance_are_gray(tokens):
    np.testing.assert_array_equal(figures.components_of(tokens), 0.5)


def test_class_map_shows_all_layers_and_each_with_name_and_probability():
    by_layer, total = EFFECT.sum(1), EFFECT.sum((0, 1))
    figure = figures.class_map(IMAGE, total, by_layer, GRID, "cat", 0.873)
    photograph, whole, *layers = figure.axes[: 2 + LAYERS]
    np.testing.assert_array_equal(shown(photograph), IMAGE)
    np.testing.assert_array_equal(shown(whole).ravel(), total)
    for panel, own in zip(layers, by_layer, strict=True):
        np.testing.assert_array_equal(shown(panel).ravel(), own)
    assert whole.bbox.width > layers[0].bbox.width
    norm = whole.images[-1].norm
    assert norm.vmin == -norm.vmax
    assert figure.texts[0].get_text() == "cat, probability 87 %"
    with pytest.raises(UsageError, match=r"probability is 87.3"):
        figures.class_map(IMAGE, total, by_layer, GRID, "cat", 87.3)
