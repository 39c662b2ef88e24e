"""A summary to ``verify.json``, ``table.md`` and figures."""

import json
from pathlib import Path

from wf_vit import figures
from wf_vit.verify.draw import drawings
from wf_vit.verify.summary import Summary
from wf_vit.verify.table import table


def write(results: Summary, workdir: Path) -> None:
    """Writes everything that a working directory shows.

    Args:
      results: the summary, and beside it what was run on what (``verify.run``).
      workdir: receives ``verify.json``, ``table.md`` and ``figures/``.
    """
    text = json.dumps(results, indent=1, allow_nan=False)
    (workdir / "verify.json").write_text(text + "\n")
    (workdir / "table.md").write_text(table(results))
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    with figures.style():
        for name, figure in drawings(results):
            for suffix in ("png", "pdf"):
                figure.savefig(folder / f"{name}.{suffix}")
