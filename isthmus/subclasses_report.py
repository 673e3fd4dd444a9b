"""What is written of clusters inside classes: every number as JSON, clusters as CSV, pictures, and a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from isthmus.align.subclasses import Agreement
from isthmus.base.files import PathLike, make_folder, write_atomic

from . import collapse_figures, elements, figures
from .collapse_report import Drawn, feature_pictures
from .page import page
from .plain import dumps, number, percent
from .provenance import describe_files, versions
from .subclass_study import INPUTS, NETWORK, SubclassStudy
from .units_report import csv_text

_SHOWN = 2000  # samples in a picture
_NAMES = {NETWORK: "agreement", INPUTS: "agreement-inputs"}


def write_subclasses(
    study: SubclassStudy,
    folder: PathLike,
    *,
    measured_on: str = "the given data",
    tested_on: str = "the given test data",
    files: Mapping[str, PathLike] | None = None,
    embedding: collapse_figures.Embedding = "tsne",
) -> Path:
    """Write everything about clusters inside classes into a folder.

    `report.html` shows it and fetches nothing; `subclasses.json` holds every number, `subclasses.csv` the class, the
    cluster and the fine label of each sample; the pictures are there as PNG.

    Args:
        study: From `subclass_study`.
        folder: Made if it is missing.
        measured_on: What the data is, for the page.
        tested_on: What the test data is.
        files: The files that were read, by what they are.
        embedding: How the features are placed in the plane, see `collapse_figures.embedding`.

    Returns:
        The path of the page.

    Raises:
        DataError: The package of the embedding is missing.
        OutputError: The folder cannot be written.

    >>> import tempfile
    >>> from isthmus.subclass_study import subclass_study
    >>> from isthmus.zoo import load_data, loader, mlp
    >>> data = loader(load_data("digits", "test", limit=60))
    >>> found = subclass_study(mlp(64, (8,), classes=10, seed=0), data, count=1, project="none")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_subclasses(found, folder).name
    'report.html'
    """
    drawn = dict(_drawn(study, tested_on, embedding))
    folder = make_folder(folder)
    content = {"measured_on": measured_on, **study.to_dict()}
    content |= {"files": describe_files(files or {}), "versions": versions()}
    for name, (picture, _, _) in drawn.items():
        figures.save(picture, folder / f"{name}.png")
    _write(folder / "subclasses.csv", csv_text(_samples(study)))
    _write(folder / "subclasses.json", dumps(content, indent=1))
    parts = [
        elements.figure(
            figures.svg(picture, name, f"{heading}: {caption}"), heading, caption, wide=picture.get_figwidth() > 6
        )
        for name, (picture, heading, caption) in drawn.items()
    ]
    sections = [elements.figures_section(parts), *_tables(study), _closing(study, content)]
    text = page(study.verdict, _lead(study, measured_on, tested_on), tiles(study), sections)
    return _write(folder / "report.html", text)


def _write(path: Path, text: str) -> Path:
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _samples(study: SubclassStudy) -> list[dict[str, Any]]:
    columns = {"class": study.found.coarse, "cluster": study.found.labels}
    columns |= {} if study.fine is None else {"fine": study.fine}
    columns |= {} if study.second is None else {"cluster_of_second": study.second.labels}
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(("sample", *columns), (place, *row), strict=True)) for place, row in enumerate(values)]


def tiles(study: SubclassStudy) -> list[tuple[str, str]]:
    """Give the few figures that matter most, each with what it is."""
    found = [("NC1 of the features", number(study.collapse.nc1))]
    if NETWORK in study.agreements:
        own = study.agreements[NETWORK]
        found.append(("Purity of the clusters", percent(own.purity)))
        if INPUTS in study.agreements:
            found.append(("Purity, raw inputs", percent(study.agreements[INPUTS].purity)))
        found.append(("Rand index inside classes", number(own.within_ari)))
    if study.probe is not None:
        found += [("Probe of clusters, test", percent(study.probe.accuracy))]
        found += [("Probe of fine labels, test", percent(study.probe.oracle))]
    if study.matching is not None:
        found.append(("Overlap with the second network", percent(study.matching.overlap)))
    return found


def agreement_table(study: SubclassStudy) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Give headers and rows of how well clusters agree with fine labels, by what was clustered."""
    headers = ("clusters of", "clusters", "purity", "one cluster each", "matched", "Rand inside", "information")
    return headers, [
        (name, str(len(each.classes)), percent(each.purity), percent(each.chance), percent(each.matched_accuracy),
         number(each.within_ari), number(each.nmi))
        for name, each in study.agreements.items()
    ]  # fmt: skip


