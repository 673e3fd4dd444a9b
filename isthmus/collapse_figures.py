"""Pictures of neural collapse and of what is left inside a class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import AutoLocator, MaxNLocator
from matplotlib.transforms import offset_copy
from torch import Tensor

from isthmus.align.subclasses.tables import contingency, matched
from isthmus.base.errors import DataError, nearest
from isthmus.metrics.collapse import Collapse, CollapseCurves

from .figures import STYLE
from .means_plane import MeansPlane

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from isthmus.align.subclasses import Subclasses

Embedding = Literal["tsne", "umap"]

_COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8C6D31",
    "#6A51A3",
    "#000000",
    "#F0C808",
)
_NONE = "#b0b0b0"
_LEGEND = 20  # names that a legend takes
_CELLS = 12  # rows up to which the cells of a matrix hold their number
PANELS = 6  # classes that are shown beside one another


def plane_figure(
    plane: MeansPlane, labels: Tensor, names: Sequence[str], *, fine: Tensor | None = None,
    fine_names: Sequence[str] | None = None,
) -> Figure:  # fmt: skip
    """Draw samples, class means and, as arrows, classifier rows in the plane or the space of the means.

    Args:
        plane: From `on_means`.
        labels: (all samples,), the class of each, as given to `on_means`.
        names: Name of each class.
        fine: (all samples,), finer labels to colour by. Default: the classes.
        fine_names: Name of each fine label. Default: its number.
    """
    figure, dims = Figure(figsize=(4.6, 4.4), layout="constrained"), plane.points.shape[1]
    colours = (labels if fine is None else fine)[plane.samples]
    titles = names if fine is None else fine_names
    with rc_context(STYLE | {"axes.grid": False}):
        ax = figure.add_subplot(projection="3d") if dims == 3 else figure.add_subplot()
        if dims == 3:
            ax.computed_zorder = False  # pyright: ignore[reportAttributeAccessIssue]  # names stay before the points
        _scatter(ax, plane.points, colours, titles)
        means = plane.means.numpy()
        ax.plot(*means.T, linestyle="", marker="o", markersize=8, markerfacecolor="none", markeredgecolor="black")
        for place, name in enumerate(plane.classes.tolist()):
            if plane.rows is not None:
                ends = np.stack([np.zeros(dims), plane.rows[place].numpy()])
                ax.plot(*ends.T, color="black", linewidth=0.9, alpha=0.7)
            _named(ax, means[place], names[int(name)])
        ax.set_aspect("equal")
        ax.margins(0.12)
        for axis, number in zip(("x", "y", "z")[:dims], (1, 2, 3), strict=False):
            getattr(ax, f"set_{axis}label")(f"direction {number} of the class means" if dims == 2 else f"{number}")
    return figure


def _named(ax: Any, spot: np.ndarray, name: str) -> None:
    style: dict[str, Any] = {"fontsize": "small", "weight": "bold", "ha": "center", "va": "bottom", "zorder": 5}
    if len(spot) == 2:
        style["transform"] = offset_copy(ax.transData, ax.figure, y=5, units="points")
    ax.text(*spot, name, path_effects=[withStroke(linewidth=2.5, foreground="white")], **style)


def embedding(
    features: Tensor, method: Embedding = "tsne", *, components: int = 50, perplexity: float = 30.0, seed: int = 0
) -> Tensor:
    """Place samples in the plane so that neighbours stay neighbours; distances between groups mean little.

    Args:
        features: Samples x units.
        method: "tsne" (van der Maaten & Hinton 2008), or "umap" (McInnes, Healy & Melville 2018), which needs the
            package umap-learn.
        components: Principal components that are embedded, at most.
        perplexity: Of t-SNE; the number of neighbours of UMAP is half of it.
        seed: Of what is random.

    Returns:
        (samples x 2), float32.

    Raises:
        DataError: There is no such method, its package is missing, or there are fewer than ten samples.

    >>> places = embedding(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), perplexity=5)
    >>> places.shape
    torch.Size([30, 2])
    """
    known = ("tsne", "umap")
    if method not in known:
        raise DataError(f"no embedding {method!r}{nearest(method, known)}; there are {', '.join(known)}")
    if features.ndim != 2 or len(features) < 10:
        raise DataError(f"features of shape {tuple(features.shape)}; an embedding needs ten samples x units or more")
    x = features.detach().cpu().double()
    x = x - x.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    scores = (u * s)[:, :components].numpy()
    place: Callable[[np.ndarray, float, int], np.ndarray] = _tsne if method == "tsne" else _umap
    return torch.from_numpy(np.ascontiguousarray(place(scores / scores.std(), perplexity, seed))).float()


def _tsne(x: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    return TSNE(2, perplexity=min(perplexity, (len(x) - 1) / 3), init="pca", random_state=seed).fit_transform(x)


def _umap(x: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    try:
        import umap  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError("UMAP needs the package umap-learn: pip install 'isthmus[umap]'; or take 'tsne'") from error
    neighbours = int(min(max(perplexity / 2, 2), len(x) - 1))
    return umap.UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(x)


def embedding_figure(panels: Mapping[str, tuple[Tensor, Tensor, Sequence[str] | None]]) -> Figure:
    """Draw samples in the plane, once for each colouring, side by side.

    Args:
        panels: By title: places (samples x 2), labels (samples,), -1 for none, and the name of each label, or None
            for its number.
    """
    figure = Figure(figsize=(4.4 * len(panels), 4.4), layout="constrained")
    with rc_context(STYLE | {"axes.grid": False}):
        for ax, (title, (places, labels, names)) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            _scatter(ax, places, labels, names)
            _bare(ax, title)
    return figure


def places_figure(
    found: Subclasses, names: Sequence[str], fine: Tensor | None = None, fine_names: Sequence[str] | None = None
) -> Figure:
    """Draw the samples of each class where they were clustered: by cluster and, below, by fine label.

    Args:
        found: From `subclasses`; of many classes the first six are shown.
        names: Name of each class.
        fine: (samples,) fine labels.
        fine_names: Name of each fine label. Default: its number.
    """
    shown = found.names.tolist()[:PANELS]
    rows = 1 if fine is None else 2
    figure = Figure(figsize=(max(2.3 * len(shown), 4.6), 2.6 * rows), layout="constrained")
    with rc_context(STYLE | {"axes.grid": False, "font.size": 8.5}):
        grid = figure.subplots(rows, len(shown), squeeze=False)
        for column, name in zip(grid.T, shown, strict=True):
            own = ((found.coarse == name) & ~found.places[:, 0].isnan()).nonzero().flatten()
            labels, first = found.labels[own], int((found.classes == name).nonzero()[0])
            clusters, known = torch.where(labels < 0, -1, labels - first), None if fine is None else fine[own]
            for ax, (title, (colours, titles)) in zip(column, _coloured(clusters, known, fine_names), strict=True):
                _scatter(ax, found.places[own], colours, titles, below=True)
                _bare(ax, f"{names[name]}, {title}", above=True)
    return figure


_Colouring = tuple[str, tuple[Tensor, list[str]]]


def _coloured(clusters: Tensor, fine: Tensor | None, names: Sequence[str] | None) -> Iterator[_Colouring]:
    """Give colours from 0 for the clusters of one class, and for its fine labels; those that match have the same."""
    count = int(clusters.max()) + 1
    colours = torch.arange(count)
    present, local = (torch.zeros(0), clusters) if fine is None else fine.unique(return_inverse=True)
    if fine is not None:
        taken, met = matched(contingency(clusters, local, count, len(present)))
        colours = len(present) + torch.arange(count)
        colours[taken] = met
        colours[colours >= len(present)] = len(present) + torch.arange(count - len(taken))
    titles = [""] * (int(colours.max()) + 1)
    for cluster, colour in enumerate(colours.tolist()):
        titles[colour] = f"cluster {cluster}"
    yield "by cluster", (torch.where(clusters < 0, -1, colours[clusters]), titles)
    if fine is not None:
        told = [str(label) if names is None else names[int(label)] for label in present.tolist()]
        yield "by fine label", (local, told)


def cosines_figure(vectors: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """Draw the cosines between vectors, one for each class, as matrices side by side.

    Args:
        vectors: By title, each (classes x units), such as centred class means and the rows of a classifier.
        names: Name of each class.
    """
    figure = Figure(figsize=(4.4 * len(vectors), 4.2), layout="constrained")
    with rc_context(STYLE | {"axes.grid": False}):
        axes = figure.subplots(1, len(vectors), squeeze=False)[0]
        for ax, (title, rows) in zip(axes, vectors.items(), strict=True):
            unit = torch.nn.functional.normalize(rows.detach().cpu().double(), dim=1)
            cosines = (unit @ unit.T).numpy()
            ax.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
            _named_cells(ax, cosines, names)
            ax.set_title(title, fontsize="medium")
        figure.colorbar(axes[0].images[0], ax=list(axes), shrink=0.7, label="cosine")
    return figure


def _named_cells(ax: Axes, values: np.ndarray, names: Sequence[str]) -> None:
    count = len(values)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if count <= _LEGEND:
        ax.set_xticks(range(count), names[:count], rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
        ax.set_yticks(range(count), names[:count], fontsize="small")
    if count <= _CELLS:
        for row, column in np.argwhere(~np.eye(count, dtype=bool)):
            colour = "white" if abs(values[row, column]) > 0.6 else "black"
            text = f"{round(float(values[row, column]), 2) + 0.0:.2f}".replace("-", "−")
            ax.text(column, row, text, ha="center", va="center", fontsize="x-small", color=colour)


def curves_figure(curves: CollapseCurves, names: Sequence[str] | None = None, layer: str | None = None) -> Figure:
    """Draw the values of collapse over checkpoints."""
    return _plotted(lambda ax: curves.plot(ax, names, layer))


def depth_figure(collapse: Collapse, names: Sequence[str] | None = None) -> Figure:
    """Draw the values of collapse along the depth of a network."""
    return _plotted(lambda ax: collapse.plot(ax, names))


def plotted_figure(plot: Callable[[Any], Axes], size: tuple[float, float] = (4.6, 3.8)) -> Figure:
    """Draw what plots itself into axes, a table of clusters say, in the style of a report."""
    figure = Figure(figsize=size, layout="constrained")
    with rc_context(STYLE | {"axes.grid": False}):
        ax = plot(figure.subplots())
    if isinstance(ax.xaxis.get_major_locator(), AutoLocator):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # it counts something
    return figure


def _plotted(plot: Callable[[Any], Axes]) -> Figure:
    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    with rc_context(STYLE):
        ax = plot(figure.subplots())
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=7, columnspacing=1.2)
    return figure


def _scatter(ax: Any, places: Tensor, labels: Tensor, names: Sequence[str] | None, below: bool = False) -> None:
    present = labels.unique().tolist()
    many = len(present) > _LEGEND
    for number, label in enumerate(present):
        spread = colormaps["turbo"](number / max(len(present) - 1, 1))
        colour = _NONE if label < 0 else spread if max(present) >= len(_COLOURS) else _COLOURS[label]
        title = "none" if label < 0 else names[label] if names is not None else str(label)
        points = places[labels == label].numpy()
        ax.scatter(*points.T, s=5, linewidths=0, alpha=0.7, color=colour, label=None if many else title)
    if not many:
        spot: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)} if below else {}
        spot = spot or {"loc": "lower center", "bbox_to_anchor": (0.5, 1.06)}
        columns = min(len(present), 2 if below else 5)
        ax.legend(markerscale=2.5, ncols=columns, fontsize="small", columnspacing=0.8, handletextpad=0.2, **spot)


def _bare(ax: Axes, title: str, above: bool = False) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if above:
        ax.set_title(title, fontsize="small")
    else:
        ax.set_xlabel(title)
