"""A repair made ready for many networks between the same parents: what the parents show is measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ...base.batch_norm import batch_norm_sites, batch_norms, count_batches
from ...base.batches import Data
from ...base.calibration import Site, calibrate
from ...base.errors import ArchitectureError, DataError
from ...base.held import MEMORY, Held
from .finding import unit_sites
from .sites import UnitSite
from .statistics import UnitStatistics, measure

METHODS = ("auto", "reset", "rescale", "both")


@dataclass(frozen=True)
class Prepared:
    """A method of repair and what it must know of the parents.

    Attributes:
        method: "reset", "rescale" or "both".
        data: Batches to repair on, kept from the first reading as far as memory allows.
        targets: Statistics of each parent, for "rescale" and "both".
        progress: Show bars; None: on a terminal.
        logits: Whether the layer that runs last is rescaled as well.
    """

    method: str
    data: Held
    targets: tuple[UnitStatistics, ...]
    progress: bool | None = None
    logits: bool = False

    def apply(self, model: nn.Module, shares: Sequence[float]) -> None:
        """Repair a network, in place; after an error it is as it was.

        Args:
            model: Between the parents, on their device.
            shares: How much of it comes from each parent; they add up to one.
        """
        norms = [] if self.method == "rescale" else batch_norm_sites(model)
        sites: list[Site] = [*norms]
        if self.targets:
            sites += self._targeted(model, UnitStatistics.blend(self.targets, shares))
        calibrate(model, sites, self.data, show=self.progress, what="repairing")
        count_batches(norms, self.data)

    def _targeted(self, model: nn.Module, target: UnitStatistics) -> list[UnitSite]:
        names = set(target.mean) - (set() if self.logits else {target.last})
        if self.method == "both":
            names -= target.normed  # resetting takes their mean and variance off again
        sites = [site for site in unit_sites(model) if site.name in names and not site.fixed]
        if not sites and self.method == "rescale":
            raise ArchitectureError(
                "this network runs no hidden linear or convolutional layer and no norm that could be rescaled; "
                "pass repair=None"
            )
        for site in sites:
            site.target = (target.mean[site.name], target.std[site.name])
        return sites


def prepare(
    parents: Sequence[nn.Module],
    data: Data,
    method: str = "auto",
    progress: bool | None = None,
    memory: int = MEMORY,
    logits: bool = False,
) -> Prepared:
    """Measure the parents, as far as the method needs it.

    Args:
        parents: On the device of the networks to be repaired, their units in one order.
        data: Batches to repair on; read once where the inputs fit into memory, all parents side by side.
        method: "auto", "reset", "rescale" or "both"; see `repair`.
        progress: Show bars; None: on a terminal.
        memory: Bytes of inputs to keep, and of activations that are alive at a time.
        logits: Rescale the layer that runs last as well.

    Raises:
        ArchitectureError: The method does not fit the networks.
        DataError: There is no such method, or no batch.
    """
    method = choose_method(parents[0], method)
    held = Held(data, memory)
    targets = () if method == "reset" else tuple(measure(parents, held, progress))
    return Prepared(method, held, targets, progress, logits)


def choose_method(model: nn.Module, method: str) -> str:
    """Settle `"auto"`, and check that the method fits the network.

    Raises:
        ArchitectureError: There is nothing in the network that the method could repair.
        DataError: There is no such method.
    """
    if method not in METHODS:
        raise DataError(f"repair method {method!r} is unknown; choose one of {', '.join(map(repr, METHODS))}")
    normed = len(batch_norms(model))
    if method in ("reset", "both") and not normed:
        raise ArchitectureError(
            f"method={method!r} needs a batch norm with running statistics, and this network has none; "
            "use method='rescale'"
        )
    if method == "reset":
        return method
    sites = [site for site in unit_sites(model) if not site.fixed]
    if method == "auto" and normed:
        # A batch norm for each layer but that of the logits leaves nothing to be rescaled.
        norms = sum(site.norm for site in sites)
        return "both" if norms or len(sites) > normed + 1 else "reset"
    if not sites:
        raise ArchitectureError(
            "this network has no linear or convolutional layer and no norm whose units could be rescaled"
        )
    return "rescale" if method == "auto" else method
