"""What the site needs beside the Markdown files: pictures of results/, and notebooks.

A page names a picture as it lies in the repository (``../results/NAME.png``), so that
it is also seen where the Markdown file itself is read. The site gets a copy below
``results/``. A notebook becomes a page with its saved outputs; nothing is run.
"""

import base64
import json
import re
from pathlib import Path

from mkdocs.structure.files import File

_ROOT = Path(__file__).resolve().parents[1]
_PICTURE = re.compile(r"\]\(\.\./(results/[^)\s]+\.png)\)")
_NOTEBOOK = re.compile(r"\]\(([^)\s:]+)\.ipynb\)")
# Between a cell and what it printed.
_OUTPUT = '\n```{ .text .output title="Output" }\n%s\n```\n'


def on_files(files, config):
    """Adds every picture that a page names, and a page for every notebook."""
    named = set()
    for page in files.documentation_pages():
        named.update(_PICTURE.findall(page.content_string))
    for path in sorted(named):
        files.append(File.generated(config, path, abs_src_path=str(_ROOT / path)))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = file.src_uri.removesuffix(".ipynb")
        text, pictures = _to_markdown(json.loads(file.content_string), Path(name).name)
        files.append(File.generated(config, f"{name}.md", content=text))
        for number, picture in enumerate(pictures):
            uri = f"{name}_{number}.png"
            files.append(File.generated(config, uri, content=picture))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points a page at the copies."""
    markdown = _PICTURE.sub(r"](\1)", markdown)
    return _NOTEBOOK.sub(r"](\1.md)", markdown)


def _to_markdown(notebook, name):
    """Returns a notebook's text, and its pictures in their order."""
    parts, pictures = [], []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![Output of the cell above]({name}_{len(pictures)}.png)")
                pictures.append(base64.b64decode(data["image/png"]))
            else:
                text = output.get("text") or data.get("text/plain", "")
                parts.append(_OUTPUT % "".join(text).rstrip())
    return "\n\n".join(parts) + "\n", pictures
