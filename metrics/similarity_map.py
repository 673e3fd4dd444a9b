"""A map of similarities between layers, with what is known of its chance level and its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_ABBREVIATIONS = ("cka", "hsic", "cca", "svcca", "pwcca", "rsa")


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarity of each layer of one network with each of another.

    Attributes:
        values: (layers of a x layers of b), float64; NaN where the index is undefined.
        layers_a: Layer names of the rows, in execution order.
        layers_b: Layer names of the columns, in execution order.
        index: Name of the index.
        convention: How it was computed: "positions", the number of "samples", the "estimator", and whatever else the
            values depend on, such as a mask, a subsample with its seed, or the bandwidths of a kernel.
        distance: Whether small values mean alike.
        null_mean: Mean over shuffles of the samples of b, of the shape of the values; None unless asked for.
        p_values: Share of shuffles at least as alike as the values, the values themselves counted as one; likewise.
        interval: (2, layers of a, layers of b), lower and upper ends of the 95 % jackknife interval; likewise.
    """

    values: np.ndarray
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    index: str
    convention: Mapping[str, Any]
    distance: bool = False
    null_mean: np.ndarray | None = None
    p_values: np.ndarray | None = None
    interval: np.ndarray | None = None

    @property
    def label(self) -> str:
        """Name of the index as it is written: "CKA", "minibatch CKA", "procrustes"."""
        return " ".join(word.upper() if word in _ABBREVIATIONS else word for word in self.index.split("_"))

    def nearest_layers(self) -> tuple[str, ...]:
        """Name, for each layer of a, the layer of b that is most like it.

        Raises:
            DataError: A row holds no number.
        """
        undefined = np.isnan(self.values).all(1)
        if undefined.any():
            raise DataError(f"layer {self.layers_a[int(undefined.argmax())]!r} is undefined beside every layer of b")
        best = np.nanargmin(self.values, 1) if self.distance else np.nanargmax(self.values, 1)
        return tuple(self.layers_b[column] for column in best)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw a heat map: layers of b along x, of a along y, the first ones at the lower left.

        Where p-values are there, a cross marks what chance would give (p > 0.05).

        Args:
            ax: Where to draw. Default: a new figure, sized for the layer names.

        Returns:
            The axes.
        """
        from .pictures import layer_map

        return layer_map(self, ax)

    def to_dict(self) -> dict[str, Any]:
        """Give the content as plain lists and strings for JSON; NaN, which JSON lacks, becomes None."""
        content = {
            "values": _plain(self.values),
            "layers_a": list(self.layers_a),
            "layers_b": list(self.layers_b),
            "index": self.index,
            "convention": dict(self.convention),
            "distance": self.distance,
        }
        for name in ("null_mean", "p_values", "interval"):
            if getattr(self, name) is not None:
                content[name] = _plain(getattr(self, name))
        return content


def _plain(values: np.ndarray) -> Any:
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [None if math.isnan(value) else value for value in values.tolist()]
