"""Many points measured in one reading of the data: affine combinations of a few networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...base.batches import Batch, Data, batches, model_device
from ...base.evaluation import Measure, Totals, by_sample
from ...base.interpolation import Span
from ...base.progress import progress as progress_bar
from .first_layer import FirstLayer
from .large_layers import large_layers

MEMORY = 2**28
"""How many bytes of data and of what is computed from it are held at once."""

# So many outputs are measured together; more would leave the cache.
_JOINED = 2**18


def measure_points(
    hull: Span,
    coefficients: Sequence[Sequence[float]],
    data: Data,
    measures: Sequence[Measure],
    memory: int = MEMORY,
    show: bool | None = None,
    what: str = "path",
) -> Totals:
    """Measure affine combinations of networks, reading the data once.

    Several batches are held at a time, so that weights are combined once for all of them; each batch runs by itself,
    as it came. Of the first layer, products are shared between points (`FirstLayer`).

    Args:
        hull: The networks, with a scratch network in evaluation mode.
        coefficients: For each point one number per network, adding up to one.
        data: Batches.
        measures: Functions (outputs, targets).
        memory: Bytes of data and of products that are held; one batch is held in any case.
        show: Show a bar always (True), never (False), or on a terminal (None).
        what: What the bar says.
    """
    totals = Totals.zeros(len(coefficients), len(measures))
    groups = grouped(batches(data, model_device(hull.model)), memory // 2, not lasting(data))
    shares = len(coefficients) > 1 + len(coefficients[0])  # else it would be more products, not fewer
    with torch.no_grad(), large_layers(hull.model), FirstLayer(hull, memory // 2 if shares else 0) as first:
        for point, group in progress_bar(_visits(groups, len(coefficients)), what, show=show):
            hull.move(coefficients[point])
            if point == 0:
                first.forget()
                totals.samples += sum(map(len, group))
            runs = _run(hull.model, group, coefficients[point], first)
            for outputs, batch in _joined(runs, measures):
                totals.note(point, outputs, batch, measures)
    return totals


def lasting(data: Data) -> bool:
    """Tell whether data lies in memory as a whole, so that nobody writes the next batch over the last."""
    return isinstance(data, (Tensor, Mapping, Batch, tuple, list))


def grouped(stream: Iterable[Batch], memory: int, copy: bool) -> Iterator[list[Batch]]:
    """Gather batches in lists of at most so many bytes, or of one batch.

    Args:
        stream: Batches.
        memory: Bytes.
        copy: Copy them: whoever makes them may fill the same tensor again and again.
    """
    held: list[Batch] = []
    size = 0
    for batch in stream:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in batch.tensors())
        if held and size + needed > memory:
            yield held
            held, size = [], 0
        held.append(_copied(batch) if copy else batch)
        size += needed
    if held:
        yield held


def _visits(groups: Iterable[list[Batch]], points: int) -> Iterator[tuple[int, list[Batch]]]:
    for group in groups:
        for point in range(points):
            yield point, group


def _run(
    model: nn.Module, group: Sequence[Batch], coefficients: Sequence[float], first: FirstLayer
) -> Iterator[tuple[Any, Batch]]:
    for index, batch in enumerate(group):
        first.at(index, coefficients)
        yield batch.call(model), batch


def _joined(runs: Iterable[tuple[Any, Batch]], measures: Sequence[Measure]) -> Iterator[tuple[Any, Batch]]:
    """Join outputs of small batches, where all measures look at each sample by itself."""
    held: list[tuple[Any, Batch]] = []
    kind, size = None, 0
    for outputs, batch in runs:
        found = _kind(outputs, batch, measures)
        if held and (found is None or found != kind or size > _JOINED):
            yield _join(held)
            held, size = [], 0
        held.append((outputs, batch))
        kind, size = found, size + (0 if found is None else outputs.numel())
    if held:
        yield _join(held)


def _kind(outputs: Any, batch: Batch, measures: Sequence[Measure]) -> tuple[Any, ...] | None:
    """Tell what two batches must have in common to be joined; None: nothing would do."""
    parts = (outputs, batch.targets)
    if not all(type(part) is Tensor and part.ndim for part in parts) or not all(map(by_sample, measures)):
        return None
    return tuple((part.shape[1:], part.dtype) for part in parts if part is not None)


def _join(runs: Sequence[tuple[Any, Batch]]) -> tuple[Any, Batch]:
    if len(runs) == 1:
        return runs[0]
    outputs = torch.cat([outputs for outputs, _ in runs])
    targets = torch.cat([batch.targets for _, batch in runs if batch.targets is not None])
    return outputs, Batch((outputs,), targets=targets)


def _copied(batch: Batch) -> Batch:
    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    kwargs = {name: copy(value) for name, value in batch.kwargs.items()}
    return Batch(tuple(map(copy, batch.args)), kwargs, copy(batch.targets))
