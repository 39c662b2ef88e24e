"""What the paper asks of every figure."""

from matplotlib.text import Text

from wf_vit import figures


def assert_fits_the_paper(figure):
    """Lays the figure out; nothing may be cut, or too small to read in a column."""
    assert figure.get_figwidth() == figures.COLUMN
    figure.draw_without_rendering()
    drawn, page = figure.get_tightbbox(), figure.bbox_inches
    assert drawn.x0 >= page.x0 - 0.01
    assert drawn.y0 >= page.y0 - 0.01
    assert drawn.x1 <= page.x1 + 0.01
    assert drawn.y1 <= page.y1 + 0.01
    sizes = [
        text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()
    ]
    assert sizes
    assert min(sizes) >= 6
