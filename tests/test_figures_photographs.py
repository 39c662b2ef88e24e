"""Figures over a photograph: what is drawn equals what was given, and stays visible."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.quiver import Quiver
from matplotlib.text import Text

from tests.paper import assert_fits_the_paper
from wf_vit import figures
from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.fields import responsive_field
from wf_vit.figures import choice, scales

GRID = (4, 6)
PATCHES = 24
LAYERS, HEADS = 3, 2
NAMES = ("CLS", "register 1", "register 2")

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (32, 48, 3), dtype=np.uint8)
IMPACT = RNG.gamma(0.5, size=(LAYERS, PATCHES, PATCHES)).astype(np.float32)
EFFECT = RNG.normal(size=IMPACT.shape).astype(np.float32)
BY_HEAD = RNG.gamma(0.5, size=(LAYERS, HEADS, PATCHES, PATCHES)).astype(np.float32)
ROWS = RNG.gamma(0.5, size=(LAYERS, HEADS, 3, PATCHES)).astype(np.float32)
ORDER = 1 + RNG.permuted(np.tile(np.arange(PATCHES), (LAYERS, 1)), axis=1)
TOKENS = RNG.normal(size=(PATCHES, 8)).astype(np.float32)
FIELD = responsive_field(jnp.asarray(IMPACT), GRID)
POSITION = geometry.coordinates(GRID)

# Each takes the arrays of its figure through ``as_type``.
FIGURES = {
    "interactions": lambda as_type, **options: figures.interactions(
        IMAGE, as_type(IMPACT), GRID, **options
    ),
    "interactions_signed": lambda as_type, **options: figures.interactions(
        IMAGE, as_type(EFFECT), GRID, **options
    ),
    "responsive_fields": lambda as_type, **options: figures.responsive_fields(
        IMAGE, type(FIELD)(*map(as_type, FIELD)), GRID, **options
    ),
    "field_size": lambda as_type, **options: figures.field_size(
        IMAGE, as_type(FIELD.area), GRID, **options
    ),
    "tendency": lambda as_type, **options: figures.tendency(
        IMAGE, as_type(FIELD.excess), GRID, **options
    ),
    "indiscriminative": lambda as_type, **options: figures.indiscriminative(
        IMAGE, as_type(IMPACT[:, 0]), GRID, **options
    ),
    "removal": lambda as_type, **options: figures.removal(
        IMAGE,
        as_type(ORDER),
        as_type(1 / np.arange(2.0, 11.0).reshape(LAYERS, 3)),
        GRID,
        (0.25, 0.5, 0.75),
        **options,
    ),
    "class_attention": lambda as_type, **options: figures.class_attention(
        IMAGE, as_type(ROWS), GRID, NAMES, **options
    ),
    "class_attention_fused": lambda as_type, **options: figures.class_attention(
        IMAGE, as_type(ROWS[:, 0]), GRID, NAMES, **options
    ),
    "heads": lambda as_type, **options: figures.heads(
        IMAGE, as_type(np.tile(BY_HEAD, (4, 6, 1, 1))), GRID, **options
    ),
    "heads_of_cls": lambda as_type, **options: figures.heads(
        IMAGE, as_type(ROWS[:, :, 0]), GRID, **options
    ),
    "principal_components": lambda as_type, **options: figures.principal_components(
        IMAGE, as_type(figures.components_of(TOKENS)), GRID, **options
    ),
    "class_map": lambda as_type, **options: figures.class_map(
        IMAGE,
        as_type(EFFECT.sum((0, 1))),
        as_type(EFFECT.sum(1)),
        GRID,
        "tabby, tabby cat, a name longer than a line of the title has room for",
        0.873,
        **options,
    ),
}
# In "removal" a number stands below the layer's name.
UNLAYERED = ("principal_components", "removal")
LAYERED = [name for name in FIGURES if name not in UNLAYERED]
SOURCE = "DINOv2 ViT-S/14 · knockout, effect on the output · field of 90 % of the mass"


def shown(panel):
    """Values, or colours, of the uppermost picture of a panel."""
    return np.asarray(panel.images[-1].get_array())


def drawn(panel):
    """Colours and opacities of the uppermost picture of a panel, [..., 4]."""
    picture = panel.images[-1]
    return picture.to_rgba(picture.get_array())


@pytest.mark.parametrize("grid", [(4, 6), (2, 12), (8, 3)])
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_or_too_small_to_read(name, grid, monkeypatch):
    monkeypatch.setitem(globals(), "GRID", grid)
    figure = FIGURES[name](np.asarray, source=SOURCE)
    assert_fits_the_paper(figure)
    texts = [t for t in figure.findobj(Text) if t.get_text().strip()]
    lines = " ".join(t.get_text() for t in texts).replace("\n", " ")
    assert lines.count(SOURCE) == 1, "model and indicator are named once"
    for panel in figure.axes:
        if panel.get_title():
            assert not panel.texts, "no text over pictures"
    # Labels below each other must not run together.
    sides = [panel.yaxis.label for panel in figure.axes if panel.get_ylabel()]
    labels = [t.get_window_extent() for t in (*figure.texts, *sides)]
    assert not any(a.overlaps(b) for a in labels for b in labels if a is not b)


@pytest.mark.parametrize("name", LAYERED)
def test_layers_are_called_by_their_names(name):
    def texts(figure):
        return {" ".join(t.get_text().split()) for t in figure.findobj(Text)}

    figure = FIGURES[name](np.asarray, width=figures.PAGE)
    assert {"layer 0", "layer 2"} <= texts(figure)
    renamed = [10 * layer for layer in range(12 if name == "heads" else LAYERS)]
    figure = FIGURES[name](np.asarray, layer_names=renamed)
    assert f"layer {renamed[-1]}" in texts(figure)
    with pytest.raises(UsageError, match=r"layer_names are \[3\]"):
        FIGURES[name](np.asarray, layer_names=[3])


@pytest.mark.parametrize("name", FIGURES)
def test_jax_arrays_draw_the_same(name):
    pictures = [
        [shown(panel) for panel in FIGURES[name](as_type).axes if panel.images]
        for as_type in (np.asarray, jnp.asarray)
    ]
    for ours, theirs in zip(*pictures, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_interactions_are_row_and_column_each_in_its_unit():
    patch = 9
    figure = figures.interactions(IMAGE, IMPACT, GRID, patch=patch)
    share = IMPACT / IMPACT.sum(-1, keepdims=True)
    others = np.delete(share, patch, axis=1)[:, :, patch]
    for layer in range(LAYERS):
        np.testing.assert_allclose(
            shown(figure.axes[layer]).ravel(), share[layer, patch] * PATCHES, rtol=1e-5
        )
        np.testing.assert_allclose(
            shown(figure.axes[LAYERS + layer]).ravel(),
            share[layer, :, patch] / others[layer].mean(),
            rtol=1e-5,
        )
    np.testing.assert_allclose(
        figure.axes[0].lines[0].get_xydata(), POSITION[patch][None]
    )


def test_opacity_is_the_value_and_legend_and_panel_agree():
    impact = np.full((1, PATCHES, PATCHES), 1.0, np.float32)
    impact[0, 9, [4, 5, 6]] = [4, 8, 16]
    figure = figures.interactions(IMAGE, impact, GRID, patch=9)
    panel, bar = figure.axes[0], figure.axes[2]
    np.testing.assert_array_equal(panel.images[0].get_array(), IMAGE)
    colors = drawn(panel).reshape(PATCHES, 4)
    assert (np.delete(colors[:, 3], [4, 5, 6]) == 0).all(), "what is even is clear"
    assert 0 < colors[4, 3] < colors[5, 3] < colors[6, 3] < 1
    # The bar, over light and dark, has the panel's colour where its norm puts a value.
    picture, ground = bar.images[-1], np.asarray(bar.images[0].get_array())
    assert np.ptp(ground) > 0.5
    assert picture.cmap is panel.images[-1].cmap
    assert picture.get_extent() == [0, 1, 0, 1]
    ramp = picture.to_rgba(picture.get_array())[0]
    values = shown(panel).ravel()[4:7]
    at = np.asarray(panel.images[-1].norm(values))
    np.testing.assert_allclose(
        ramp[(at * 255).round().astype(int)], colors[4:7], atol=0.02
    )
    ticks = {
        t.get_text(): x
        for t, x in zip(bar.get_xticklabels(), bar.get_xticks(), strict=True)
    }
    for text, place in ticks.items():
        value = float(text.strip("≤≥ "))
        np.testing.assert_allclose(panel.images[-1].norm(value), place, atol=1e-6)


def test_signed_impact_diverges_from_zero_in_its_own_unit():
    effect = EFFECT.copy()
    effect[0, 9, [1, 2, 3]] = [0, 0.5, -0.5]
    figure = figures.interactions(IMAGE, effect, GRID, patch=9, unit="added")
    panel = figure.axes[0]
    np.testing.assert_array_equal(shown(panel).ravel(), effect[0, 9])
    np.testing.assert_array_equal(shown(figure.axes[LAYERS]).ravel(), effect[0, :, 9])
    norm = panel.images[-1].norm
    assert norm.vmin == -norm.vmax < 0
    zero, more, less = drawn(panel).reshape(PATCHES, 4)[[1, 2, 3]]
    assert zero[3] == pytest.approx(0, abs=0.01)
    assert more[3] == pytest.approx(less[3], abs=0.01)
    assert more[3] > 0.1
    assert more[0] > more[2], "red speaks for"
    assert less[2] > less[0], "blue speaks against"
    (bar,) = figure.axes[2 * LAYERS :]
    assert bar.get_xlabel() == "added"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_impact_without_differences_is_no_color_and_no_warning(value, recwarn):
    impact = np.full((1, PATCHES, PATCHES), value, np.float32)
    figure = figures.interactions(IMAGE, impact, GRID)
    for panel in figure.axes[:2]:
        assert np.isfinite(shown(panel)).all()
        assert (drawn(panel)[..., 3] == 0).all()
    assert_fits_the_paper(figures.field_size(IMAGE, impact[:, 0], GRID))
    assert_fits_the_paper(
        figures.tendency(IMAGE, np.zeros((1, PATCHES, 2), np.float32), GRID)
    )
    assert not recwarn.list


def test_fields_are_outlined_along_the_edges_of_patches():
    patch = 2 * GRID[1] + 3  # Row 2, column 3.
    mask = np.zeros((1, PATCHES, PATCHES), bool)
    mask[0, patch, [patch, patch + 1, 0]] = True  # And one in the corner.
    excess = np.zeros((1, PATCHES, 2), np.float32)
    excess[0, patch] = (2, -1)
    field = FIELD._replace(mask=mask, excess=excess)
    figure = figures.responsive_fields(IMAGE, field, GRID, patches=[patch])
    (panel,) = figure.axes
    assert panel.get_ylabel().split() == ["patch", "2,", "3"]
    np.testing.assert_array_equal(panel.images[0].get_array(), IMAGE)
    (line,) = (c for c in panel.collections if isinstance(c, LineCollection))
    edges = {(tuple(start), tuple(end)) for start, end in np.array(line.get_segments())}
    across = [(x, y) for y in (1.5, 2.5) for x in (2.5, 3.5)]
    across += [(-0.5, -0.5), (-0.5, 0.5)]
    down = [(2.5, 1.5), (4.5, 1.5), (-0.5, -0.5), (0.5, -0.5)]
    assert edges == {((x, y), (x + 1, y)) for x, y in across} | {
        ((x, y), (x, y + 1)) for x, y in down
    }
    light = shown(panel)[..., 3].ravel()
    assert (light[mask[0, patch]] == 0).all()
    assert (light[~mask[0, patch]] > 0).all()
    assert light.max() <= 0.5, "what is outside stays recognisable"
    np.testing.assert_allclose(panel.lines[0].get_xydata(), [(3, 2)])
    (arrow,) = (c for c in panel.collections if isinstance(c, Quiver))
    (note,) = figure.texts
    factor = float(note.get_text().split("geometry, ")[1].split(" times")[0])
    np.testing.assert_allclose([arrow.U[0], arrow.V[0]], [2 * factor, -factor])


def test_fields_have_a_row_for_each_patch_and_a_column_for_each_layer():
    patches = [3, 20]
    figure = figures.responsive_fields(IMAGE, FIELD, GRID, patches=patches)
    mask = np.asarray(FIELD.mask)
    for panel, (row, layer) in zip(figure.axes, np.ndindex(2, LAYERS), strict=True):
        outside = shown(panel)[..., 3].ravel() > 0
        np.testing.assert_array_equal(~outside, mask[layer, patches[row]])


def test_field_size_is_in_percent_of_the_picture():
    area = np.asarray(FIELD.area)
    figure = figures.field_size(IMAGE, area, GRID)
    *panels, bar = figure.axes
    assert "%" in bar.get_xlabel()
    for panel, own in zip(panels, area, strict=True):
        np.testing.assert_allclose(shown(panel).ravel(), 100 * own, rtol=1e-5)
    opacity = drawn(panels[0])[..., 3].ravel()
    assert np.argmax(area[0]) in np.flatnonzero(opacity == opacity.max())
    assert np.argmin(area[0]) in np.flatnonzero(opacity == opacity.min())


def test_tendency_arrows_and_flow_have_the_direction_of_the_excess():
    excess = np.zeros((1, PATCHES, 2), np.float32)
    excess[..., 1] = 3.0  # Downwards on the photograph.
    excess[0, 0] = 0
    figure = figures.tendency(IMAGE, excess, GRID)
    arrows, flow, legend = figure.axes
    (quiver,) = arrows.collections
    (text,) = (t.get_text() for t in legend.texts)
    assert "beyond geometry" in text
    factor = float(text.split("arrows: ")[1].split(" times")[0])
    np.testing.assert_allclose(np.stack([quiver.U, quiver.V], -1), factor * excess[0])
    low, high = arrows.get_ylim()
    assert low > high, "y runs downwards, so a positive V is drawn downwards"
    colors = shown(flow)
    height, width = colors.shape[:2]
    np.testing.assert_allclose(
        colors[height // 2 :, width // 2 :, :3],
        np.broadcast_to(
            figures.flow_colors(np.array([0.0, 1.0])), (height // 2, width // 2, 3)
        ),
        atol=1e-6,
    )
    assert colors[0, 0, 3] == 0, "no tendency, no colour"
    assert colors[-1, -1, 3] > 0.7
    assert "rim of the wheel: 3 patches" in text


def test_rounding_is_no_tendency():
    excess = np.full_like(FIELD.excess, 1e-6)
    figure = figures.tendency(IMAGE, excess, GRID)
    (quiver,) = figure.axes[0].collections
    assert np.hypot(quiver.U, quiver.V).max() < 0.01, "of a patch"
    figure = figures.responsive_fields(IMAGE, FIELD._replace(excess=excess), GRID)
    (quiver,) = figure.axes[0].collections[-1:]
    assert np.hypot(quiver.U, quiver.V).max() < 0.01


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_even_of_the_largest_numbers(dtype):
    values = np.full(4, np.finfo(dtype).max)
    np.testing.assert_allclose(scales.even(values), 1)


def test_even_of_many_numbers_of_half_precision():
    values = np.random.default_rng(0).uniform(size=4096).astype(np.float16)
    exact = np.float64(values) / np.float64(values).mean()
    np.testing.assert_allclose(scales.even(values), exact, rtol=1e-5)


def test_indiscriminative_darkens_the_lowest():
    values = np.arange(1, PATCHES + 1, dtype=np.float32)[None]
    figure = figures.indiscriminative(IMAGE, values, GRID, share=0.25)
    without, measured, _ = figure.axes
    assert without.get_ylabel().split() == ["without", "25", "%"]
    dark = shown(without)[..., 3].ravel()
    assert (dark[:6] > 0.5).all()
    assert (dark[6:] == 0).all()
    np.testing.assert_allclose(shown(measured).ravel(), values[0] / 12.5, rtol=1e-6)


def test_removal_darkens_the_first_to_go_and_says_how_much_is_left():
    figure = FIGURES["removal"](np.asarray, layer_names=[0, 3, 9])
    panels = np.reshape(figure.axes, (3, LAYERS))
    titles = [[panel.get_title() for panel in row] for row in panels]
    assert titles[0] == ["layer 0\n0.500", "layer 3\n0.200", "layer 9\n0.125"]
    assert titles[1] == ["0.333", "0.167", "0.111"]
    for row, count in zip(panels, (6, 12, 18), strict=True):
        for panel, order in zip(row, ORDER, strict=True):
            dark = shown(panel)[..., 3].ravel()
            np.testing.assert_array_equal(dark > 0.5, order <= count)
    with pytest.raises(UsageError, match="cosine has the shape"):
        figures.removal(IMAGE, ORDER, np.ones((3, 2)), GRID, (0.25, 0.5, 0.75))


def test_telling_patches_have_the_largest_discriminability_and_keep_apart():
    values = np.zeros(PATCHES, np.float32)
    values[[8, 9, 16]] = [3, 2.9, 2]  # Row 1, columns 2 and 3; row 2, column 4.
    assert figures.telling_patches(values, GRID, 2).tolist() == [8, 16]
    values[0] = 5  # The rim counts half.
    assert figures.telling_patches(values, GRID).tolist() == [8]
    values[0] = 7
    assert figures.telling_patches(values, GRID).tolist() == [0]
    assert len(set(figures.telling_patches(np.ones(PATCHES), GRID, PATCHES))) == PATCHES
    with pytest.raises(UsageError, match="count is 25"):
        figures.telling_patches(values, GRID, 25)


def test_the_patch_shown_is_the_one_whose_influence_depends_on_who_listens():
    impact = np.ones((LAYERS, PATCHES, PATCHES), np.float32)
    # Patch 8 matters to half of all, patch 9 to all alike, patch 15 to itself alone.
    impact[:, ::2, 8] = 4
    impact[:, :, 9] = 9
    impact[:, 15, 15] = 50
    figure = figures.interactions(IMAGE, impact, GRID)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), POSITION[8][None])
    chosen = choice.most_discriminative(impact > 2, GRID)
    assert chosen.tolist() == [8]


@pytest.mark.parametrize("largest", [1e-35, np.finfo(np.float32).max])
def test_the_patch_shown_does_not_depend_on_the_unit(largest):
    effect = EFFECT / np.abs(EFFECT).max() * np.float32(largest)
    chosen = choice.most_discriminative(effect, GRID, 3)
    expected = choice.most_discriminative(EFFECT, GRID, 3)
    np.testing.assert_array_equal(chosen, expected)
    values = IMPACT[0, 0] / IMPACT[0, 0].max() * np.float32(largest)
    expected = figures.telling_patches(IMPACT[0, 0], GRID, 3)
    np.testing.assert_array_equal(figures.telling_patches(values, GRID, 3), expected)


@pytest.mark.filterwarnings("error")
def test_the_patch_shown_is_the_only_one():
    drawn = (
        figures.interactions(IMAGE, IMPACT[:, :1, :1], (1, 1)),
        figures.interactions(IMAGE, -IMPACT[:, :1, :1], (1, 1)),
        figures.heads(IMAGE, BY_HEAD[..., :1, :1], (1, 1)),
    )
    for figure in drawn:
        np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), [[0, 0]])


def test_the_scale_is_not_stretched_by_an_outlier():
    values = np.ones(1000)
    values[0], values[1:50] = 1e6, 20
    scale = scales.over_mean(values, "x")
    assert scale.norm.vmax == 20
    assert list(scale.ticks.values())[-1] == "≥ 20"
    scale = scales.signed(-values, "x")
    assert scale.norm.vmax == 20
    assert list(scale.ticks.values()) == ["≤ \N{MINUS SIGN}20", "0", "≥ 20"]


WRONG = {
    "interactions": (lambda: figures.interactions(IMAGE, IMPACT[0], GRID), "L, 24, 24"),
    "responsive_fields": (
        lambda: figures.responsive_fields(IMAGE, FIELD._replace(excess=IMPACT), GRID),
        "3, 24, 2",
    ),
    "field_size": (lambda: figures.field_size(IMAGE, IMPACT, GRID), "L, 24"),
    "tendency": (lambda: figures.tendency(IMAGE, IMPACT, GRID), "L, 24, 2"),
    "indiscriminative": (
        lambda: figures.indiscriminative(IMAGE, IMPACT, GRID),
        "L, 24",
    ),
    "class_attention": (
        lambda: figures.class_attention(IMAGE, ROWS, GRID),
        "L, H, 1, 24",
    ),
    "heads": (lambda: figures.heads(IMAGE, ROWS, GRID), "L, H, 24, 24"),
    "principal_components": (
        lambda: figures.principal_components(IMAGE, TOKENS, GRID),
        "24, 3",
    ),
    "class_map": (
        lambda: figures.class_map(IMAGE, TOKENS[:, 0], IMPACT, GRID, "cat", 1.0),
        "L, 24",
    ),
    "telling_patches": (lambda: figures.telling_patches(IMPACT, GRID), "24"),
}


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shape_is_an_error_with_both_shapes(name):
    draw, expected = WRONG[name]
    with pytest.raises(UsageError) as error:
        draw()
    assert f"= [{expected}], since the grid (4, 6)" in str(error.value)
    assert "24" in str(error.value).split("expected")[0]


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("name", FIGURES)
def test_a_wrong_grid_is_an_error(name):
    def longer(array):
        patches = [axis for axis, size in enumerate(array.shape) if size == PATCHES]
        for axis in patches:
            array = np.concatenate([array, np.take(array, [0], axis)], axis)
        return array

    with pytest.raises(UsageError, match=r"25.*grid \(4, 6\) has 24 patches"):
        FIGURES[name](longer)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("name", [n for n in FIGURES if n != "responsive_fields"])
def test_nan_is_an_error(name):
    with pytest.raises(UsageError, match="NaN or infinite"):
        FIGURES[name](lambda array: np.asarray(array) * np.nan)


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("name", FIGURES)
def test_a_normalised_image_is_an_error(name, monkeypatch):
    monkeypatch.setitem(globals(), "IMAGE", IMAGE / 255)
    with pytest.raises(UsageError, match=r"\(32, 48, 3\).*float64.*uint8"):
        FIGURES[name](np.asarray)


def test_values_that_cannot_be_meant_are_errors():
    with pytest.raises(UsageError, match="patch is 24"):
        figures.interactions(IMAGE, IMPACT, GRID, patch=24)
    with pytest.raises(UsageError, match="patch is -1"):
        figures.heads(IMAGE, BY_HEAD, GRID, patch=-1)
    with pytest.raises(UsageError, match="layer is 3"):
        figures.class_attention(IMAGE, ROWS, GRID, NAMES, layer=3)
    with pytest.raises(UsageError, match="as low as"):
        figures.class_attention(IMAGE, -ROWS, GRID, NAMES)
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.field_size(IMAGE, IMPACT[:0, 0], GRID)
