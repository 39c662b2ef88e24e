"""Puts finished runs beside one another: a figure of their curves, and a table.

    python -m benchmarks.compare_runs --output=results/NAME LABEL=RUN_FOLDER ...

Copies each run's metrics.jsonl and config.json into the output folder, so that every
number can be traced, and writes curves.png, curves.pdf and summary.json.
"""

import json
import shutil
from pathlib import Path

from absl import app, flags, logging

from wf_vit import figures
from wf_vit.train.reporter import read_jsonl

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)


def summarize(rows: list[dict[str, float]]) -> dict[str, float]:
    """Returns what a run reached: the last value of every evaluation metric."""
    summary = {"steps": rows[-1]["step"]}
    for row in rows:
        summary |= {k: v for k, v in row.items() if k.endswith(("/top1", "/loss"))}
    return summary


def main(argv: list[str]) -> None:
    """Compares the runs named on the command line."""
    logging.set_verbosity(logging.ERROR)
    output = Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    runs = {}
    for argument in argv[1:]:
        label, _, folder = argument.partition("=")
        runs[label] = read_jsonl(Path(folder))
        for name in ("metrics.jsonl", "config.json"):
            shutil.copy(Path(folder) / name, output / f"{label}.{name}")
    summary = {label: summarize(rows) for label, rows in runs.items()}
    for label, metrics in summary.items():
        print(label, json.dumps(metrics))
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    figure = figures.training_curves(runs)
    with figures.style():
        for suffix in ("png", "pdf"):
            figure.savefig(output / f"curves.{suffix}")


if __name__ == "__main__":
    app.run(main)
