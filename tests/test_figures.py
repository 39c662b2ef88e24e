"""Tests of wf_vit.figures: what is drawn equals what was given, and fits the paper."""

import io

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Ellipse, Rectangle

from tests.paper import assert_fits_the_paper
from wf_vit import figures
from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.fields import Field, responsive_field
from wf_vit.models.windowfree import make_fields

GRID = (4, 6)
PATCHES = 24
LAYERS, HEADS = 3, 2

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (32, 48, 3), dtype=np.uint8)
IMPACT = RNG.gamma(0.5, size=(LAYERS, PATCHES, PATCHES)).astype(np.float32)
EXTENTS = RNG.gamma(2.0, size=(LAYERS, 2, HEADS, PATCHES, 4)).astype(np.float32)
FIELD = responsive_field(jnp.asarray(IMPACT), GRID)
HEADS_BOX = RNG.gamma(2.0, size=(LAYERS, HEADS, PATCHES, 4)).astype(np.float32)


def rows(offset=0.0):
    """Metrics as training writes them: not every key in every row."""
    return [
        {"step": 10, "train/loss": 2.0 + offset, "train/learning_rate": 1e-3},
        {"step": 20, "train/loss": 1.0 + offset},
        {"step": 20, "validation/loss": 1.5, "validation/top1": 0.25 + offset},
        {"step": 40, "validation/loss": 1.2, "validation/top1": 0.5 + offset},
    ]


