"""Lets the pages of docs/ show the pictures of results/ without a second copy.

A page names a picture as it lies in the repository (``../results/NAME.png``), so that
it is also seen where the Markdown file itself is read. The site gets a copy below
``results/``.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

_ROOT = Path(__file__).resolve().parents[1]
_PICTURE = re.compile(r"\]\(\.\./(results/[^)\s]+\.png)\)")


def on_files(files, config):
    """Adds every picture that a page names."""
    named = set()
    for page in files.documentation_pages():
        if page.src_uri.endswith(".md"):
            named.update(_PICTURE.findall(page.content_string))
    for path in sorted(named):
        files.append(File.generated(config, path, abs_src_path=str(_ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points the pages at the copies."""
    return _PICTURE.sub(r"](\1)", markdown)
