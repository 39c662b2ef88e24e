"""One self-contained HTML page in which to explore patch interactions.

    html = page.explorer(image, {"mean attention": Indicator(impact)}, grid=(16, 16))
    Path("page.html").write_text(html, encoding="utf-8")

The page needs no network and no server. Hover, tap or move by keyboard over the
patches; it shows what each listens to and who listens to it, its field and tendency,
in every layer and head; CLS and registers; and what speaks for a class.
"""

from wf_vit.page.build import explorer
from wf_vit.page.content import ClassEffect, Indicator

__all__ = ["ClassEffect", "Indicator", "explorer"]
