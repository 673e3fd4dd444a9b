"""Curves of matched units: how alike the pairs are, best first, beside the best partners and chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .correspondence import UnitCorrespondence


SMALL = (4.6, 3.4)
"""Inches of a figure of curves."""


def matched_curves(pair: UnitCorrespondence, ax: Axes | None = None) -> Axes:
    """Draw the correlations of matched units on held-out samples, best first (Li et al. 2015, Figure 3).

    Three curves: the best partners (semi-matching), the one-to-one partners, and one-to-one partners found on shuffled
    samples, which is what chance gives. Each is sorted by itself.

    Args:
        pair: From `correspond`.
        ax: Where to draw. Default: a new figure.

    Returns:
        The axes.
    """
    ax = new_axes(ax, SMALL)
    curves = {
        "best partner": (pair.semi_held_out, {"color": "#0072B2", "linestyle": "-"}),
        "one-to-one": (pair.held_out, {"color": "#D55E00", "linestyle": "-"}),
        "one-to-one, shuffled samples": (pair.null_held_out, {"color": "#5d646e", "linestyle": ":"}),
    }
    for label, (values, style) in curves.items():
        if values is not None and len(ordered := _sorted(values)):
            ax.plot(np.arange(1, len(ordered) + 1), ordered, linewidth=1.6, label=label, **style)
    ax.set_xlabel(f"units of {pair.layer_a}, best first")
    ax.set_ylabel("correlation on held-out samples")
    ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.02)
    ax.legend()
    return ax


def new_axes(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """Give the axes, or those of a new figure, of matplotlib's size unless told otherwise."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def _sorted(values: Tensor) -> np.ndarray:
    known = values.cpu().numpy()
    return np.sort(known[~np.isnan(known)])[::-1]
