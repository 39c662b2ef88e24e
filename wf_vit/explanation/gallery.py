"""The front page of a run: every photograph, its page and its figures a click away."""

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from wf_vit.explanation.draw import FIGURES, PAGE
from wf_vit.explanation.explanation import DATA, IMAGES
from wf_vit.workdir import opened_arrays, write_text

INDEX = "index.html"

_STYLE = """\
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; font: 1rem/1.5 system-ui; }
ul { display: grid; gap: 1rem; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
img { display: block; width: 100%; height: 13rem; object-fit: contain;
  border-radius: 4px; background: light-dark(#eee, #222); }
h2 { margin: 0.3rem 0 0; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: 0.2rem 0; font-size: 0.9rem; }
summary { cursor: pointer; }
"""
# Nothing but its own style and pictures may load.
_POLICY = "default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
_THUMBNAIL = 300


def write(workdir: Path, names: Sequence[str], model: str) -> None:
    """Writes ``index.html`` over the images of a run.

    Args:
      workdir: of the run.
      names: of the images that were measured.
      model: what the model is called.
    """
    digest = hashlib.sha256(_STYLE.encode()).digest()
    policy = _POLICY.format(digest=base64.b64encode(digest).decode())
    cards = "\n".join(_card(workdir, name) for name in names)
    others = [
        (file, words)
        for file, words in (
            ("table.csv", "table"),
            ("statistics.json", "statistics"),
            ("README.md", "what the files hold"),
        )
        if (workdir / file).exists()
    ]
    links = " · ".join(f'<a href="{file}">{words}</a>' for file, words in others)
    text = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Patch interactions of {len(names)} images</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<h1>Patch interactions</h1>
<p>{html.escape(model)}. Click on a picture to explore it.</p>
<p>{links}</p>
<ul>
{cards}
</ul>
</body>
</html>
"""
    write_text(workdir / INDEX, text)


def _card(workdir: Path, name: str) -> str:
    """Returns one image: a picture that leads to its page, and links to its figures."""
    folder = workdir / IMAGES / name
    place = f"{IMAGES}/{quote(name)}"
    words = html.escape(name)
    with opened_arrays(folder / DATA) as arrays:
        picture = _data_uri(arrays["photograph"])
        answer = ""
        if "class/name" in arrays:
            share = float(arrays["class/probability"])
            answer = f"<p>{html.escape(arrays['class/name'].item())}, {share:.0%}</p>"
    shown = f'<img src="{picture}" alt="{words}">'
    if (folder / PAGE).exists():
        shown = f'<a href="{place}/{PAGE}">{shown}</a>'
    drawn = sorted((folder / FIGURES).glob("*.png"))
    items = " · ".join(
        f'<a href="{place}/{FIGURES}/{quote(file.name)}">'
        f"{html.escape(file.stem.replace('_', ' '))}</a>"
        for file in drawn
    )
    details = f"<details><summary>Figures</summary><p>{items}</p></details>"
    return f"<li>{shown}<h2>{words}</h2>{answer}{details if drawn else ''}</li>"


def _data_uri(photograph: np.ndarray) -> str:
    image, file = Image.fromarray(photograph), io.BytesIO()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(file, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
