r"""Measures what a start costs: the CPU seconds to the first step and the first page.

    python -m benchmarks.start --output=results/start \
        --weights=CHECKPOINT --image=PHOTOGRAPH

Each run is a process of its own, on an empty folder of results. A cold run has an empty
cache of compiled programs, the warm one after it has what the cold one left. The kinds
take turns:

- "first step": ``python main.py`` until the first training step is reported
- "whole run": the same to its end, cold (``--whole`` turns only)
- "explain": ``configs/explain.py`` of one photograph, to the end

Counted are the seconds of all threads, which depend less than those of a clock on what
else the machine does. Linux only. Writes OUTPUT/start.json and OUTPUT/README.md.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from wf_vit.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
REPORTED = " step 1/"  # What the log of training says after its first step.


def cpu_seconds(pid: int) -> float:
    """Returns the CPU seconds of a process so far, user and system."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(arguments: Sequence[str], cache: Path, until: str = "") -> float:
    """Runs the command and returns its CPU seconds.

    Args:
      arguments: of the command, without ``--workdir``.
      cache: folder of the compiled programs.
      until: the command is ended once its log has this; "": it runs to its end.

    Raises:
      UsageError: the command failed; says how.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, log = None, []
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "main.py", *arguments, f"--workdir={folder}/run"],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "XDG_CACHE_HOME": str(cache),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in process.stderr:
            log.append(line)
            if until and until in line:
                seconds = cpu_seconds(process.pid)
                process.kill()
                break
        process.stderr.close()
        status = process.wait()
    if seconds is None and (status or until):
        raise UsageError(f"The command ended with {status}: {''.join(log[-5:])}")
    if seconds is not None:
        return seconds
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def turn(explain: Sequence[str], whole: bool) -> dict[str, float]:
    """Returns the CPU seconds of one turn, by kind.

    Args:
      explain: arguments of the explanation; none to leave it out.
      whole: whether training runs to its end, too.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            cache = Path(folder) / "steps"
            found[f"first step, {state}"] = measure(
                ["--config.log_steps=1"], cache, REPORTED
            )
            if explain:
                cache = Path(folder) / "explain"
                found[f"explain, {state}"] = measure(explain, cache)
        if whole:
            found["whole run, cold"] = measure([], Path(folder) / "whole")
    return found


def table(values: dict[str, list[float]]) -> str:
    """Returns the medians and all values as a table in Markdown."""
    lines = ["| what | CPU seconds, median | all |", "|---|---|---|"]
    for name, seconds in values.items():
        everything = ", ".join(f"{s:.1f}" for s in seconds)
        lines.append(f"| {name} | {statistics.median(seconds):.1f} | {everything} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    """Measures and writes."""
    del argv
    if bool(_WEIGHTS.value) != bool(_IMAGE.value):
        raise UsageError("Pass both --weights and --image, or none of them.")
    explain = []
    if _IMAGE.value:
        explain = [
            "--config=configs/explain.py",
            f"--config.image_size={_SIZE.value}",
            f"--config.weights={Path(_WEIGHTS.value).resolve()}",
            f"--config.images={Path(_IMAGE.value).resolve()}",
        ]
    output = Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    values: dict[str, list[float]] = {}
    for number in range(_TURNS.value):
        for name, seconds in turn(explain, number < _WHOLE.value).items():
            values.setdefault(name, []).append(seconds)
            print(f"{name}: {seconds:.1f}", flush=True)
    results = {
        name: {"median": statistics.median(seconds), "all": seconds}
        for name, seconds in values.items()
    }
    (output / "start.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "README.md").write_text(
        "# CPU seconds of a start\n\n"
        "Command: `python -m benchmarks.start --output=results/start "
        "--weights=CHECKPOINT --image=PHOTOGRAPH`. `benchmarks/start.py` says what is "
        f"measured. The photograph is seen at {_SIZE.value} pixels, on "
        f"{os.cpu_count()} CPU cores.\n\n{table(values)}"
    )


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
    _WEIGHTS = flags.DEFINE_string(
        "weights", "", "Checkpoint to explain; '': leave out."
    )
    _IMAGE = flags.DEFINE_string("image", "", "Photograph to explain; '': leave out.")
    _SIZE = flags.DEFINE_integer("image_size", 224, "At which the photograph is seen.")
    _TURNS = flags.DEFINE_integer("turns", 3, "Medians over these are reported.")
    _WHOLE = flags.DEFINE_integer("whole", 1, "Turns that run the training to its end.")
    app.run(main)
