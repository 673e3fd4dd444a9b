"""Figures of a study, as matplotlib figures and as SVG for a page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from isthmus.align import drawing
from isthmus.base.errors import OutputError
from isthmus.base.files import PathLike, write_atomic

from .study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from isthmus.align import Symmetry
    from isthmus.merge import Path
    from isthmus.merge.layerwise import FeatureConnectivity, LayerwisePaths
    from isthmus.merge.paths import Plane
    from isthmus.metrics import Similarity

FORMATS = ("png", "svg", "pdf")

# Okabe and Ito's palette, told apart with any colour vision; line styles say the same without colour.
_PATH_STYLES = {
    "as trained": {"color": "#D55E00", "linestyle": "-"},
    "matched": {"color": "#0072B2", "linestyle": "-"},
    "matched and repaired": {"color": "#009E73", "linestyle": "--"},
}
_GROUP_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#2b2f36",
    "xtick.color": "#4a4f57",
    "ytick.color": "#4a4f57",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e7e8ea",
    "legend.frameon": False,
    "svg.fonttype": "none",
}
_MOST_LABELS = 14
# Distances below are rounding: the first layer of a network is linear in its weights.
_ROUNDING = 1e-7


def path_figure(paths: Mapping[str, Path], quantity: str = "loss", band: float | None = None) -> Figure:
    """Draw paths over one another, and with dotted lines what was measured on further data.

    Args:
        paths: By name.
        quantity: "loss" or "accuracy".
        band: Level of confidence of a band to be shaded about each, such as 0.95; none by default.
    """
    figure, ax = _axes()
    for place, (name, path) in enumerate(paths.items()):
        colour = _GROUP_COLOURS[place % len(_GROUP_COLOURS)]
        style: dict[str, Any] = {"color": colour, "linestyle": "-", **_PATH_STYLES.get(name, {})}
        ax.plot(path.alphas, path.values(quantity), label=name, marker="o", markersize=3, linewidth=1.8, **style)
        if band is not None and path.contributions is not None and path.samples > 1:
            low, high = path.band(band, quantity=quantity)
            ax.fill_between(path.alphas, low, high, color=style["color"], alpha=0.15, linewidth=0)
        for other in path.also.values():
            ax.plot(other.alphas, other.values(quantity), color=style["color"], linestyle=":", linewidth=1.2)
    ax.set_xlabel("place on the line, α  (0: network A, 1: network B)")
    ax.set_ylabel("loss: cross entropy (nats)" if quantity == "loss" else "accuracy (share of samples)")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(bottom=0, top=1.02 if quantity == "accuracy" else None)
    columns = min(len(paths), 3)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, columnspacing=1.2)  # clear of the curves
    return figure


def features_figure(features: Mapping[str, FeatureConnectivity]) -> Figure:
    """Draw by layer how far features halfway are from halfway between the features, and the networks from each other.

    Args:
        features: By what was done to B, all of the same layers, measured at one alpha.
    """
    figure, ax = _axes(height=3.7)
    layers: Sequence[str] = ()
    for name, found in features.items():
        layers, colour = found.layers, _PATH_STYLES[name]["color"]
        for values, line in ((found.endpoint_distance, ":"), (found.cosine_distance, "-")):
            drawn = np.where(values > _ROUNDING, values, np.nan)
            label = name if line == "-" else None
            ax.plot(range(len(layers)), drawn, color=colour, linestyle=line, marker="o", markersize=3, label=label)
    ax.set_yscale("log")
    _name_layers(ax, layers)
    ax.set_ylabel("1 − cosine of features")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def layerwise_figure(layerwise: Mapping[str, LayerwisePaths]) -> Figure:
    """Draw bars of the barrier of one layer at a time, the others held at A's.

    Args:
        layerwise: By what was done to B, all of the same layers.
    """
    figure, ax = _axes(height=3.7)
    layers: Sequence[str] = ()
    width = 0.8 / max(len(layerwise), 1)
    for place, (name, found) in enumerate(layerwise.items()):
        layers = found.layers
        spots = np.arange(len(layers)) + (place - (len(layerwise) - 1) / 2) * width
        ax.bar(spots, found.midpoint_barriers, width, color=_PATH_STYLES[name]["color"], label=name)
    _name_layers(ax, layers)
    ax.axhline(0, color="#8a8f98", linewidth=0.8)
    ax.set_ylabel("loss with the layer halfway,\nabove the mean of A and B")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def plane_figure(plane: Plane) -> Figure:
    """Draw the loss on the plane through three networks."""
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    plane.plot(figure.subplots(), labels=("A", "B", "C"))
    return figure


def _name_layers(ax: Axes, layers: Sequence[str]) -> None:
    step = -(-len(layers) // _MOST_LABELS) or 1
    ax.set_xticks(range(0, len(layers), step), layers[::step], rotation=45, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.6, len(layers) - 0.4)


def scores_figure(scores: Mapping[str, Any], label: str) -> Figure:
    """Draw the units' scores, best first, one curve for each group.

    Args:
        scores: Per group (units,); NaN entries are left out.
        label: What the scores are.
    """
    figure, ax = _axes(height=3.7)
    many = len(scores) > len(_GROUP_COLOURS)
    for place, (name, values) in enumerate(scores.items()):
        known = np.asarray(values, dtype=float)
        known = np.sort(known[~np.isnan(known)])[::-1]
        share = (np.arange(len(known)) + 0.5) / max(len(known), 1)
        colour = colormaps["viridis"](place / max(len(scores) - 1, 1)) if many else _GROUP_COLOURS[place]
        ax.plot(share, known, color=colour, linewidth=1.6, label=f"{name} ({len(known)})")
    ax.set_xlabel("units of a group, best match first (share)")
    ax.set_ylabel(label)
    ax.set_xlim(0, 1)
    if many:  # by depth: the ends of the scale are enough to read it
        handles, labels = ax.get_legend_handles_labels()
        chosen = np.unique(np.linspace(0, len(labels) - 1, 5).round().astype(int))
        ax.legend([handles[i] for i in chosen], [labels[i] for i in chosen], title="group (units), by depth")
    elif scores:
        ax.legend(title="group (units)")
    return figure


def similarity_figure(similarity: Similarity) -> Figure:
    """Draw the map of layer similarities; of many layers not each is named."""
    figure, ax = _axes(height=3.7)
    similarity.plot(ax)
    ax.grid(False)
    for axis, names in ((ax.xaxis, similarity.layers_b), (ax.yaxis, similarity.layers_a)):
        step = -(-len(names) // _MOST_LABELS)
        axis.set_ticks(range(0, len(names), step), names[::step])
    ax.set_xlabel("layers of B")
    ax.set_ylabel("layers of A")
    return figure


def symmetry_figure(symmetry: Symmetry) -> Figure:
    """Draw the groups of a symmetry along its network; the figure is as large as its letters need."""
    figure = Figure(figsize=drawing.figure_size(symmetry))
    drawing.plot(symmetry, figure.add_axes((0, 0, 1, 1)))
    return figure


def study_figures(study: Study) -> dict[str, Figure]:
    """Draw all figures of a report."""
    with rc_context(STYLE):
        return {
            "loss": path_figure(study.paths, "loss", band=0.95),
            "accuracy": path_figure(study.paths, "accuracy", band=0.95),
            "scores": scores_figure(study.matching.scores, study.matching.score),
            "similarity": similarity_figure(study.similarity),
            **({"features": features_figure(study.features)} if study.features else {}),
            **({"layerwise": layerwise_figure(study.layerwise)} if study.layerwise else {}),
        }


def svg(figure: Figure, name: str, alt: str) -> str:
    """Give a figure as an SVG element for a page: text as text, nothing fetched, ids of its own.

    Args:
        figure: What to draw.
        name: Prefix of the ids in it; each figure of a page needs another.
        alt: What the figure shows, in words.
    """
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows them
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def save(figure: Figure, path: PathLike) -> File:
    """Write a figure as PNG, SVG or PDF, after the end of the file's name; whole or not at all.

    Raises:
        OutputError: The name ends otherwise, or the file cannot be written.
    """
    form = check_format(path)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "isthmus"}):
        return write_atomic(
            path, lambda temporary: figure.savefig(temporary, format=form, dpi=200, bbox_inches="tight")
        )


def check_format(path: PathLike) -> str:
    """Give the format that a file's name asks for.

    Raises:
        OutputError: It asks for none of `FORMATS`.
    """
    form = File(path).suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise OutputError(f"{path}: figures are written as {', '.join(FORMATS)}; end the name in one of them")
    return form


def _axes(height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    with rc_context(STYLE):
        return figure, figure.subplots()
