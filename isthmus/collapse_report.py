"""What is written of neural collapse: every number as JSON and CSV, pictures, and one page that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from isthmus.base.files import PathLike, make_folder, write_atomic
from isthmus.metrics.collapse import Collapse, CollapseCurves

from . import collapse_figures, elements, figures
from .features import Features
from .means_plane import MeansPlane, on_means
from .page import page
from .plain import dumps, number, percent
from .provenance import describe_files, versions
from .units_report import csv_text

COLUMNS = {
    "nc1": "NC1",
    "nc1_cheap": "tr Σ_W / tr Σ_B",
    "cosine_spread": "spread of cosines",
    "equinorm": "spread of norms",
    "simplex_distance": "from a simplex",
    "nc3": "NC3",
    "nc4": "NC4",
    "ncm_accuracy": "nearest mean",
    "accuracy": "accuracy",
}
_EMBEDDED = {"tsne": "t-SNE", "umap": "UMAP"}
_SHARES = ("nc4", "ncm_accuracy", "accuracy")

Drawn = tuple[Figure, str, str]
"""A picture, its heading and its caption."""


def write_collapse(
    found: Collapse | CollapseCurves,
    folder: PathLike,
    *,
    features: Features | None = None,
    class_names: Sequence[str] | None = None,
    fine: Tensor | None = None,
    fine_names: Sequence[str] | None = None,
    measured_on: str = "the given data",
    files: Mapping[str, PathLike] | None = None,
    embedding: collapse_figures.Embedding = "tsne",
    seed: int = 0,
) -> Path:
    """Write everything about the collapse of a network, or of several checkpoints of one, into a folder.

    `report.html` shows it and fetches nothing; `collapse.json` holds every number, `collapse.csv` a row for each
    checkpoint and layer; the pictures are there as PNG.

    Args:
        found: From `collapse` or `collapse_over`.
        folder: Made if it is missing.
        features: Some samples of the last layer of the last checkpoint, from `read_features`, to be drawn.
        class_names: Name of each class. Default: its number.
        fine: (samples,) finer labels of these samples, to colour them by.
        fine_names: Name of each fine label. Default: its number.
        measured_on: What the data is, for the page.
        files: The files that were read, by what they are.
        embedding: How the features are placed in the plane, see `collapse_figures.embedding`.
        seed: Of that.

    Returns:
        The path of the page.

    Raises:
        DataError: Features or names do not fit.
        OutputError: The folder cannot be written.

    >>> import tempfile, torch
    >>> from isthmus.metrics.collapse import collapse
    >>> model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> found = collapse(model, [(torch.randn(60, 5), torch.arange(60) % 3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_collapse(found, folder).name
    'report.html'
    """
    curves = CollapseCurves(("the network",), (found,)) if isinstance(found, Collapse) else found
    last = curves.collapses[-1]
    names = tuple(class_names or map(str, range(last.last.classes)))
    drawn = dict(_drawn(curves, names, features, fine, fine_names, embedding, seed))
    folder = make_folder(folder)
    content = {"measured_on": measured_on, "class_names": names, **curves.to_dict()}
    content |= {"files": describe_files(files or {}), "versions": versions()}
    for name, (picture, _, _) in drawn.items():
        figures.save(picture, folder / f"{name}.png")
    _write(folder / "collapse.csv", csv_text(rows(curves)))
    _write(folder / "collapse.json", dumps(content, indent=1))
    sections = [elements.figures_section(_shown(drawn)), *_tables(curves), _closing(last, content)]
    return _write(folder / "report.html", page(verdict(curves), _lead(curves, measured_on), _tiles(curves), sections))


def rows(curves: CollapseCurves) -> list[dict[str, Any]]:
    """Give every value, a row for each checkpoint and layer."""
    return [
        {"checkpoint": str(step), "layer": layer, **found.values[layer].to_dict()}
        for step, found in zip(curves.steps, curves.collapses, strict=True)
        for layer in found.layers
    ]


def value_table(curves: CollapseCurves, by: str = "checkpoint") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Give headers and rows of a table for a page or a terminal.

    Args:
        curves: Of one checkpoint or more.
        by: "checkpoint", of the last layer, or "layer", of the last checkpoint.
    """
    if by == "layer":
        last = curves.collapses[-1]
        found = {layer: last.values[layer] for layer in last.layers}
    else:
        found = {str(step): each.last for step, each in zip(curves.steps, curves.collapses, strict=True)}
    columns = [name for name in COLUMNS if any(getattr(values, name) is not None for values in found.values())]
    cells = [
        (title, *(_cell(name, getattr(values, name)) for name in columns)) for title, values in found.items()
    ]  # fmt: skip
    return (by, *(COLUMNS[name] for name in columns)), cells


def _cell(name: str, value: float | None) -> str:
    return percent(value) if name in _SHARES else number(value)


def verdict(curves: CollapseCurves) -> str:
    """Say in a sentence what was found."""
    last, first = curves.collapses[-1].last, curves.collapses[0].last
    text = f"NC1 of the last layer is {number(last.nc1)}, the spread of its cosines {number(last.cosine_spread)}"
    if len(curves.steps) > 1:
        text += (
            f"; at the first of {len(curves.steps)} checkpoints {number(first.nc1)} and {number(first.cosine_spread)}"
        )
    return text


def _write(path: Path, text: str) -> Path:
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _lead(curves: CollapseCurves, measured_on: str) -> str:
    last = curves.collapses[-1]
    what = "One network" if len(curves.steps) == 1 else f"{len(curves.steps)} checkpoints of one network"
    return (
        f"{what}, measured on {measured_on} ({last.last.samples:,} samples of {last.last.classes} classes). NC1 is the "
        "spread inside classes against that of their means, NC2 how far the means are from the corners of a simplex, "
        "NC3 how far the classifier is from the means, NC4 how often it decides as the nearest mean. Collapse is NC1 "
        "to NC3 at 0 and NC4 at 100 %. The mean cosine of the class means tells little: it is −1/(K−1) almost by "
        "construction; the spread of the cosines is the test."
    )


def _tiles(curves: CollapseCurves) -> list[tuple[str, str]]:
    last = curves.collapses[-1].last
    titles = {
        "nc1": "NC1, spread inside classes",
        "cosine_spread": "NC2, spread of the cosines",
        "nc3": "NC3, classifier and means",
        "nc4": "NC4, decides as the nearest mean",
        "accuracy": "Accuracy on this data",
    }
    values = {name: getattr(last, name) for name in titles}
    return [(titles[name], _cell(name, value)) for name, value in values.items() if value is not None]


def _drawn(
    curves: CollapseCurves, names: Sequence[str], features: Features | None, fine: Tensor | None,
    fine_names: Sequence[str] | None, embedding: collapse_figures.Embedding, seed: int,
) -> Iterator[tuple[str, Drawn]]:  # fmt: skip
    last = curves.collapses[-1]
    if len(curves.steps) > 1:
        caption = "Of the last layer, on a logarithmic axis: what is 0 in a collapsed network falls."
        yield "training", (collapse_figures.curves_figure(curves), "Over training", caption)
    if len(last.layers) > 1:
        caption = f"From the first layer to the last{_of_last(curves)}, on a logarithmic axis."
        yield "depth", (collapse_figures.depth_figure(last), "Along the depth", caption)
    *_, moments = last.moments.values()
    vectors = {"class means": moments.centred_means()}
    if features is not None and features.weight is not None:
        vectors["rows of the classifier"] = features.weight
    caption = (
        f"Cosines between the class means, less their mean{_of_last(curves)}. In a collapsed network all are "
        f"−1/(K−1) = {-1 / (len(names) - 1):.2f}.".replace("= -", "= −")
    )
    yield "cosines", (collapse_figures.cosines_figure(vectors, names), "Angles between classes", caption)
    if features is not None:
        yield from feature_pictures(features, names, fine, fine_names, embedding, seed)


def _of_last(curves: CollapseCurves) -> str:
    return "" if len(curves.steps) == 1 else f", of the last checkpoint ({curves.steps[-1]})"


def feature_pictures(
    features: Features,
    names: Sequence[str],
    fine: Tensor | None = None,
    fine_names: Sequence[str] | None = None,
    embedding: collapse_figures.Embedding = "tsne",
    seed: int = 0,
) -> Iterator[tuple[str, Drawn]]:
    """Draw features on the directions of their class means, in the simplex plane of three classes, and embedded.

    Args:
        features: Labelled with the classes that the network was trained on.
        names: Name of each class.
        fine: (samples,) fine labels to colour by. Default: the classes.
        fine_names: Name of each fine label.
        embedding: "tsne" or "umap".
        seed: Of the embedding.

    Yields:
        For each picture its name, and the figure with its heading and its caption.
    """
    present = features.labels.unique().tolist()
    whole = on_means(features.values, features.labels, weight=features.weight)
    planes = {"means": ("Features and class means", whole)}
    if len(present) > 3:
        three = on_means(
            features.values, features.labels, classes=present[:3], weight=features.weight
        )  # fmt: skip
        planes["simplex"] = ("The plane of three classes", three)
    colouring = {"fine": fine, "fine_names": fine_names}
    by = "classes" if fine is None else "fine labels, which the network did not see"
    for name, (heading, plane) in planes.items():
        drawn = collapse_figures.plane_figure(plane, features.labels, names, **colouring)
        yield name, (drawn, heading, _plane_caption(plane, features, by))
    if len(features) >= 10:
        places = collapse_figures.embedding(features.values, embedding, seed=seed)
        labels, titles = (features.labels, names) if fine is None else (fine, fine_names)
        caption = (
            f"{_EMBEDDED[embedding]} of {len(features):,} samples, coloured by {by}. Neighbours stay neighbours; "
            "distances between groups, and their sizes, mean little."
        )
        drawn = collapse_figures.embedding_figure({"": (places, labels, titles)})
        yield embedding, (drawn, "Features of all classes", caption)


def _plane_caption(plane: MeansPlane, features: Features, by: str) -> str:
    arrows = "; lines: rows of the classifier, scaled" if plane.rows is not None else ""
    return (
        f"{len(plane.points):,} samples of {features.layer} in the two directions in which the means of "
        f"{len(plane.classes)} classes are farthest apart, coloured by {by}. Circles: class means{arrows}. The plane "
        f"holds {percent(plane.share)} of the variance between these classes and {percent(plane.inside)} of that "
        "inside them."
    )


def _shown(drawn: Mapping[str, Drawn]) -> list[str]:
    return [
        elements.figure(
            figures.svg(picture, name, f"{heading}: {caption}"), heading, caption, wide=picture.get_figwidth() > 6
        )
        for name, (picture, heading, caption) in drawn.items()
    ]


def _tables(curves: CollapseCurves) -> list[str]:
    found = []
    if len(curves.steps) > 1:
        found.append(elements.headed("Checkpoints, last layer", elements.table(*value_table(curves))))
    found.append(elements.headed(f"Layers{_of_last(curves)}", elements.table(*value_table(curves, "layer"))))
    return found


def _closing(last: Collapse, content: Mapping[str, Any]) -> str:
    values = last.last
    settings = {
        "classifier": last.classifier or "none",
        "classes": values.classes,
        "smallest class": f"{values.smallest_class:,} samples",
        "units of the last layer": values.features,
        "dimensions of the class means": values.rank,
        "classes count": "by their size" if values.weighted else "alike",
        "places of feature maps": last.convention["positions"],
    }
    columns = {
        "Files": elements.file_list(content["files"]),
        "Settings": elements.pairs(settings),
        "Versions": elements.pairs(content["versions"]),
    }
    return elements.columns_section(columns, small=True)
