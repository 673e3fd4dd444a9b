"""Pictures of neural collapse: along the depth of a network, and over its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .networks import Collapse, check_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .curves import CollapseCurves

_LABELS = {
    "nc1": "NC1: tr(Σ_W Σ_B⁺) / K",
    "nc1_cheap": "tr Σ_W / tr Σ_B",
    "cdnv": "CDNV",
    "equinorm": "NC2: spread of norms / mean",
    "cosine_spread": "NC2: spread of cosines",
    "equiangularity": "NC2: |cosine + 1/(K-1)|",
    "simplex_distance": "NC2: distance from a simplex",
    "nc3": "NC3: classifier and means",
}
# Shares that go to 1 are drawn as what is missing, which a logarithmic axis can show.
_MISSING = {
    "nc4": "1 - NC4: decisions unlike the nearest mean",
    "ncm_accuracy": "error of the nearest mean",
    "accuracy": "error of the classifier",
}
_DEPTH = ("nc1", "nc1_cheap", "cosine_spread", "ncm_accuracy")
_TRAINING = ("nc1", "cosine_spread", "nc3", "nc4")


def depth_curves(collapse: Collapse, ax: Axes | None = None, names: Sequence[str] | None = None) -> Axes:
    """Draw values along the depth of a network, see `Collapse.plot`."""
    names = _DEPTH if names is None else names
    curves = {name: collapse.curve(name) for name in names}
    places = list(range(len(collapse.layers)))
    ax = _curves(ax, places, curves)
    ax.set_xticks(places, collapse.layers, rotation=90, fontsize=8)
    ax.set_xlabel("layer")
    return ax


def training_curves(
    curves: CollapseCurves, ax: Axes | None = None, names: Sequence[str] | None = None, layer: str | None = None
) -> Axes:
    """Draw values over training, see `CollapseCurves.plot`."""
    names = _TRAINING if names is None else names
    found = {name: curves.curve(name, layer) for name in names}
    numbers = all(isinstance(step, (int, float)) for step in curves.steps)
    places = list(curves.steps) if numbers else list(range(len(curves.steps)))
    ax = _curves(ax, places, found)
    if not numbers:
        ax.set_xticks(places, [str(step) for step in curves.steps], rotation=90, fontsize=8)
    ax.set_xlabel("checkpoint")
    return ax


def _curves(ax: Axes | None, places: Sequence[Any], curves: dict[str, list[float | None]]) -> Axes:
    import matplotlib.pyplot as plt

    if ax is None:
        ax = plt.subplots(figsize=(max(5.0, 2 + 0.3 * len(places)), 4), layout="constrained")[1]
    positive = False
    for name, values in curves.items():
        check_value(name)
        heights = np.array([np.nan if value is None else value for value in values], dtype=float)
        heights = 1 - heights if name in _MISSING else heights
        heights[~(heights > 0)] = np.nan  # a logarithmic axis has no place for 0
        positive = positive or bool(np.isfinite(heights).any())
        ax.plot(places, heights, marker="o", markersize=3, label=_MISSING.get(name) or _LABELS.get(name, name))
    if positive:
        ax.set_yscale("log")
    ax.legend(fontsize=8)
    return ax
