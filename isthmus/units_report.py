"""What is written of a correspondence of units: tables, matchings, pictures, and one page that shows them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from isthmus.align.units.correspondence import Correspondence, UnitCorrespondence
from isthmus.base.files import PathLike, make_folder, write_atomic

from . import elements, figures
from .page import page
from .plain import dumps, number
from .provenance import describe_files, versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sheets = Mapping[tuple[str, str], Mapping[str, Figure]]


def write_units(
    found: Correspondence,
    folder: PathLike,
    *,
    sheets: Sheets | None = None,
    measured_on: str = "the given data",
    files: Mapping[str, PathLike] | None = None,
) -> Path:
    """Write everything about a correspondence into a folder.

    `report.html` shows it and fetches nothing; `units.json` holds every number. For each pair of layers there are
    `units-A-B.csv` with a row for each unit, `matching-A-B.safetensors`, and its pictures as PNG.

    Args:
        found: From `correspond`.
        folder: Made if it is missing.
        sheets: Pictures of units by pair of layer names and title, such as `see_pairs` draws.
        measured_on: What the data is, for the page.
        files: The files that were read, by what they are.

    Returns:
        The path of the page.

    Raises:
        OutputError: The folder cannot be written.
    """
    folder = make_folder(folder)
    content = found.to_dict() | {
        "measured_on": measured_on,
        "files": describe_files(files or {}),
        "versions": versions(),
    }
    sections = []
    for pair in found:
        stem = file_stem(pair)
        _write_text(folder / f"units-{stem}.csv", csv_text(pair.rows()))
        pair.matching.save(folder / f"matching-{stem}.safetensors")
        drawn = dict(_drawn(pair, (sheets or {}).get((pair.layer_a, pair.layer_b), {})))
        for name, (picture, _, _) in drawn.items():
            figures.save(picture, folder / f"{name}-{stem}.png")
        sections.append(_section(pair, drawn))
    sections.append(_closing(found, content))
    _write_text(folder / "units.json", dumps(content, indent=1))
    title, lead = _title(found), _lead(found, measured_on)
    return _write_text(folder / "report.html", page(title, lead, _tiles(found), [_summary(found), *sections]))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""Write rows as CSV with a header; what is not defined is left empty.

    >>> csv_text([{"unit": 0, "correlation": 0.5}, {"unit": 1, "correlation": float("nan")}])
    'unit,correlation\n0,0.5\n1,\n'
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None or value != value else value for name, value in row.items()})
    return buffer.getvalue()


def file_stem(pair: UnitCorrespondence) -> str:
    """Name the files of a pair of layers after them.

    >>> from types import SimpleNamespace
    >>> file_stem(SimpleNamespace(layer_a="block.0/conv", layer_b="block.0/conv"))
    'block.0_conv'
    """
    names = dict.fromkeys(re.sub(r"[^\w.#-]", "_", name) or "_" for name in (pair.layer_a, pair.layer_b))
    return "-".join(names)


def _write_text(path: Path, text: str) -> Path:
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


Drawn = tuple[Figure, str, str]
"""A picture, its heading and its caption."""


def _drawn(pair: UnitCorrespondence, sheets: Mapping[str, Figure]) -> Iterator[tuple[str, Drawn]]:
    for name, draw in {"curves": _curves, "prediction": _prediction, "clusters": _clusters, "means": _means}.items():
        drawn = draw(pair)
        if drawn is not None:
            yield name, drawn
    for place, (heading, sheet) in enumerate(sheets.items(), 1):
        yield f"units{place}", (sheet, heading, "Inputs that drive the units most, those of A left, of B right.")


def _curves(pair: UnitCorrespondence) -> Drawn:
    caption = (
        f"Correlation on {pair.samples[1]:,} held-out rows of each unit of A with its partner in B, best first. "
        f"Partners were found on {pair.samples[0]:,} other rows; those of the dotted curve on shuffled samples."
    )
    return _draw(pair.plot), "How alike matched units are", caption


def _prediction(pair: UnitCorrespondence) -> Drawn | None:
    if pair.prediction is None:
        return None
    prediction, one = pair.prediction, pair.one_to_one
    caption = (
        f"Share of the variance of the units of A on {pair.samples[1]:,} held-out rows that a LASSO on the units of B "
        "explains, by the number of units that it uses, beside that of the one-to-one partner."
    )
    return _draw(lambda ax: prediction.plot(ax, one_to_one=one)), "Predicted from few units", caption


def _clusters(pair: UnitCorrespondence) -> Drawn | None:
    if pair.clusters is None:
        return None
    caption = f"Absolute correlations of the units of both networks, in the order of {pair.clusters.count} clusters."
    return _draw(pair.clusters.plot), "Clusters of units of both networks", caption


def _means(pair: UnitCorrespondence) -> Drawn | None:
    if pair.means is None:
        return None
    caption = (
        "Mean activation of the units of each network, highest first, and of the partner in B of each unit of A: the "
        "distributions may agree where the units do not."
    )
    return _draw(pair.means.plot), "Mean activations", caption


def _draw(plot: Callable[[Axes], object]) -> Figure:
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    with rc_context(figures.STYLE):
        plot(figure.subplots())
    return figure


def _section(pair: UnitCorrespondence, drawn: Mapping[str, Drawn]) -> str:
    stem = file_stem(pair)
    parts = []
    for name, (picture, heading, caption) in drawn.items():
        drawing = figures.svg(picture, f"{name}-{stem}", f"{heading}: {caption}")
        parts.append(elements.figure(drawing, heading, caption, wide=name.startswith("units")))
    return elements.headed(_names(pair.layer_a, pair.layer_b, " and "), elements.figures_section(parts))


_COLUMNS: dict[str, str] = {
    "units_a": "units of A",
    "units_b": "units of B",
    "one_to_one": "one-to-one",
    "semi": "best partner",
    "null": "shuffled",
    "semi_agreement": "same partner",
    "stability": "stable",
    "one_to_one_r2": "R² of one",
    "sparse_r2": "R² of few",
    "predictors": "how many",
    "rotated": "rotated",
    "clusters": "clusters",
}


def summary_table(found: Correspondence) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Give headers and rows of the table that says most, for a page or a terminal."""
    rows = found.summary()
    columns = {key: title for key, title in _COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    cells = [
        (_names(row["layer_a"], row["layer_b"]), *(_cell(row.get(key)) for key in columns))
        for row in rows
    ]  # fmt: skip
    return ("layers", *columns.values()), cells


def _names(layer_a: str, layer_b: str, between: str = ", ") -> str:
    return layer_a if layer_a == layer_b else f"{layer_a}{between}{layer_b}"


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, int) else number(value)


