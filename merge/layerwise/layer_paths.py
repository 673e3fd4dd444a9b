"""Layer-wise linear mode connectivity: the line between two networks in one layer, or in the first or last few."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from ...base.architecture import full_state
from ...base.batches import Data, batches, model_device, require_repeatable
from ...base.errors import DataError
from ...base.evaluation import Measure
from ...base.interpolation import segment
from ...base.progress import progress as progress_bar
from ...base.running import copied
from ..paths import Path, connect
from .order import layers_in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes

How = Literal["single", "prefix", "suffix"]
Base = Literal["a", "b", "midpoint"]

_BASES: dict[str, float] = {"a": 0.0, "b": 1.0, "midpoint": 0.5}


@dataclass(frozen=True, eq=False)
class LayerwisePaths:
    """Losses on the line between two networks in some of their layers, the others held.

    Attributes:
        layers: Names, in the order in which the network runs them.
        paths: One for each: on that layer ("single"), on all layers up to it ("prefix"), or from it on ("suffix").
        whole: The path between the two networks in all that they are.
        how: "single", "prefix" or "suffix".
        base: Whose the held parameters are: "a", "b" or "midpoint".
    """

    layers: tuple[str, ...]
    paths: tuple[Path, ...]
    whole: Path
    how: str
    base: str

    @property
    def barriers(self) -> np.ndarray:
        """Barrier of each path over the straight line between the losses of its own two ends; (layers,)."""
        return np.array([path.barrier for path in self.paths])

    @property
    def midpoint_barriers(self) -> np.ndarray:
        """Layer-wise barriers as Adilova et al. measure them; (layers,).

        The loss with the layer halfway, minus the mean of the losses of the two whole networks, which are not the ends
        of this path: unlike `barriers` it counts what a layer of the other network costs. Measured at the alpha nearest
        to 1/2, over (1 - alpha) L(a) + alpha L(b).
        """
        place = self.whole.midpoint
        alpha, loss = self.whole.alphas[place], self.whole.loss
        chord = (1 - alpha) * loss[0] + alpha * loss[-1]
        return np.array([path.midpoint_loss - chord for path in self.paths])

    @property
    def swap_costs(self) -> np.ndarray:
        """What the loss gains when the layers of each path are all exchanged; (layers,).

        Loss at the far end minus that of the base network: with base "a" the far end has the layers of b, with base
        "b" those of a. With base "midpoint": the loss with the layers of b minus that with the layers of a.
        """
        near, far = (-1, 0) if self.base == "b" else (0, -1)
        return np.array([float(path.loss[far] - path.loss[near]) for path in self.paths])

    def __repr__(self) -> str:
        worst = int(np.argmax(self.barriers))
        return (
            f"LayerwisePaths({self.how}, {len(self.layers)} layers, base {self.base}, largest barrier "
            f"{self.barriers[worst]:.4g} at {self.layers[worst]}, of the whole {self.whole.barrier:.4g})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw two bars for each layer, its barrier and its midpoint barrier, under the barrier of the whole.

        Args:
            ax: Where to draw; a new figure by default.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(figsize=(max(5.0, 0.4 * len(self.layers)), 4.0))[1]
        places = np.arange(len(self.layers))
        ax.bar(places - 0.2, self.barriers, 0.4, label="over the line between its ends")
        ax.bar(places + 0.2, self.midpoint_barriers, 0.4, label="halfway, over the mean of the networks")
        ax.axhline(self.whole.barrier, color="black", linestyle="--", label="all layers together")
        names = {"single": "{}", "prefix": "… {}", "suffix": "{} …"}[self.how]
        ax.set_xticks(places, [names.format(layer) for layer in self.layers], rotation=90)
        ax.set_ylabel("loss barrier")
        ax.legend(framealpha=0.5)
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give the whole as numbers, lists and text; NaN and infinity stay what they are."""
        costs, over = self.swap_costs, self.midpoint_barriers
        rows = [
            {"layer": layer, "midpoint_barrier": float(above), "swap_cost": float(cost), **path.to_dict()}
            for layer, path, cost, above in zip(self.layers, self.paths, costs, over, strict=True)
        ]
        return {"how": self.how, "base": self.base, "layers": rows, "whole": self.whole.to_dict()}


