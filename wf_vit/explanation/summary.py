"""The results of all images in one table, and their statistics.

Both are made from the images' ``data.npz``, one image at a time: memory does not grow
with their number, and a run that was interrupted ends with the same numbers.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from wf_vit import fields
from wf_vit.explanation import draw
from wf_vit.explanation.explanation import ARRAYS, DATA, IMAGES
from wf_vit.tendency import explained_share
from wf_vit.workdir import opened_arrays, replacing, write_text

TABLE = "table.csv"
STATISTICS = "statistics.json"

# The columns of table.csv, which has a row for each image, layer and head, and one
# for the heads together. Empty: not measured (fields of single heads need heads=True).
COLUMNS = {
    "image": "name of the image: that of its folder",
    "layer": "number of the layer, from 0",
    "head": "number of the head, from 0, or 'all'",
    "field_area": "share of the grid that a responsive field covers, mean over patches",
    "field_area_std": "its standard deviation over patches",
    "extent_left": "how far a field extends to the left of its patch's centre, in "
    "patches, mean over patches",
    "extent_top": "the same upwards",
    "extent_right": "the same to the right",
    "extent_bottom": "the same downwards",
    "excess_x": "from a patch to its field's centroid, beyond what geometry alone "
    "gives, in patches, to the right, mean over patches",
    "excess_y": "the same downwards",
    "excess_length": "length of that arrow, in patches, mean over patches",
    "geometry_share": "share of the arrows to the centroids that geometry alone "
    "explains, from 0 to 1",
    "attention_distance": "mean attention distance, in patches",
}

# The keys of statistics.json. Lists are by layer, and by layer and head.
STATISTICS_KEYS = {
    "images": "how many",
    "indicator": "of which the fields are",
    "mass": "share of its impact that a patch's field holds",
    "layers": "their numbers, from 0",
    "field_area": "share of the grid that a responsive field covers: mean and standard "
    "deviation over images and patches",
    "excess_length": "length of the arrow from a patch to its field's centroid, beyond "
    "what geometry alone gives, in patches, likewise",
    "attention_distance": "mean attention distance of each head, in patches: mean and "
    "standard deviation over images",
    "field_area_heads": "as field_area, for each head on its own, if measured",
}

_PREFACE = """\
L layers, H heads, N tokens, of which the first T are prefix tokens (CLS, registers)
and the other P are patches, numbered row by row. Positions are (x, y) in patches, x
to the right and y downwards. The impact of patch j on patch i says how much the
interaction i<-j matters; patch i's responsive field is where its impact comes from.
"""

# Is there if heads were told apart.
_HEADS = "field_heads/area"

# Statistics that are not told apart by heads.
_FUSED = ("field_area", "excess_length")


def write(
    workdir: Path, names: Sequence[str], notes: dict[str, Any], *, pdf: bool
) -> None:
    """Writes the table, the statistics, their figures and what they mean.

    Args:
      workdir: of the run.
      names: of all images in the run, at least one.
      notes: what ``statistics.json`` says besides.
      pdf: whether the figures are written as PDF, too.
    """
    _write_table(workdir, names)
    drawings = _write_statistics(workdir, names, notes)
    draw.save_figures(drawings, workdir / draw.FIGURES, pdf=pdf)
    parts = {f"images/*/{DATA}": ARRAYS, TABLE: COLUMNS, STATISTICS: STATISTICS_KEYS}
    text = _PREFACE
    for file, meanings in parts.items():
        text += f"\n# {file}\n\n"
        text += "".join(f"- `{name}`: {what}\n" for name, what in meanings.items())
    write_text(workdir / "README.md", text)


def _write_table(workdir: Path, names: Sequence[str]) -> None:
    with (
        replacing(workdir / TABLE) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name in names:
            with opened_arrays(workdir / IMAGES / name / DATA) as arrays:
                shown = _harmless(name)
                table.writerows([shown, *row] for row in _rows(arrays))


def _harmless(text: str) -> str:
    """Returns a text for a cell, with an apostrophe where a spreadsheet would run it.

    As OWASP recommends (CSV injection). What it may skip is looked behind: spaces,
    quotes, and characters that are not seen.
    """
    begins = text.lstrip("\"' \u00a0\u3000\u200b\ufeff\v\f")
    return f"'{text}" if begins.startswith(tuple("=+-@\t\r\n＝＋－＠")) else text  # noqa: RUF001


def _rows(arrays: np.lib.npyio.NpzFile) -> Iterator[list[Any]]:
    """Yields the rows of one image, without its name."""
    distance = arrays["attention_distance"]
    fused = _field_columns(arrays, "field")
    by_head = _field_columns(arrays, "field_heads") if _HEADS in arrays else None
    for place, layer in enumerate(arrays["layers"].tolist()):
        yield [layer, "all", *fused[place].tolist(), float(distance[place].mean())]
        for head, value in enumerate(distance[place].tolist()):
            empty = [""] * fused.shape[-1]
            columns = empty if by_head is None else by_head[place, head].tolist()
            yield [layer, head, *columns, value]


def _field_columns(arrays, kind) -> Float[np.ndarray, "L *heads columns"]:
    """Returns the columns that describe fields, of the heads together or of each."""
    area, extents, displacement, excess = (
        arrays[f"{kind}/{part}"]
        for part in ("area", "extents", "displacement", "excess")
    )
    length = np.linalg.norm(excess, axis=-1)
    columns = [area.mean(-1), area.std(-1), *np.moveaxis(extents.mean(-2), -1, 0)]
    columns += [*np.moveaxis(excess.mean(-2), -1, 0), length.mean(-1)]
    columns += [np.asarray(explained_share(displacement, displacement - excess))]
    return np.stack(columns, axis=-1)


def _write_statistics(
    workdir: Path, names: Sequence[str], notes: dict[str, Any]
) -> draw.Drawings:
    """Writes the statistics and returns their figures."""
    total = None
    for name in names:
        with opened_arrays(workdir / IMAGES / name / DATA) as arrays:
            layers = arrays["layers"].tolist()
            one = fields.statistics(_sample(arrays), axes=(2, 3))
        total = one if total is None else fields.merge(total, one)
    mean = jax.tree.map(np.asarray, total.mean)
    std = jax.tree.map(np.sqrt, total.variance)
    for key in _FUSED:
        mean[key], std[key] = mean[key][:, 0], std[key][:, 0]
    content = {"images": int(total.count), **notes, "layers": layers}
    for key in mean:
        content[key] = {"mean": mean[key].tolist(), "std": std[key].tolist()}
    write_text(workdir / STATISTICS, json.dumps(content, indent=2) + "\n")
    return draw.depth_drawings(
        layers,
        area=mean["field_area"],
        area_spread=std["field_area"],
        area_heads=mean.get("field_area_heads"),
        distance=mean["attention_distance"],
        distance_spread=std["attention_distance"] if len(names) > 1 else None,
    )


def _sample(arrays: np.lib.npyio.NpzFile) -> dict[str, Float[np.ndarray, "L _ 1 _"]]:
    """Returns what the statistics are of, in one image: by layer, head and patch."""
    length = np.linalg.norm(arrays["field/excess"], axis=-1)
    sample = {
        "field_area": arrays["field/area"][:, None, None],
        "excess_length": length[:, None, None],
        "attention_distance": arrays["attention_distance"][:, :, None, None],
    }
    if _HEADS in arrays:
        sample["field_area_heads"] = arrays[_HEADS][:, :, None]
    return sample
