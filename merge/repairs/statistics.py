"""Mean and standard deviation of the units of networks: the targets of a repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...base.batch_norm import batch_norms
from ...base.calibration import Site, Statistics, run_batch, watching
from ...base.held import Held
from ...base.progress import progress as progress_bar
from .finding import unit_sites
from .sites import UnitSite


@dataclass(frozen=True)
class UnitStatistics:
    """Mean and standard deviation of each unit of each layer that ran, by the layer's name, in order.

    Attributes:
        mean: Layer → (units,), float64.
        std: Layer → (units,), float64.
        last: The layer that ran last: the logits.
        normed: Layers whose output went straight into a batch norm with running statistics.
    """

    mean: Mapping[str, Tensor] = field(repr=False)
    std: Mapping[str, Tensor] = field(repr=False)
    last: str = ""
    normed: frozenset[str] = frozenset()

    @classmethod
    def blend(cls, parts: Sequence[UnitStatistics], shares: Sequence[float]) -> UnitStatistics:
        """Give the targets of REPAIR: the weighted means of the means and of the standard deviations."""

        def blended(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {
                name: torch.stack([share * each[name].to(one) for share, each in zip(shares, values, strict=True)]).sum(
                    0
                )
                for name, one in values[0].items()
            }

        first = parts[0]
        return cls(blended([p.mean for p in parts]), blended([p.std for p in parts]), first.last, first.normed)


def measure(
    models: Sequence[nn.Module], data: Held, show: bool | None = None, batch_norm_outputs: bool = False
) -> list[UnitStatistics]:
    """Measure the units of networks, side by side in one reading of the data.

    Args:
        models: On one device.
        data: Batches of inputs.
        show: Show a bar always (True), never (False), or on a terminal (None).
        batch_norm_outputs: Measure the outputs of batch norms with running statistics as well.
    """
    watched = [(model, _watched(model, batch_norm_outputs)) for model in models]
    with ExitStack() as stack:
        for model, sites in watched:
            stack.enter_context(watching(model, sites))
        for batch in progress_bar(data, "unit statistics", show=show):
            for model, sites in watched:
                run_batch(model, sites, batch)
    return [_statistics(sites) for _, sites in watched]


def _watched(model: nn.Module, batch_norm_outputs: bool) -> list[Site]:
    sites = unit_sites(model, batch_norm_outputs)
    return [*sites, *(_Reader(name, norm, sites) for name, norm in batch_norms(model).items())]


def _statistics(sites: Sequence[Site]) -> UnitStatistics:
    ran = sorted((site for site in sites if isinstance(site, UnitSite) and site.calls), key=lambda site: site.first)
    return UnitStatistics(
        {site.name: site.found.average for site in ran},
        {site.name: site.found.variance().sqrt() for site in ran},
        max(ran, key=lambda site: site.latest).name if ran else "",
        frozenset(site.name for site in ran if site.normed),
    )


class _Reader(Site):
    """Sees whose output a batch norm reads, without an operator between."""

    def __init__(self, name: str, module: nn.Module, sites: Sequence[UnitSite]) -> None:
        super().__init__(name, module)
        self.sites = sites

    def attach(self) -> RemovableHandle:
        """Look for the input among the latest outputs."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = args[0] if args else next(iter(kwargs.values()))
            for site in self.sites:
                site.normed |= site.given is not None and site.given() is values

        return self.module.register_forward_pre_hook(hook, with_kwargs=True)

    def samples(self, values: Tensor) -> Tensor:
        """Is not asked for."""
        return values

    def settle(self, found: Statistics) -> None:
        """Set nothing."""

    def error(self, found: Statistics) -> float:
        """Be right."""
        return 0.0

    def tensors(self) -> list[Tensor]:
        """Own nothing."""
        return []