def class_table(study: SubclassStudy) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Give headers and rows of what was found in each class."""
    own, second, angles = study.agreements.get(NETWORK), study.matching, study.angles
    headers = ["class", "samples", "clusters", "their samples"]
    headers += ["purity", "Rand index"] if own is not None else []
    headers += ["Rand index, second", "overlap, second"] if second is not None else []
    headers += ["mean cos² with second", "shuffled"] if angles is not None else []
    rows = []
    for place, name in enumerate(study.found.names.tolist()):
        sizes = study.found.sizes[study.found.classes == name].tolist()
        count = int((study.found.coarse == name).sum())
        row = [study.class_names[name], f"{count:,}", str(len(sizes)), ", ".join(f"{size:,}" for size in sizes)]
        row += [percent(float(own.class_purity[place])), number(float(own.class_ari[place]))] if own else []
        row += [number(float(second.class_ari[place])), percent(float(second.class_overlap[place]))] if second else []
        row += [number(float(angles.mean[place])), number(float(angles.null[place]))] if angles else []
        rows.append(tuple(row))
    return tuple(headers), rows


def _lead(study: SubclassStudy, measured_on: str, tested_on: str) -> str:
    text = (
        f"The features of {study.features.layer} on {measured_on} ({len(study.features):,} samples, "
        f"{len(study.found.names)} classes) were clustered inside each class: {study.found.method}. Each class is "
        "centred and scaled by its own spread, which in a collapsed network is tiny beside the class means."
    )
    if study.agreements:
        text += " The fine labels served to judge the clusters, not to find them."
    if INPUTS in study.agreements:
        text += " Clusters say something of the network only where they beat those of the raw inputs."
    if study.probe is not None:
        text += f" A linear probe learned the clusters and was tested on {tested_on}."
    return text if study.caution is None else f"{text} Caution: {study.caution}"


def _drawn(study: SubclassStudy, tested_on: str, embedding: collapse_figures.Embedding) -> Iterator[tuple[str, Drawn]]:
    names, fine_names = study.class_names, study.fine_names or None
    caption = "Each class in the first two coordinates by which its samples were clustered"
    more = len(study.found.names) > collapse_figures.PANELS
    caption += f"; the first {collapse_figures.PANELS} of {len(study.found.names)} classes." if more else "."
    drawn = collapse_figures.places_figure(study.found, names, study.fine, fine_names)
    yield "clusters", (drawn, "Inside the classes", caption)
    for name, each in study.agreements.items():
        caption = f"Samples by cluster and fine label: {name}. A cluster with one fine label has one dark cell."
        heading = "Clusters and fine labels" + ("" if name == NETWORK else f": {name}")
        yield _NAMES.get(name, f"agreement-{name.replace(' ', '-')}"), (_matrix(each), heading, caption)
    if study.probe is not None:
        caption = f"Test samples by fine label and by what the probe of clusters predicts, on {tested_on}."
        size = _size(len(study.probe.table), len(study.probe.table))
        yield "probe", (collapse_figures.plotted_figure(study.probe.plot, size), "Probe of the clusters", caption)
    yield from _second(study)
    yield from feature_pictures(*_part(study), embedding=embedding, seed=int(study.settings["seed"]))


def _second(study: SubclassStudy) -> Iterator[tuple[str, Drawn]]:
    if study.matching is not None:
        match = study.matching
        caption = (
            f"Samples by the clusters of both networks, partners in one order. In the same: {percent(match.overlap)}, "
            f"with shuffled samples {percent(match.null_overlap)} (p {number(match.p_value)})."
        )
        drawn = collapse_figures.plotted_figure(match.plot, _size(*match.table.shape))
        yield "second", (drawn, "Clusters of the second network", caption)
    if study.angles is not None:
        caption = (
            "Canonical correlations between the principal directions of both networks inside each class, beside those "
            "of shuffled samples."
        )
        drawn = collapse_figures.plotted_figure(study.angles.plot, (4.6, 3.8))
        yield "angles", (drawn, "Do both vary alike inside classes", caption)


def _matrix(each: Agreement) -> Any:
    rows, columns = each.table.shape
    return collapse_figures.plotted_figure(each.plot, _size(rows, columns))


def _size(rows: int, columns: int) -> tuple[float, float]:
    return max(4.6, 1.8 + 0.42 * columns), max(3.4, 1.4 + 0.26 * rows)


def _part(study: SubclassStudy) -> tuple[Any, ...]:
    """Give features with the classes as labels, names, fine labels and names, of a random part of the samples."""
    order = torch.randperm(len(study.features), generator=torch.Generator().manual_seed(0))[:_SHOWN].sort().values
    part = replace(study.features, values=study.features.values[order], labels=study.found.coarse[order], inputs=None)
    fine = None if study.fine is None else study.fine[order]
    return part, study.class_names, fine, study.fine_names or None


def _tables(study: SubclassStudy) -> list[str]:
    found = []
    if study.agreements:
        found.append(elements.headed("Clusters and fine labels", elements.table(*agreement_table(study))))
    return [*found, elements.headed("Classes", elements.table(*class_table(study)))]


def _closing(study: SubclassStudy, content: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in study.settings.items() if value is not None and name != "groups"}
    collapse = study.collapse
    values = {
        "NC1": number(collapse.nc1),
        "spread of the cosines": number(collapse.cosine_spread),
        "spread of the norms": number(collapse.equinorm),
        "nearest mean": percent(collapse.ncm_accuracy),
    }
    values |= {} if collapse.accuracy is None else {"accuracy": percent(collapse.accuracy)}
    columns = {
        "Files": elements.file_list(content["files"]),
        "Collapse of the features": elements.pairs(values),
        "Settings": elements.pairs(settings),
        "Versions": elements.pairs(content["versions"]),
    }
    return elements.columns_section(columns, small=True)
