"""Layerwise linear feature connectivity of two networks, as measured on data (Zhou et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...base.batches import Data, require_repeatable
from ...base.errors import DataError
from ...base.interpolation import segment
from ...base.running import copied, on_device
from ...metrics.capture import Positions, check_positions
from ...metrics.reading import Layers, one_side
from ..repairs import choose_method, prepare
from .cosines import Overlap
from .feature_pass import LayerTotals, Pair, measure_features

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Features in single precision that are equal but for rounding are some 1e-14 to 1e-12 apart.
_ROUNDING = 1e-9

_CURVES = {
    "endpoint_distance": "between the networks",
    "cosine_distance": "from the mean of the features",
    "weak_additivity": "weak additivity",
    "commutativity": "commutativity",
}


@dataclass(frozen=True, eq=False)
class FeatureConnectivity:
    """How linear the features of two networks are on the line between them, layer by layer.

    Arrays have one entry per layer, (layers,); those that depend on alpha are (alphas, layers) if several were asked
    for. Each distance is 1 - cosine, from 0 to 2. NaN stands where a layer is not of the kind that is measured.

    Attributes:
        layers: Names, in execution order; `relu#2` is the second call.
        alpha: The place or places on the line, 0 for the first network and 1 for the second.
        cosine_distance: Mean of 1 - cos(f_alpha, (1 - alpha) f_a + alpha f_b).
        coefficient: The c of c f_alpha = (1 - alpha) f_a + alpha f_b, by least squares over all samples at once.
        relative_error: Norm of f_alpha - (1 - alpha) f_a - alpha f_b over all samples, over that of the mixture: c = 1.
        endpoint_distance: Mean of 1 - cos(f_a, f_b), to compare `cosine_distance` with.
        weak_additivity: At each activation module, the mean of 1 - cos(σ((1 - alpha) h_a + alpha h_b),
            (1 - alpha) σ(h_a) + alpha σ(h_b)).
        commutativity: At each linear or convolutional module, 1 - cos(vec(W_a H_a + W_b H_b), vec(W_a H_b + W_b H_a))
            over all samples at once, without biases.
        weight_distance: There, 1 - cos(vec W_a, vec W_b), to compare `commutativity` with.
        input_distance: There, 1 - cos(vec H_a, vec H_b) over all samples at once; likewise.
        samples: How many inputs were seen.
        positions: How places of feature maps and tokens were read.
        repair: How the networks between were repaired, or None.
    """

    layers: tuple[str, ...]
    alpha: float | tuple[float, ...]
    cosine_distance: np.ndarray
    coefficient: np.ndarray
    relative_error: np.ndarray
    endpoint_distance: np.ndarray
    weak_additivity: np.ndarray
    commutativity: np.ndarray
    weight_distance: np.ndarray
    input_distance: np.ndarray
    samples: int
    positions: str
    repair: str | None

    def __repr__(self) -> str:
        worst = int(np.atleast_2d(self.cosine_distance).max(0).argmax())
        return (
            f"FeatureConnectivity({len(self.layers)} layers, {self.samples} samples, alpha {self.alpha}, "
            f"largest distance {self.cosine_distance.max():.3g} at {self.layers[worst]})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the distances by layer, on a logarithmic scale; those of rounding, below 1e-9, are left out.

        Args:
            ax: Where to draw; a new figure by default.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(figsize=(max(5.0, 0.35 * len(self.layers)), 4.0))[1]
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        positive = False
        for name, label in _CURVES.items():
            values = getattr(self, name)
            several = values.ndim == 2
            for row, alpha in zip(np.atleast_2d(values), alphas if several else alphas[:1], strict=True):
                drawn = np.where(row > _ROUNDING, row, np.nan)
                there = ~np.isnan(drawn)
                if there.any():
                    positive = True
                    places = np.arange(len(self.layers))[there]
                    ax.plot(
                        places,
                        drawn[there],
                        marker="o",
                        markersize=3,
                        label=f"{label}, {alpha:g}" if several else label,
                    )
        if positive:
            ax.set_yscale("log")
            ax.legend()
        ax.set_xticks(range(len(self.layers)), self.layers, rotation=90)
        ax.set_ylabel("1 - cosine")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give the whole as numbers, lists and text: a row per layer, without what is not measured there."""
        names = [
            *("cosine_distance", "coefficient", "relative_error", "endpoint_distance", "weak_additivity"),
            *("commutativity", "weight_distance", "input_distance"),
        ]
        rows = []
        for index, layer in enumerate(self.layers):
            found = {name: getattr(self, name)[..., index].tolist() for name in names}
            rows.append({"layer": layer, **{name: value for name, value in found.items() if not _missing(value)}})
        return {
            "alpha": list(self.alpha) if isinstance(self.alpha, tuple) else self.alpha,
            "layers": rows,
            "samples": self.samples,
            "positions": self.positions,
            "repair": self.repair,
        }


