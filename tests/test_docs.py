"""The README and the pages of docs/: their code runs, and what they name is there."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wf_vit.models import pretrained

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
FIXTURE = ROOT / "tests" / "models" / "fixtures" / "hf_dinov2_bfloat16"

# Files of this repository that a page names as code: `results/verify/README.md`.
FILE = re.compile(
    r"`((?:results|configs|docs|wf_vit|tests|benchmarks)/[\w./-]*\w\.\w+)(?::\w+)?`"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python_blocks():
    """Yields each example once: some stand in the README and in a page."""
    seen = set()
    for page in PAGES:
        found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
        for number, code in enumerate(found):
            if code not in seen:
                seen.add(code)
                marks = pytest.mark.slow if "loop.train(" in code else ()
                yield pytest.param(code, id=f"{name_of(page)}:{number}", marks=marks)


def without_code(text: str) -> str:
    """Returns a page without its blocks of code, whose brackets are no links."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's folder with a photograph; a small checkpoint replaces the download."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    load = pretrained.load

    def load_small(source, *, image_size=None):
        if not str(source).startswith("hf://"):
            return load(source, image_size=image_size)
        return load(FIXTURE, image_size=32)

    monkeypatch.setattr(pretrained, "load", load_small)


@pytest.mark.parametrize("code", python_blocks())
def test_examples_run(code, reader):
    # From a file, as a reader would run it: TensorFlow looks for the source.
    Path("example.py").write_text(code)
    exec(compile(code, "example.py", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_named_files_exist(page):
    text = without_code(page.read_text())
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}"
    for file in FILE.findall(text):
        assert (ROOT / file).exists(), f"{name_of(page)} names {file}"


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_no_page_names_the_command_that_needs_apache_beam():
    for page in [*PAGES, *NOTEBOOKS]:
        assert "tfds build" not in page.read_text(), name_of(page)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_are_small_and_have_their_outputs(path):
    assert path.stat().st_size <= 500_000
    cells = [c for c in json.loads(path.read_text())["cells"] if "outputs" in c]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in [output["output_type"] for output in outputs]
    data = [output["data"] for output in outputs if "data" in output]
    pictures = [each["image/png"] for each in data if "image/png" in each]
    # Four characters hold three bytes.
    assert 0 < max(len(picture) * 3 / 4 for picture in pictures) <= 100_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_run(path):
    nbclient = pytest.importorskip("nbclient", reason="needs the docs extra")
    nbformat = pytest.importorskip("nbformat", reason="needs the docs extra")
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    print(f"{path.name}: {time.perf_counter() - start:.0f} s")
