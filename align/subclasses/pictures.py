"""Pictures of subclasses: points by cluster, and tables of counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Give the axes, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def scatter(ax: Axes | None, places: Tensor, labels: Tensor, kind: str, title: str) -> Axes:
    """Draw points of a plane, coloured by label, with a legend."""
    ax = new_axes(ax, (4.6, 4.2))
    for place, label in enumerate(labels.unique().tolist()):
        shown = places[labels == label].numpy()
        colour = "#b0b0b0" if label < 0 else f"C{place}"
        name = "none" if label < 0 else f"{kind} {label}"
        ax.scatter(*shown.T, s=4, linewidths=0, color=colour, label=name)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize="medium")
    ax.legend(markerscale=3, fontsize="small")
    return ax


def matrix(
    ax: Axes | None, table: Tensor, rows: Sequence[str], columns: Sequence[str], labels: tuple[str, str], breaks: Tensor
) -> Axes:
    """Draw a table of counts as shares of its rows, the counts in the cells, with a line between classes of rows.

    Args:
        ax: Where to draw. Default: a new figure.
        table: (rows x columns), int64.
        rows: A name for each row.
        columns: A name for each column.
        labels: Names of the two axes, of the rows and of the columns.
        breaks: (rows,) class of each row.
    """
    height, width = table.shape
    ax = new_axes(ax, (1.6 + 0.45 * width, 1.2 + 0.32 * height))
    counts = table.numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.grid(False)
    for row, column in np.argwhere(counts > 0):
        colour = "white" if shares[row, column] > 0.6 else "black"
        ax.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize="x-small", color=colour)
    for row in np.flatnonzero(np.diff(breaks.numpy())):
        ax.axhline(row + 0.5, color="#5d646e", linewidth=0.8)
    ax.set_yticks(range(height), rows)
    ax.set_xticks(
        range(width),
        columns,
        rotation=45 if max(map(len, columns)) > 3 else 0,
        ha="right" if max(map(len, columns)) > 3 else "center",
    )
    ax.set_ylabel(labels[0])
    ax.set_xlabel(labels[1])
    return ax
