"""A repair made ready for many networks between the same parents: what the parents show is measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ...base.batch_norm import reset_batch_norms
from ...base.batches import Data
from .repair import UnitStatistics, choose_method, rescale, unit_statistics


@dataclass(frozen=True)
class Prepared:
    """A method of repair and what it must know of the parents.

    Attributes:
        method: "reset" or "rescale".
        data: Batches to repair on.
        targets: Statistics of each parent, for "rescale".
        progress: Show bars; None: on a terminal.
    """

    method: str
    data: Data
    targets: tuple[UnitStatistics, ...]
    progress: bool | None = None

    def apply(self, model: nn.Module, shares: Sequence[float]) -> None:
        """Repair a network, in place.

        Args:
            model: Between the parents, on their device.
            shares: How much of it comes from each parent; they add up to one.
        """
        if self.method == "reset":
            reset_batch_norms(model, self.data, self.progress)
        else:
            rescale(model, self.data, UnitStatistics.blend(self.targets, shares), self.progress)


def prepare(parents: Sequence[nn.Module], data: Data, method: str = "auto", progress: bool | None = None) -> Prepared:
    """Measure the parents, as far as the method needs it.

    Args:
        parents: On the device of the networks to be repaired, their units in one order.
        data: Batches to repair on; read once for each parent if the method is "rescale".
        method: "auto", "reset" or "rescale"; see `repair`.
        progress: Show bars; None: on a terminal.

    Raises:
        ArchitectureError: The method does not fit the networks.
        DataError: There is no such method, or no batch.
    """
    method = choose_method(parents[0], method)
    measured = [unit_statistics(parent, data, progress) for parent in parents] if method == "rescale" else []
    return Prepared(method, data, tuple(measured), progress)