MANY_HEADS = np.tile(EXTENTS, (4, 1, 7, 1, 1))
FIGURES = {
    "training_curves": lambda: figures.training_curves(
        {"ViT": rows(), "WinfT": rows()}
    ),
    "interactions": lambda: figures.interactions(IMAGE, IMPACT, GRID),
    "responsive_fields": lambda: figures.responsive_fields(IMAGE, FIELD, GRID),
    "tendency": lambda: figures.tendency(IMAGE, np.asarray(FIELD.displacement), GRID),
    "depth_profile": lambda: figures.depth_profile(
        IMPACT[:, 0, :12],
        "mean attention\ndistance (patches)",
        spread=IMPACT[:, 1, :12],
    ),
    "indiscriminative": lambda: figures.indiscriminative(IMAGE, IMPACT[:, 0], GRID),
    "learned_fields": lambda: figures.learned_fields(
        np.stack([IMAGE, IMAGE]), MANY_HEADS, GRID
    ),
    "learned_beside_measured": lambda: figures.learned_beside_measured(
        IMAGE, EXTENTS[:, 0], HEADS_BOX, GRID
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_or_too_small_to_read(name):
    assert_fits_the_paper(FIGURES[name]())


@pytest.mark.parametrize("name", ["tendency", "learned_fields"])
def test_pdf_text_is_text(name):
    file = io.BytesIO()
    with figures.style():
        FIGURES[name]().savefig(file, format="pdf")
    # Type 3 fonts are drawings of letters, which publishers refuse.
    assert b"/Type3" not in file.getvalue()


def test_style_does_not_leak():
    before = dict(mpl.rcParams)
    FIGURES["depth_profile"]()
    assert dict(mpl.rcParams) == before


def lines_of(panel):
    return {
        (line.get_color(), line.get_linestyle()): line.get_xydata()
        for line in panel.lines
        if len(line.get_xydata())
    }


def test_training_curves_show_the_rows():
    figure = figures.training_curves({"a": rows(), "b": rows(0.25)})
    loss, accuracy = figure.axes
    lines = lines_of(accuracy)
    np.testing.assert_allclose(
        sorted(xy.tolist() for xy in lines.values()),
        [[[20, 25], [40, 50]], [[20, 50], [40, 75]]],
    )
    assert len(lines_of(loss)) == 4
    assert [t.get_text() for t in accuracy.get_legend().get_texts()] == ["a", "b"]
    assert [t.get_text() for t in loss.get_legend().get_texts()] == [
        "train",
        "validation",
    ]


def test_training_curves_of_one_run_need_no_label():
    _, accuracy = figures.training_curves(rows()).axes
    assert accuracy.get_legend() is None


def test_training_curves_without_metrics_say_so():
    with pytest.raises(UsageError, match="learning_rate"):
        figures.training_curves([{"step": 1, "learning_rate": 0.1}])


def heat(panel):
    return np.asarray(panel.images[-1].get_array())


def test_interactions_are_row_and_column_in_units_of_an_even_row():
    patch = 9
    figure = figures.interactions(IMAGE, IMPACT, GRID, patch=patch)
    share = IMPACT / IMPACT.sum(-1, keepdims=True) * PATCHES
    listens, heard = figure.axes[:LAYERS], figure.axes[LAYERS : 2 * LAYERS]
    for layer in range(LAYERS):
        np.testing.assert_allclose(
            heat(listens[layer]), share[layer, patch].reshape(GRID), rtol=1e-5
        )
        np.testing.assert_allclose(
            heat(heard[layer]), share[layer, :, patch].reshape(GRID), rtol=1e-5
        )


def test_fields_are_boxes_and_ellipses_where_they_belong():
    patch = 2 * GRID[1] + 3  # Row 2, column 3.
    box = np.zeros((1, PATCHES, 4), np.float32)
    box[0, patch] = (2, 1, 0.5, 9)
    covariance = np.zeros((1, PATCHES, 2, 2), np.float32)
    covariance[0, patch] = ((4, 0), (0, 1))
    displacement = np.full((1, PATCHES, 2), (1, -1), np.float32)
    field = Field(box, box[..., 0], displacement, covariance, box[..., 0] > 0)
    figure = figures.responsive_fields(IMAGE, field, GRID, patches=[patch])
    boxes, ellipses = figure.axes
    (drawn,) = (p for p in boxes.patches if isinstance(p, Rectangle))
    # Cut at the lower rim of the photograph, 3.5.
    np.testing.assert_allclose(
        (*drawn.get_xy(), drawn.get_width(), drawn.get_height()), (1, 1, 2.5, 2.5)
    )
    (ellipse,) = (p for p in ellipses.patches if isinstance(p, Ellipse))
    np.testing.assert_allclose(ellipse.center, (4, 1))
    np.testing.assert_allclose((ellipse.width, ellipse.height), (8, 4))
    assert ellipse.angle % 180 == pytest.approx(0)


def test_tendency_arrows_point_to_the_centroid():
    displacement = np.zeros((1, PATCHES, 2), np.float32)
    displacement[..., 1] = 3.0  # Downwards on the photograph.
    figure = figures.tendency(IMAGE, displacement, GRID)
    arrows, flow, _ = figure.axes
    (quiver,) = arrows.collections
    assert len(quiver.U) == PATCHES
    np.testing.assert_allclose(quiver.U, 0)
    assert (quiver.V > 0).all()
    low, high = arrows.get_ylim()
    assert low > high, "y runs downwards, so a positive V is drawn downwards"
    np.testing.assert_allclose(
        np.asarray(flow.images[0].get_array()),
        np.broadcast_to(figures.flow_colors(np.array([0.0, 1.0])), (*GRID, 3)),
        atol=1e-6,
    )


def test_flow_colors_are_gray_at_rest_and_stronger_with_length():
    rest, short, long, longer = figures.flow_colors(
        np.array([[0, 0], [0.5, 0], [1, 0], [5, 0]], float)
    )
    np.testing.assert_allclose(rest, rest[0], atol=2e-3)
    assert np.ptp(short) < np.ptp(long)
    np.testing.assert_allclose(long, longer)


# Machado, Oliveira and Fernandes (2009): what is seen without one kind of cone.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_flow_colors_tell_directions_apart_also_to_the_color_blind(kind):
    angles = np.arange(8) * np.pi / 4
    colors = figures.flow_colors(np.stack([np.cos(angles), np.sin(angles)], -1))
    linear = np.where(
        colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4
    )
    seen = np.clip(linear @ np.transpose(BLINDNESS[kind]), 0, 1) ** (1 / 2.2)
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert apart[~np.eye(8, dtype=bool)].min() > 0.08


def test_depth_profile_keeps_heads_at_their_layer():
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    (panel,) = figures.depth_profile(values, "distance").axes
    mean, *heads = (line.get_xydata() for line in panel.lines)
    np.testing.assert_allclose(mean, [[0, 0.5], [1, 2.5], [2, 4.5]])
    for head, drawn in enumerate(heads):
        np.testing.assert_allclose(drawn[:, 1], values[:, head])
        np.testing.assert_allclose(np.round(drawn[:, 0]), [0, 1, 2])


def test_indiscriminative_marks_the_lowest():
    values = np.arange(1, PATCHES + 1, dtype=np.float32)[None]
    figure = figures.indiscriminative(IMAGE, values, GRID, share=0.25)
    (crosses,) = figure.axes[0].lines
    np.testing.assert_allclose(crosses.get_xydata(), geometry.coordinates(GRID)[:6])


def test_learned_areas_are_those_of_the_model():
    np.testing.assert_allclose(
        figures.learned_areas(EXTENTS[0], GRID, 0.5),
        make_fields(jnp.asarray(EXTENTS[0]), grid=GRID, softness=0.5).area(),
        rtol=1e-4,
    )


def test_learned_fields_draw_each_head_of_the_given_patch():
    patch = GRID[1] + 2  # Row 1, column 2.
    extents = EXTENTS.copy()
    extents[:, 1, :, patch] = [[1, 0.5, 2, 1.5], [0.25, 1, 0.25, 2]]
    images = np.stack([IMAGE, IMAGE])
    figure = figures.learned_fields(images, extents, GRID, patches=[0, patch])
    second_row = figure.axes[LAYERS : 2 * LAYERS]
    for panel in second_row:
        boxes = [p for p in panel.patches if isinstance(p, Rectangle)]
        np.testing.assert_allclose(
            [(*b.get_xy(), b.get_width(), b.get_height()) for b in boxes],
            [(1, 0.5, 3, 2), (1.75, 0, 0.5, 3)],
        )
        assert len({to_hex(b.get_edgecolor()) for b in boxes}) == HEADS


def test_learned_beside_measured_puts_each_in_its_row():
    figure = figures.learned_beside_measured(
        IMAGE, np.full_like(HEADS_BOX, 0.5), np.full_like(HEADS_BOX, 1.0), GRID, patch=8
    )
    widths = [
        [p.get_width() for p in panel.patches if isinstance(p, Rectangle)]
        for panel in figure.axes
    ]
    assert widths == [[1.0] * HEADS] * LAYERS + [[2.0] * HEADS] * LAYERS


def test_telling_patches_have_ink_and_keep_apart():
    image = np.full((40, 60, 3), 255, np.uint8)
    image[12:18, 22:28] = 0  # Row 1, column 2.
    image[32:38, 52:58] = 60  # Row 3, column 5, on the rim.
    first, second = figures.telling_patches(image, GRID, 2)
    assert (first, second) == (GRID[1] + 2, 3 * GRID[1] + 5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.interactions(IMAGE, IMPACT, (5, 5)),
        lambda: figures.responsive_fields(IMAGE, FIELD, (5, 5)),
        lambda: figures.tendency(IMAGE, np.asarray(FIELD.displacement), (5, 5)),
        lambda: figures.indiscriminative(IMAGE, IMPACT[:, 0], (5, 5)),
        lambda: figures.learned_fields(np.stack([IMAGE] * 2), EXTENTS, (5, 5)),
        lambda: figures.learned_beside_measured(
            IMAGE, EXTENTS[:, 0], HEADS_BOX, (5, 5)
        ),
    ],
)
def test_a_wrong_grid_is_an_error(draw):
    with pytest.raises(UsageError, match=r"grid \(5, 5\) has 25 patches.*24"):
        draw()


def test_images_and_extents_must_belong_together():
    with pytest.raises(UsageError, match="1 images"):
        figures.learned_fields(IMAGE[None], EXTENTS, GRID)
