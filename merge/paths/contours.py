"""The picture of a plane through three networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...base.errors import DataError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .plane import Plane

_LEVELS = 14


def draw_plane(plane: Plane, ax: Axes | None, quantity: str, highest: float | None, labels: Sequence[str]) -> Axes:
    """Draw a plane; see `Plane.plot`."""
    values = _values(plane, quantity)
    if len(labels) != 3:
        raise DataError(f"{len(labels)} labels for three networks; pass one each")
    if not np.isfinite(values).any():
        raise DataError(f"there is no point at which the {quantity} is finite, and nothing to draw")
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(6.4, 5), layout="constrained")[1]
    levels, extend = _levels(plane, values, quantity == "accuracy", highest)
    ax.set_facecolor("#d9d9d9")  # where it is not finite
    shown = np.ma.masked_invalid(values)
    colours = "viridis" if quantity == "accuracy" else "viridis_r"
    filled = ax.contourf(plane.x, plane.y, shown, levels=levels, cmap=colours, extend=extend)
    ax.contour(plane.x, plane.y, shown, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    named = str(plane.metric_name) if quantity == "accuracy" else quantity
    bar = ax.figure.colorbar(filled, ax=ax, label=named, format="%.3g")
    bar.ax.tick_params(labelsize="small")
    _mark(plane, ax, labels)
    ax.set_aspect("equal")
    ax.set_xlabel("distance in weight space, along b − a")
    ax.set_ylabel("distance at right angles, towards c")
    return ax


def _values(plane: Plane, quantity: str) -> np.ndarray:
    known = {"loss": plane.loss}
    if plane.accuracy is not None:
        known |= {"accuracy": plane.accuracy, "error": 1 - plane.accuracy}
    if quantity not in known:
        raise DataError(f"quantity {quantity!r} was not measured on this plane{nearest(quantity, known)}")
    return known[quantity]


def _levels(plane: Plane, values: np.ndarray, upwards: bool, highest: float | None) -> tuple[np.ndarray, str]:
    """Choose levels, denser near the best value, and whether there is more beyond the last."""
    costs = -values if upwards else values
    finite = costs[np.isfinite(costs)]
    best, worst = float(finite.min()), float(finite.max())
    inside = costs[_inside(plane)]
    inside = inside[np.isfinite(inside)]
    if highest is not None:
        top = -highest if upwards else highest
    else:
        top = max(best + 0.1 * (worst - best), float(inside.max()) if len(inside) else best)
    if not top > best:
        top = best + max(1e-12, 1e-6 * abs(best))
    levels = best + (top - best) * np.linspace(0, 1, _LEVELS) ** 2
    beyond = worst > top
    if upwards:
        return -levels[::-1], "min" if beyond else "neither"
    return levels, "max" if beyond else "neither"


def _inside(plane: Plane) -> np.ndarray:
    """Tell which points of the grid are in the triangle."""
    x, y = np.meshgrid(plane.x, plane.y)
    third = y / plane.places[2, 1]
    second = (x - third * plane.places[2, 0]) / plane.places[1, 0]
    return (third >= 0) & (second >= 0) & (second + third <= 1)


def _mark(plane: Plane, ax: Axes, labels: Sequence[str]) -> None:
    round_trip = plane.places[[0, 1, 2, 0]]
    ax.plot(round_trip[:, 0], round_trip[:, 1], color="black", linewidth=0.8, linestyle="--")
    ax.plot(plane.places[:, 0], plane.places[:, 1], "o", color="black", markeredgecolor="white", markersize=8, zorder=3)
    centre = plane.places.mean(0)
    for place, label in zip(plane.places, labels, strict=True):
        away = (place - centre) / np.linalg.norm(place - centre)
        ax.annotate(
            label,
            place,
            xytext=14 * away,
            textcoords="offset points",
            ha="center",
            va="center",
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
