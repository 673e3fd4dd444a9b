"""How far the units of a network are from those of its parents: the collapse of their variance, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...base.batches import Data
from ...base.errors import ArchitectureError
from ...base.held import MEMORY, Held
from ...base.running import on_device
from .repair import check_endpoints
from .statistics import UnitStatistics, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class VarianceRatios:
    """Statistics of the units of a network beside those that its parents' units have, layer by layer.

    Attributes:
        layers: Names, in the order in which they run.
        ratio: Mean variance of a layer's units over that of their targets, (layers,), float64; 1 where all is as in
            the parents, towards 0 where the variance collapses; NaN where the target does not vary.
        unit_ratio: Layer → variance of each unit over that of its target, (units,), float64; NaN likewise.
        deviation: Largest difference of a mean or a standard deviation from its target, in standard deviations of the
            target, (layers,), float64. Where units cannot be shifted or the layer is left alone, no repair removes it.
    """

    layers: tuple[str, ...]
    ratio: np.ndarray
    unit_ratio: Mapping[str, np.ndarray] = field(repr=False)
    deviation: np.ndarray

    def plot(self, ax: Axes | None = None, label: str | None = None) -> Axes:
        """Draw the ratio layer by layer: Figure 2 of the paper.

        Args:
            ax: Where to draw; a new figure by default.
            label: For the legend.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        places = range(len(self.layers))
        ax.plot(places, self.ratio, marker="o", markersize=3, label=label)
        ax.axhline(1, color="grey", linewidth=0.5)
        ax.set_xticks(list(places), self.layers, rotation=90)
        ax.set_ylabel("variance of the units over that of the parents'")
        if label is not None:
            ax.legend()
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give layers, ratios and deviations as lists; NaN stays NaN."""
        return {"layers": list(self.layers), "ratio": self.ratio.tolist(), "deviation": self.deviation.tolist()}


def variance_ratios(
    model: nn.Module,
    endpoints: Sequence[nn.Module],
    data: Data,
    *,
    alpha: float = 0.5,
    weights: Sequence[float] | None = None,
    memory: int = MEMORY,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> VarianceRatios:
    """Compare the variance of a network's units with that of its parents' units (Jordan et al. 2023, §3.1).

    The target of a unit is the weighted mean of its standard deviations in the parents, squared. Layers are those that
    `repair` knows, and batch norms; a layer that a batch norm reads directly is left out, for there the variance is the
    batch norm's to set.

    Args:
        model: Between the parents, repaired or not.
        endpoints: The parents, with their units in the order of `model`.
        data: Batches of inputs; read once.
        alpha: For two endpoints: the place of `model` on the line between them.
        weights: Instead of `alpha`: one weight for each endpoint.
        memory: Bytes of inputs to keep.
        device: Where to compute; that of `model` by default.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        The ratios, from the first layer to the logits.

    Raises:
        ArchitectureError: An endpoint has other parameters, or there is nothing to compare.
        DataError: There is no batch; or `alpha` or `weights` is not valid.
        NotFiniteError: An input or an activation is NaN or infinite.

    >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> _ = nn.init.constant_(a.weight, 1.0), nn.init.constant_(b.weight, 3.0)
    >>> found = variance_ratios(a, (a, b), torch.tensor([[0.0], [1.0]]))
    >>> found.layers, found.ratio.round(4).tolist()  # a variance of 1/4 where the mean deviation is 1
    (('',), [0.25])
    """
    shares = check_endpoints(model, endpoints, alpha, weights)
    networks = [on_device(each, device) for each in (model, *endpoints)]
    found, *parents = measure(networks, Held(data, memory), progress, batch_norm_outputs=True)
    target = UnitStatistics.blend(parents, shares)
    layers = [name for name in found.mean if name in target.mean and name not in target.normed]
    if not layers:
        raise ArchitectureError(f"{type(model).__name__} runs no layer whose units could be compared")
    ratio = {name: _over(found.std[name].square(), target.std[name].square()) for name in layers}
    total = [_over(found.std[name].square().mean(), target.std[name].square().mean()) for name in layers]
    return VarianceRatios(
        tuple(layers),
        np.array([float(each) for each in total]),
        {name: values.cpu().numpy() for name, values in ratio.items()},
        np.array([_deviation(found, target, name) for name in layers]),
    )


def _over(values: Tensor, wanted: Tensor) -> Tensor:
    return torch.where(wanted > 0, values / wanted, torch.nan)


def _deviation(found: UnitStatistics, target: UnitStatistics, name: str) -> float:
    std = target.std[name]
    off = torch.maximum((found.std[name] - std).abs(), (found.mean[name] - target.mean[name]).abs()) / std
    off = off[std > 0]
    return float(off.max()) if len(off) else 0.0
