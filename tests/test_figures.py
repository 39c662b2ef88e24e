"""Tests of wf_vit.figures: what is drawn equals what was given, and fits the paper."""

import io

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Polygon
from matplotlib.quiver import Quiver

from tests.paper import assert_fits_the_paper
from wf_vit import figures
from wf_vit import grid as geometry
from wf_vit.errors import UsageError
from wf_vit.fields import responsive_field
from wf_vit.models.learned_fields import make_fields

GRID = (4, 6)
PATCHES = 24
LAYERS, HEADS = 3, 2

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (32, 48, 3), dtype=np.uint8)
IMPACT = RNG.gamma(0.5, size=(LAYERS, PATCHES, PATCHES)).astype(np.float32)
LEARNED = RNG.gamma(2.0, size=(LAYERS, 2, HEADS, PATCHES, 4)).astype(np.float32)
LEARNED[..., :2] -= 2
HEADS_FIELD = responsive_field(jnp.asarray(np.stack([IMPACT] * HEADS, 1)), GRID)


def rows(offset=0.0):
    """Metrics as training writes them: not every key in every row."""
    return [
        {"step": 10, "train/loss": 2.0 + offset, "train/learning_rate": 1e-3},
        {"step": 20, "train/loss": 1.0 + offset},
        {"step": 20, "validation/loss": 1.5, "validation/top1": 0.25 + offset},
        {"step": 40, "validation/loss": 1.2, "validation/top1": 0.5 + offset},
    ]


MANY_HEADS = np.tile(LEARNED, (4, 1, 7, 1, 1))
FIGURES = {
    "training_curves": lambda: figures.training_curves(
        {"ViT": rows(), "WinfT": rows()}
    ),
    "depth_profile": lambda: figures.depth_profile(
        IMPACT[:, 0, :12],
        "mean attention\ndistance (patches)",
        spread=IMPACT[:, 1, :12],
    ),
    "learned_fields": lambda: figures.learned_fields(
        np.stack([IMAGE, IMAGE]), MANY_HEADS, GRID, source="WinfT"
    ),
    "learned_beside_measured": lambda: figures.learned_beside_measured(
        IMAGE, LEARNED[:, 0], HEADS_FIELD, GRID, source="WinfT · mean attention"
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_or_too_small_to_read(name):
    assert_fits_the_paper(FIGURES[name]())


@pytest.mark.parametrize("name", ["depth_profile", "learned_fields"])
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


def test_learned_areas_are_those_of_the_model():
    np.testing.assert_allclose(
        figures.learned_areas(LEARNED[0], GRID),
        make_fields(jnp.asarray(LEARNED[0]), grid=GRID).area(),
        rtol=1e-4,
    )


def outlines(panel):
    """Lowest and highest x and y of the ellipses on a panel."""
    points = [p.get_xy() for p in panel.patches if isinstance(p, Polygon)]
    return [(*xy.min(0), *xy.max(0)) for xy in points]


def test_learned_fields_draw_each_head_of_the_given_patch():
    patch = GRID[1] + 2  # Row 1, column 2.
    learned = LEARNED.copy()
    half = 1 / geometry.HALF
    learned[:, 1, :, patch] = [[0.5, 0.25, half, half / 2], [-1, 0, 2 * half, 9]]
    images = np.stack([IMAGE, IMAGE])
    figure = figures.learned_fields(images, learned, GRID, patches=[0, patch])
    second_row = figure.axes[LAYERS : 2 * LAYERS]
    for panel in second_row:
        np.testing.assert_allclose(
            outlines(panel),
            # The second is wider than the grid, and cut at its frame.
            [(1.5, 0.75, 3.5, 1.75), (-0.5, -0.5, 3, GRID[0] - 0.5)],
            atol=1e-3,
        )
        assert len({to_hex(p.get_edgecolor()) for p in panel.patches}) == HEADS
        arrows = [c for c in panel.collections if isinstance(c, Quiver)]
        assert [(a.U.item(), a.V.item()) for a in arrows] == [(0.5, 0.25), (-1, 0)]


def test_the_patch_shown_has_fields_unlike_the_others():
    learned = np.ones((LAYERS, 1, HEADS, PATCHES, 4), np.float32)
    patch = GRID[1] + 2
    learned[..., patch, 2:] = 2
    figure = figures.learned_fields(IMAGE[None], learned, GRID)
    for panel in figure.axes[:LAYERS]:
        (mark,) = (line.get_xydata() for line in panel.lines)
        np.testing.assert_allclose(mark, [(2, 1)])


def test_learned_beside_measured_has_ellipses_above_and_masks_below():
    patch = 8
    mask = np.zeros((LAYERS, HEADS, PATCHES, PATCHES), bool)
    mask[:, :, patch, patch] = True
    mask[:, 0, patch, patch + 1] = True  # Half of the heads are enough for the line.
    field = HEADS_FIELD._replace(mask=mask)
    learned = np.zeros_like(LEARNED[:, 0])
    learned[..., 2:] = 0.5 / geometry.HALF
    figure = figures.learned_beside_measured(IMAGE, learned, field, GRID, patch=patch)
    x, y = geometry.coordinates(GRID)[patch]
    for above, below in zip(
        figure.axes[:LAYERS], figure.axes[LAYERS : 2 * LAYERS], strict=True
    ):
        around = (x - 0.5, y - 0.5, x + 0.5, y + 0.5)
        np.testing.assert_allclose(outlines(above), [around] * HEADS, atol=1e-3)
        assert not below.patches
        (line,) = (c for c in below.collections if isinstance(c, LineCollection))
        ends = np.concatenate(line.get_segments())
        np.testing.assert_allclose(ends.min(0), (x - 0.5, y - 0.5))
        np.testing.assert_allclose(ends.max(0), (x + 1.5, y + 0.5))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.learned_fields(np.stack([IMAGE] * 2), LEARNED, (5, 5)),
        lambda: figures.learned_beside_measured(
            IMAGE, LEARNED[:, 0], HEADS_FIELD, (5, 5)
        ),
    ],
)
def test_a_wrong_grid_is_an_error(draw):
    with pytest.raises(UsageError, match=r"24.*grid \(5, 5\) has 25 patches"):
        draw()


def test_learned_and_measured_fields_must_belong_together(no_type_checks):
    with pytest.raises(UsageError, match=r"\(3, 2, 24, 24\).*= \[2, 2, 24, 24\]"):
        figures.learned_beside_measured(IMAGE, LEARNED[:2, 0], HEADS_FIELD, GRID)


def test_images_fields_and_patches_must_belong_together():
    with pytest.raises(UsageError, match="1 images"):
        figures.learned_fields(IMAGE[None], LEARNED, GRID)
    with pytest.raises(UsageError, match="1 patches were given for 2 images"):
        figures.learned_fields(np.stack([IMAGE] * 2), LEARNED, GRID, patches=[3])
