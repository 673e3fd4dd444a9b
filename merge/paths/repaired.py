"""Points between networks that are repaired before they are measured: a pass over the data for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...base.batch_norm import batch_norms
from ...base.batches import Batch, Data, batches, model_device
from ...base.evaluation import Measure, Totals
from ...base.interpolation import Span
from ...base.progress import progress as progress_bar
from ..repairs import Prepared, prepare
from .measuring import MEMORY, grouped, lasting


@dataclass(frozen=True)
class Repaired:
    """Points of an affine space, each repaired on the same data.

    Attributes:
        hull: The networks, with a scratch network in evaluation mode.
        parents: The networks, on the device of the scratch network.
        method: "reset", "rescale" or "both".
        progress: Show a bar always (True), never (False), or on a terminal (None).
        memory: How many bytes of each source of data may be held, so that it is read once.
    """

    hull: Span
    parents: Sequence[nn.Module]
    method: str
    progress: bool | None = None
    memory: int = MEMORY

    def measure(
        self,
        coefficients: Sequence[Sequence[float]],
        sources: Mapping[str, Data],
        calibration: Data | None,
        measures: Sequence[Measure],
        what: str = "path",
    ) -> dict[str, list[Totals]]:
        """Measure each point on each source of data; the networks themselves are not repaired.

        Args:
            coefficients: For each point one number per network, adding up to one.
            sources: Data by name.
            calibration: Batches to repair on; the first source by default.
            measures: Functions (outputs, targets).
            what: What the bar says.

        Returns:
            For each source what was measured at each point.
        """
        prepared: Prepared | None = None
        sources = {name: held(data, self.memory) for name, data in sources.items()}
        data = next(iter(sources.values())) if calibration is None else calibration
        found: dict[str, list[Totals]] = {name: [] for name in sources}
        for row in progress_bar(coefficients, what, show=self.progress):
            between = max(row) != 1
            if between and prepared is None:  # not before data without labels has failed at the first network
                prepared = prepare(self.parents, data, self.method, self.progress)
            model = self.hull.move(row)
            for norm in batch_norms(model).values():
                if between and norm.running_var is not None:
                    norm.running_var.clamp_(min=0)  # negative outside of the networks, and to be measured anew
            if between and prepared is not None:
                prepared.apply(model, row)
            model.eval()
            for name, source in sources.items():
                found[name].append(_measured(model, source, measures))
        return found


def held(data: Data, memory: int) -> Data:
    """Read data once and for all if it is no more than so many bytes; else give it back as it is."""
    if lasting(data):
        return data
    groups = grouped(batches(data), memory, copy=True)
    first = next(groups)
    return data if next(groups, None) is not None else first


@torch.no_grad()
def _measured(model: nn.Module, data: Data, measures: Sequence[Measure]) -> Totals:
    totals = Totals.zeros(1, len(measures))
    for batch in batches(data, model_device(model)):
        totals.add(0, model, batch, measures)
        totals.samples += len(batch)
        totals.order.append(_fingerprint(batch))
    return totals


def _fingerprint(batch: Batch) -> float:
    """Give a number by which a batch is known again, if its samples come in the same order."""
    total = 0.0
    for tensor in (*batch.tensors(), batch.targets):
        if isinstance(tensor, Tensor):
            rows = tensor.detach().reshape(len(batch), -1).to("cpu", torch.float64).sum(1)
            total += float(rows @ torch.arange(1, len(batch) + 1, dtype=torch.float64))
    return total