def layerwise_paths(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    layers: str | Iterable[str] | None = None,
    how: How = "single",
    *,
    base: Base = "a",
    points: int = 11,
    repair: str | None = None,
    metric: Measure | None = None,
    loss: Measure | None = None,
    repair_data: Data | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> LayerwisePaths:
    """Measure the loss along the line between two networks in one layer at a time (Adilova et al., ICLR 2024).

    Parameters and buffers of a layer go from those of a (alpha = 0) to those of b (alpha = 1), while all others are
    held. With base "a" the ends are a itself, and a with that layer of b. Prefixes and suffixes of the layers, in the
    order in which the network runs them, show which part can be exchanged at no cost. Neither network is changed.

    Batch normalisation is a layer of its own by default, so that a convolution alone moves away from the statistics
    that its norm keeps; name blocks in `layers` to move both, or repair.

    Args:
        model_a: The network at alpha = 0.
        model_b: The network at alpha = 1, of the same architecture; its units in the order of `model_a`, as `match`
            leaves them.
        data: Batches with labels, to measure on; read once for each layer and twice more.
        layers: Names as in `model.named_modules()`; a block moves as one. Default: every module with parameters or
            saved statistics of its own. What belongs to none of the layers is always held.
        how: "single": one layer at a time; "prefix": all layers up to it; "suffix": from it on.
        base: Whose the held parameters are: "a", "b", or "midpoint" for their mean.
        points: Points on each path; see `connect`, also for the other arguments.
        repair: None, or how to repair each point between the ends.
        metric: Function (outputs, targets) → mean over the batch.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        repair_data: Batches to repair on; `data` by default.
        device: Where to compute; that of `model_a` by default.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        A path for each layer, with its barriers: over the line between the losses of its own ends (`barriers`), and, as
        in the paper, over the mean loss of the two networks (`midpoint_barriers`).

    Raises:
        ArchitectureError: The networks differ in a name or shape, or the repair does not fit them.
        DataError: An argument is out of range, a layer has no parameters, or the data does not fit.
        LayerNotFoundError: There is no such layer.
        NotFiniteError: A network or an input holds NaN or infinity.

    >>> _ = torch.manual_seed(0)
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    >>> data = [(torch.randn(16, 4), torch.arange(16) % 3)]
    >>> found = layerwise_paths(a, b, data, how="prefix", points=3)
    >>> found.layers
    ('0', '2')
    >>> bool(found.paths[-1].loss[-1] == found.whole.loss[-1])  # with all layers of b it is b
    True
    """
    for name, value, known in (("how", how, get_args(How)), ("base", base, get_args(Base))):
        if value not in known:
            raise DataError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    require_repeatable(data, "it is read once for each layer")
    line = segment(model_a, model_b, device)
    first = next(batches(data, model_device(line.model)))
    groups = layers_in_order(line.model, first, layers)
    options: dict[str, Any] = {
        **{"points": points, "repair": repair, "metric": metric, "loss": loss, "repair_data": repair_data},
        **{"device": device, "progress": progress},
    }
    whole = connect(model_a, model_b, data, **options)
    # Held parameters come from here; `line` itself goes on to lend its ends.
    held = copied(line.move(_BASES[base]))
    paths = []
    for tensors in progress_bar(_chosen(list(groups.values()), how), "layers", show=progress):
        near, far = (_hybrid(held, line.move(alpha), tensors) for alpha in (0.0, 1.0))
        paths.append(connect(near, far, data, **options))
    return LayerwisePaths(tuple(groups), tuple(paths), whole, how, base)


def _chosen(groups: Sequence[Sequence[str]], how: str) -> list[list[str]]:
    spans = {
        "single": lambda i: groups[i : i + 1],
        "prefix": lambda i: groups[: i + 1],
        "suffix": lambda i: groups[i:],
    }[how]
    return [[tensor for group in spans(index) for tensor in group] for index in range(len(groups))]


def _hybrid(held: nn.Module, donor: nn.Module, tensors: Iterable[str]) -> nn.Module:
    hybrid = copied(held)
    places, values = full_state(hybrid), full_state(donor)
    with torch.no_grad():
        for name in tensors:
            places[name].copy_(values[name])
    return hybrid