def _summary(found: Correspondence) -> str:
    headers, rows = summary_table(found)
    return elements.headed("Layers", elements.table(headers, rows))


def _closing(found: Correspondence, content: Mapping[str, Any]) -> str:
    settings = {name: "as found" if value is None else value for name, value in found.settings.items()}
    columns = {
        "Files": elements.file_list(content["files"]),
        "Settings": elements.pairs(settings),
        "Versions": elements.pairs(content["versions"]),
    }
    return elements.columns_section(columns, small=True)


def _averages(found: Correspondence, key: str) -> float | None:
    values = [row[key] for row in found.summary() if row.get(key) is not None]
    return float(np.mean(values)) if values else None


def _title(found: Correspondence) -> str:
    one, null = number(_averages(found, "one_to_one")), _averages(found, "null")
    beside = "" if null is None else f", by chance {number(null)}"
    return f"Units matched one to one correlate by {one} on samples not seen before{beside}"


def _lead(found: Correspondence, measured_on: str) -> str:
    settings = found.settings
    return (
        f"The units of {len(found)} pair{'s' * (len(found) > 1)} of layers of two networks, A and B, on {measured_on}. "
        f"The samples were dealt into {settings['folds']} folds; partners, predictions and clusters were found on all "
        f"but {settings['held_out']} of them; correlations of partners and R² were measured on those."
    )


def _tiles(found: Correspondence) -> list[tuple[str, str]]:
    tiles = {
        "one_to_one": "Correlation of one-to-one partners",
        "semi": "Correlation of best partners",
        "one_to_one_r2": "R² from the one-to-one partner",
        "sparse_r2": "R² from few units",
        "stability": "Units keep their partner on half of the data",
    }
    found_tiles = [(title, _averages(found, key)) for key, title in tiles.items()]
    return [(title, number(value)) for title, value in found_tiles if value is not None]
