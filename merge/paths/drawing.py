"""Pictures of paths: several quantities of one, or several paths beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...base.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .path import Path

# Okabe and Ito's palette, told apart with any colour vision.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BROKEN = ("--", ":", "-.")


def draw_path(path: Path, ax: Axes | None, label: str | None, quantity: str, band: float | None) -> Axes:
    """Draw a path; see `Path.plot`."""
    values = path.values(quantity)
    others = {name: other.values(quantity) for name, other in path.also.items()}
    ax = _axes(ax)
    shown = label if label is not None or not others else "data"
    (line,) = ax.plot(path.alphas, values, marker="o", markersize=3, label=shown)
    if band is not None:
        _shade(path, ax, quantity, band, line.get_color())
    for index, (name, other) in enumerate(others.items()):
        named = name if label is None else f"{label}, {name}"
        style = _BROKEN[index % len(_BROKEN)]
        ax.plot(path.alphas, other, linestyle=style, color=line.get_color(), label=named)
        if band is not None:
            _shade(path.also[name], ax, quantity, band, line.get_color())
    ax.set_xlabel("alpha (0: first network, 1: second)")
    ax.set_ylabel(str(path.metric_name) if quantity == "accuracy" else quantity)
    if shown is not None:
        ax.legend()
    return ax


def plot_paths(
    paths: Mapping[str, Path], ax: Axes | None = None, quantity: str = "loss", band: float | None = None
) -> Axes:
    """Draw several paths over one another.

    Args:
        paths: By the name that the legend gives them.
        ax: Where to draw; a new figure by default.
        quantity: "loss", "accuracy", "error" or the name of a metric.
        band: Level of confidence of a band to be shaded around each, such as 0.95; none by default.

    Returns:
        The axes.

    Raises:
        DataError: There is no path, or the quantity was not measured along one.
    """
    if not paths:
        raise DataError("there is no path to draw; pass a mapping from names to paths, as {'naive': path}")
    for path in paths.values():
        path.values(quantity)
    ax = _axes(ax)
    ax.set_prop_cycle(color=_COLOURS)
    for name, path in paths.items():
        path.plot(ax, label=name, quantity=quantity, band=band)
    if quantity == "loss":
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e7e8ea")
    ax.set_axisbelow(True)
    return ax


def _shade(path: Path, ax: Axes, quantity: str, level: float, colour: Any) -> None:
    low, high = path.band(level, quantity=quantity)
    ax.fill_between(path.alphas, low, high, color=colour, alpha=0.18, linewidth=0)
