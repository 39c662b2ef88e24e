"""Curves against controls: what is drawn equals what was given, and fits the paper."""

import numpy as np
import pytest
from matplotlib.text import Text

from tests.paper import assert_fits_the_paper
from wf_vit import figures
from wf_vit.errors import UsageError

X = np.array([10.0, 25.0, 50.0])
RULES = [f"rule number {n}" for n in range(9)]


def curve(level):
    mean = level + np.array([0.1, 0.2, 0.3])
    return figures.Curve(X, mean, mean - 0.05, mean + 0.01)


def draw(titles, **options):
    panels = {
        title: {rule: curve(place) for place, rule in enumerate(RULES)}
        for title in titles
    }
    return figures.evidence(panels, "kept (%)", own=RULES[:1], **options)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_nothing_is_cut_or_too_small_to_read(count):
    figure = draw([f"cosine, {n}" for n in range(count)])
    assert_fits_the_paper(figure)
    labels = [text for text in figure.findobj(Text) if text.get_text() == "kept (%)"]
    assert len(labels) == {1: 1, 2: 2, 3: 1, 4: 2}[count]
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(t.get_window_extent()) for t in labels)


def test_curves_and_intervals_are_those_given():
    figure = draw(["top-1 (%)", "cosine"], ylabel="of the model")
    for panel, title in zip(figure.axes, ("top-1 (%)", "cosine"), strict=True):
        assert panel.get_title() == title
        lines = [line for line in panel.lines if len(line.get_xydata())]
        for place, line in enumerate(lines):
            np.testing.assert_allclose(line.get_xdata(), X)
            np.testing.assert_allclose(line.get_ydata(), curve(place).mean)
        low, high = curve(3).low, curve(3).high
        band = panel.collections[3].get_paths()[0].vertices
        np.testing.assert_allclose(band[:, 1].min(), low.min())
        np.testing.assert_allclose(band[:, 1].max(), high.max())
    assert [t.get_text() for t in figure.legends[0].get_texts()] == RULES
    own, control = (line.get_linewidth() for line in figure.axes[0].lines[:2])
    assert own > control


def test_rules_aside_are_drawn_but_take_no_room():
    figure = draw(["cosine"], aside=RULES[-1:])
    (panel,) = figure.axes
    drawn = [line for line in panel.lines if len(line.get_xdata())]
    np.testing.assert_allclose(drawn[-1].get_ydata(), curve(8).mean)
    low, high = panel.get_ylim()
    assert low < curve(0).low.min()
    assert curve(7).high.max() < high < curve(8).low.min()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*RULES[:-1], f"{RULES[-1]} (if in view)"]


def test_a_rule_looks_the_same_in_all_panels():
    panels = {"a": {"one": curve(0), "two": curve(1)}, "b": {"two": curve(1)}}
    figure = figures.evidence(panels, "x", own=())
    first, second = figure.axes
    assert first.lines[1].get_color() == second.lines[0].get_color()
    assert first.lines[0].get_color() != second.lines[0].get_color()


def test_no_curves_are_refused():
    with pytest.raises(UsageError, match="no curves"):
        figures.evidence({}, "x", own=())


def test_points_that_lie_close_are_spread_by_logarithms():
    def scale(*shares):
        x = np.array(shares, float)
        figure = figures.evidence(
            {"a": {"rule": figures.Curve(x, x, x, x)}}, "x", own=()
        )
        axes = figure.axes[0]
        assert [t.get_text() for t in axes.get_xticklabels()] == [f"{s:g}" for s in x]
        return axes.get_xscale()

    assert scale(50, 25, 10, 5) == "log"
    assert scale(25, 50, 75) == "linear"
    assert scale(0, 1, 50) == "linear"