def feature_connectivity(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    alpha: float | Sequence[float] = 0.5,
    layers: Layers = None,
    positions: Positions = "features",
    mask: str | None = "attention_mask",
    repair: str | None = None,
    repair_data: Data | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> FeatureConnectivity:
    """Measure layerwise linear feature connectivity and its two conditions (Zhou et al., NeurIPS 2023).

    Two networks have it if, in every layer, the features of the network at alpha are proportional to the mixture of
    their own: c f_alpha = (1 - alpha) f_a + alpha f_b (Definition 2; the paper's alpha is the share of the first
    network). It follows from two conditions, with c = 1: activations that are additive between the two (Definition 3),
    and weights that commute with the features of either (Definition 4, Theorem 1). All are measured in one pass over
    the data, in which the networks run side by side in evaluation mode: what is held is the activations of one batch,
    those of all layers and networks, so that smaller batches take less memory. Neither network is changed.

    The first layer sees the same input in both networks, so that its commutativity is exactly 0. Activations that a
    network applies as functions instead of modules cannot be seen; nor are biases part of commutativity.

    Args:
        model_a: The network at 0.
        model_b: The network at 1, of the same architecture; its units in the order of `model_a`, as `match` leaves
            them.
        data: Batches; labels are not read.
        alpha: The place on the line, or several; in [0, 1]. Each takes a copy of the network.
        layers: Names as in `model.named_modules()`. Default: all modules without children, but for those that only pass
            data on: linear and convolutional ones give features before an activation, activation modules after.
        positions: Places of a feature map and tokens are flattened into the features of their sample ("features", as in
            the paper), are samples of their own ("samples"), or are averaged ("mean").
        mask: Name of the input, (N, tokens) of 0 and 1, that is 0 for padding, where batches hold it: padding is left
            out. It needs `positions` "samples" or "mean". None: padding counts.
        repair: None, or how to repair the networks between, such as "auto"; see `repair`.
        repair_data: Batches to repair on; `data` by default.
        device: Where to compute; that of `model_a` by default.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        Distances by layer.

    Raises:
        ArchitectureError: The networks differ in a name or shape, or the repair does not fit them.
        DataError: An argument is out of range, or the data is empty or cannot be read.
        LayerNotFoundError: There is no such layer, or it did not run.
        NotFiniteError: A network, an input or an activation holds NaN or infinity.

    >>> _ = torch.manual_seed(0)
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    >>> found = feature_connectivity(a, b, torch.randn(16, 4))
    >>> found.layers
    ('0', '1', '2')
    >>> found.cosine_distance.round(3)  # the first layer is linear in its weights
    array([0.   , 0.091, 0.061])
    """
    alphas = _alphas(alpha)
    check_positions(positions)
    method = None if repair is None else choose_method(model_a, repair)
    calibration = data if repair_data is None else repair_data
    if method is not None:
        require_repeatable(calibration, "networks are repaired in passes of their own")
    a = on_device(model_a, device)
    line = segment(a, model_b)
    b = copied(a) if model_b is model_a else on_device(model_b, device)
    between = tuple(copied(line.move(place)) for place in alphas)
    if method is not None:
        prepared = prepare((a, b), calibration, method, progress)
        for place, model in zip(alphas, between, strict=True):
            if 0 < place < 1:
                prepared.apply(model, (1 - place, place))
    pair = Pair(one_side(a, layers), b, alphas, between)
    totals, samples = measure_features(pair, data, positions, mask, progress)
    arrays = _arrays(totals, pair, scalar=not isinstance(alpha, Sequence))
    given = tuple(alphas) if isinstance(alpha, Sequence) else alphas[0]
    return FeatureConnectivity(tuple(totals), given, **arrays, samples=samples, positions=positions, repair=method)


def _alphas(alpha: float | Sequence[float]) -> tuple[float, ...]:
    values = tuple(alpha) if isinstance(alpha, Sequence) else (alpha,)
    for value in values:
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise DataError(f"alpha is {value!r}; expected a number from 0, the first network, to 1, the second")
    if not values:
        raise DataError("alpha is empty; pass at least one place on the line, such as 0.5")
    return tuple(float(value) for value in values)


def _arrays(totals: dict[str, LayerTotals], pair: Pair, scalar: bool) -> dict[str, np.ndarray]:
    nothing = [math.nan] * len(pair.alphas)
    found = list(totals.values())
    by_alpha = {
        "cosine_distance": [[part / layer.rows for part in layer.distances] for layer in found],
        "coefficient": [[part.coefficient for part in layer.between] for layer in found],
        "relative_error": [[part.relative_error for part in layer.between] for layer in found],
        "weak_additivity": [
            nothing if layer.additivity is None else [part / layer.rows for part in layer.additivity] for layer in found
        ],
    }
    arrays = {name: np.array(values).T for name, values in by_alpha.items()}
    arrays = {name: values[0] if scalar else values for name, values in arrays.items()}
    linear = {name: layer for name, layer in totals.items() if layer.commutativity is not None}
    at_linear = {
        "commutativity": {name: layer.commutativity.distance for name, layer in linear.items() if layer.commutativity},
        "weight_distance": {name: _weight_distance(pair, name) for name in linear},
        "input_distance": {name: layer.inputs.distance for name, layer in linear.items()},
    }
    return {
        **arrays,
        "endpoint_distance": np.array([layer.endpoint / layer.rows for layer in found]),
        **{key: np.array([values.get(name, math.nan) for name in totals]) for key, values in at_linear.items()},
    }


def _weight_distance(pair: Pair, layer: str) -> float:
    name, overlap = layer.split("#", 1)[0], Overlap()
    a, b = (cast(Tensor, model.get_submodule(name).weight).detach() for model in (pair.a.model, pair.b))
    overlap.add(a.to("cpu", torch.float64), b.to("cpu", torch.float64), f"{name}.weight")
    return overlap.distance


def _missing(value: Any) -> bool:
    return all(math.isnan(part) for part in (value if isinstance(value, list) else [value]))
