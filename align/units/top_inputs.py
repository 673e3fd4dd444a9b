"""The inputs that drive each unit of a layer most, from one pass over the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.batches import Batch, Data, batches, model_device
from ...base.errors import DataError, nearest
from ...base.progress import progress as progress_bar
from ...base.running import evaluating, on_device
from ...metrics.capture import as_mask, as_samples, capture, masks
from ...metrics.reading import MASK, batch_count, without_fast_path
from .watching import Place, as_units, check_count, place_of


@dataclass(frozen=True, eq=False)
class TopInputs:
    """The inputs with the largest (or the least) activation of each of some units; all tensors are on the CPU.

    Attributes:
        layer: Name of the layer, as captured.
        units: (m,) int64, the units asked for.
        values: (m, k) in float64, the activations, best first; k is the `count` asked for, or the number of samples
            where that is less.
        indices: (m, k) int64, which samples, counted from 0 in the order of the data.
        positions: (m, k, d) int64, where in the feature map, or at which token, the activation is; d = 0 for a layer
            without places.
        spatial: Numbers of places along each axis in the first batch.
        samples: How many samples the data held.
        largest: Whether these are the largest activations, or the least.
        constant: Units, of those asked for, that took one value at all places of all samples: which inputs stand
            for them says nothing.
        kept: The inputs themselves by sample, each once.
    """

    layer: str
    units: Tensor
    values: Tensor
    indices: Tensor
    positions: Tensor
    spatial: tuple[int, ...]
    samples: int
    largest: bool
    constant: tuple[int, ...]
    kept: dict[int, Tensor]

    def __repr__(self) -> str:
        kind = "largest" if self.largest else "least"
        return (
            f"TopInputs({self.layer}: {self.values.shape[1]} {kind} of {len(self.units)} units; {self.samples} samples)"
        )

    def row(self, unit: int) -> int:
        """Give the place of a unit among those asked for.

        Raises:
            DataError: It was not asked for.
        """
        found = (self.units == unit).nonzero()
        if not len(found):
            asked = ", ".join(map(str, self.units[:12].tolist())) + (", …" if len(self.units) > 12 else "")
            raise DataError(f"unit {unit} of layer {self.layer!r} was not asked for; there are {asked}")
        return int(found[0])

    def inputs(self, unit: int) -> Tensor:
        """Give the inputs of one unit, best first.

        Args:
            unit: Its number in the layer.

        Returns:
            (k, …) as they were in the batches.

        Raises:
            DataError: The unit was not asked for, or its inputs differ in shape.
        """
        found = [self.kept[index] for index in self.indices[self.row(unit)].tolist()]
        shapes = sorted({tuple(x.shape) for x in found})
        if len(shapes) > 1:
            raise DataError(f"the inputs of unit {unit} have shapes {shapes[0]} and {shapes[1]}; take each from `kept`")
        return torch.stack(found)


def top_inputs(
    model: nn.Module,
    data: Data,
    layer: str,
    *,
    units: Any = None,
    count: int = 9,
    largest: bool = True,
    inputs: str | None = None,
    unit_axis: int | None = None,
    mask: str | None = MASK,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> TopInputs:
    """Find the inputs that drive each unit most (Zeiler & Fergus 2014; Li et al. 2015, Figure 2).

    One pass. Where a unit has many places, as on a feature map or over tokens, its activation for a sample is the
    largest (the least) over the places, and the first place that has it is given; each sample counts once. Of equal
    activations the sample that comes first wins. Held in memory are the inputs that win so far, each once, hence at
    most units x count of them.

    Args:
        model: The network; it runs in evaluation mode and comes back as it was.
        data: Batches: `x`, `(x, y)` or mappings of keyword inputs; one tensor is one batch.
        layer: Name of the layer, as for `capture`; of several outputs the first of samples x units.
        units: Which units. Default: all.
        count: How many inputs for each unit; of fewer samples, all are given.
        largest: The largest activations; False for the least.
        inputs: Name of the keyword input to keep. Default: the first input.
        unit_axis: The axis of the units. Default: as `unit_axes` tells it.
        mask: Name of the input, (N, tokens), that is 0 for padding, whose tokens are passed over. Default:
            "attention_mask" where a batch holds it.
        device: Where to run; a network that is elsewhere is copied. Default: where it is.
        progress: Show a bar. Default: on a terminal.

    Raises:
        DataError: The data, the layer or an argument cannot be used.
        LayerNotFoundError: There is no such layer, or it was not called.
        NotFiniteError: An input or an activation holds NaN or infinity.

    >>> top = top_inputs(nn.Identity(), torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 5.0]]), "", count=2)
    >>> top.values.tolist(), top.indices.tolist()
    ([[3.0, 2.0], [5.0, 5.0]], [[1, 2], [0, 2]])
    >>> top.inputs(1)
    tensor([[1., 5.],
            [2., 5.]])
    """
    check_count("count", count, 1)
    asked = None if units is None else as_units(units)
    model = on_device(model, device)
    found: _Found | None = None
    place: Place | None = None
    shown = progress_bar(
        batches(data, model_device(model)), f"inputs of {layer or 'the model'}", batch_count(data), progress
    )
    with torch.no_grad(), evaluating(model), without_fast_path(), capture(model, layer, reuse=True) as activations:
        for batch in shown:
            batch.call(model)
            place = place or place_of(model, activations, layer, len(batch), unit_axis)
            values = _values(activations[place.key], place, batch, mask, largest)
            found = found or _Found(values, asked, count, largest, place.key)
            found.add(values, batch, inputs)
    assert found is not None  # there is a batch, or an error
    return found.result()


def _values(activation: Tensor, place: Place, batch: Batch, mask: str | None, largest: bool) -> Tensor:
    """Read activations as (N, units, *places); padding can never win."""
    if mask is not None and (mask in batch.kwargs or mask != MASK):
        if mask not in batch.kwargs:
            raise DataError(f"a batch has no mask {mask!r}{nearest(mask, batch.kwargs)}; a mask is an input by keyword")
        real = as_mask(batch.kwargs[mask], len(batch), f"the mask {mask!r}")
        if masks(real, activation, place.axis) and activation.ndim == 3:
            rows = as_samples(activation, unit_axis=place.axis, mask=real, name=place.key)
            values = rows.new_full((*real.shape, rows.shape[1]), -torch.inf if largest else torch.inf)
            values[real] = rows
            return values.movedim(-1, 1)
    rows = as_samples(activation, unit_axis=place.axis, name=place.key)
    if len(activation) != len(batch):
        raise DataError(
            f"layer {place.key!r} has shape {tuple(activation.shape)} for {len(batch)} samples, although its first "
            "axis was that of the samples before"
        )
    sizes = [size for axis, size in enumerate(activation.shape) if axis != place.axis]
    return rows.reshape(*sizes, rows.shape[-1]).movedim(-1, 1)


class _Found:
    """The best so far."""

    def __init__(self, values: Tensor, units: Tensor | None, count: int, largest: bool, layer: str) -> None:
        units = torch.arange(values.shape[1]) if units is None else as_units(units, values.shape[1], layer)
        self.units, self.count, self.largest, self.layer = units, count, largest, layer
        self.all = values.shape[1]
        self.spatial = tuple(values.shape[2:])
        m, device = len(units), values.device
        self.values = values.new_empty(m, 0)
        self.indices = torch.empty(m, 0, dtype=torch.int64, device=device)
        self.positions = torch.empty(m, 0, len(self.spatial), dtype=torch.int64, device=device)
        self.low, self.high = values.new_full((m,), torch.inf), values.new_full((m,), -torch.inf)
        self.kept: dict[int, Tensor] = {}
        self.samples = 0

    def add(self, values: Tensor, batch: Batch, inputs: str | None) -> None:
        if values.shape[1] != self.all or values.ndim != len(self.spatial) + 2:
            raise DataError(
                f"layer {self.layer!r} has {values.shape[1]} units at {values.shape[2:].numel()} places, after batches "
                f"with {self.all} units and {len(self.spatial)} axes of places"
            )
        own = values[:, self.units.to(values.device)]
        flat = own.reshape(*own.shape[:2], -1)
        best, where = flat.max(2) if self.largest else flat.min(2)
        self._watch(flat)
        positions = _unravel(where.T, values.shape[2:])
        numbers = torch.arange(self.samples, self.samples + len(own), device=own.device).expand(len(self.units), -1)
        self.values = torch.cat([self.values, best.T], 1)
        # Stable, so that of equals the sample that came first stays first.
        order = self.values.sort(dim=1, descending=self.largest, stable=True).indices[:, : self.count]
        self.values = self.values.gather(1, order)
        self.indices = torch.cat([self.indices, numbers], 1).gather(1, order)
        places = torch.cat([self.positions, positions], 1)
        self.positions = places.gather(1, order[..., None].expand(-1, -1, places.shape[2]))
        self._keep(batch, inputs)
        self.samples += len(own)

    def _watch(self, flat: Tensor) -> None:
        low, high = flat.amin((0, 2)), flat.amax((0, 2))
        if not (low.isfinite().all() and high.isfinite().all()):  # of padding
            padding = flat.isinf()
            low = flat.masked_fill(padding, torch.inf).amin((0, 2))
            high = flat.masked_fill(padding, -torch.inf).amax((0, 2))
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def _keep(self, batch: Batch, name: str | None) -> None:
        won = set(self.indices.unique().tolist())
        self.kept = {index: x for index, x in self.kept.items() if index in won}
        inputs = _input_of(batch, name)
        for index in won - self.kept.keys():
            self.kept[index] = inputs[index - self.samples].to("cpu", copy=True)

    def result(self) -> TopInputs:
        constant = self.units[(self.low == self.high).cpu()].unique().tolist()
        values, indices, positions = (x.cpu() for x in (self.values, self.indices, self.positions))
        return TopInputs(
            layer=self.layer,
            units=self.units,
            values=values.to(torch.float64),
            indices=indices,
            positions=positions,
            spatial=self.spatial,
            samples=self.samples,
            largest=self.largest,
            constant=tuple(constant),
            kept=dict(sorted(self.kept.items())),
        )


def _input_of(batch: Batch, name: str | None) -> Tensor:
    if name is None:
        return next(x for x in batch.tensors() if x.ndim and len(x) == len(batch))
    value = batch.kwargs.get(name)
    if not isinstance(value, Tensor) or value.shape[:1] != (len(batch),):
        raise DataError(f"a batch has no input {name!r} of {len(batch)} samples{nearest(name, batch.kwargs)}")
    return value


def _unravel(flat: Tensor, sizes: torch.Size) -> Tensor:
    """Turn numbers of places, (m, n), into places, (m, n, d)."""
    axes: list[Tensor] = []
    for size in reversed(sizes):
        axes.append(flat % size)
        flat = flat // size
    return torch.stack(axes[::-1], -1) if axes else flat.new_empty(*flat.shape, 0)
