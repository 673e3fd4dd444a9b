"""Which part of the input can change a unit at one place of its feature map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import DataError
from .watching import Example, Watched, as_units, watching

_TRIALS = 4
_TOLERANCE = 1e-4
_BATCH = 32
_FEW = 64

Span = tuple[int, int]


@dataclass(frozen=True)
class Axis:
    """Receptive fields along one axis of the input.

    Attributes:
        size: Length of the input.
        places: Places of the layer along this axis.
        jump: How far the field moves from one place to the next; None where the fields do not move evenly, or too few
            of them lie inside the input to tell.
        start: Where the field of place 0 begins, below 0 if before the border; None where no field begins inside.
        stop: Where the field of place 0 ends (exclusive); None where no field ends inside.
        measured: Begin and end of what is seen of the input, by place, where it was measured.
    """

    size: int
    places: int
    jump: int | None
    start: int | None
    stop: int | None
    measured: dict[int, Span]

    def inside(self, place: int) -> Span:
        """Give begin and end of what is seen of the input: as measured, else the field cut at the border."""
        return self.measured.get(place) or self.cut(place)

    def cut(self, place: int) -> Span:
        """Give begin and end of a field, cut at the border."""
        start, stop = self.reaching(place)
        start = min(max(start, 0), self.size)
        return start, max(min(stop, self.size), start)

    def reaching(self, place: int) -> Span:
        """Give begin and end of a field, beyond the border where it is known how far."""
        known = self.measured.get(place, (0, self.size))
        if self.jump is None:
            return known
        start = known[0] if self.start is None else self.start + self.jump * place
        stop = known[1] if self.stop is None else self.stop + self.jump * place
        return start, stop


@dataclass(frozen=True)
class ReceptiveField:
    """The part of the input that can change a unit at one place.

    Attributes:
        layer: Name of the layer, as captured.
        position: The place in the feature map; () for a layer without places.
        axes: Fields along each axis of the input after that of its channels; none for inputs without such axes.
        traced: Whether it was found place by place. If not, the whole input was taken: the layer has no places along
            the axes of the input (linear layers after flattening, tokens of an image), or NaN cannot be followed there.
    """

    layer: str
    position: tuple[int, ...]
    axes: tuple[Axis, ...]
    traced: bool

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Lengths of the input's axes, such as (height, width)."""
        return tuple(axis.size for axis in self.axes)

    @property
    def box(self) -> tuple[int, ...]:
        """(top, left, height, width) in pixels, which may reach beyond the border into padding.

        How far it reaches is known where some places of the layer have their fields inside; else it ends at the border.
        (Where there are but three or four places, all of them at a border, it can reach farther than that tells.)
        For other numbers of axes: all the starts, then all the lengths.
        """
        return _box([axis.reaching(place) for axis, place in zip(self.axes, self._places, strict=True)])

    @property
    def clipped(self) -> tuple[int, ...]:
        """The smallest box that holds the pixels of the input that can change the unit.

        The box cut at the border, or less: a convolution may step over the last rows, a tap of a dilated kernel fall
        beyond the border. That is measured for the place asked for; at other places it is the box cut at the border.
        """
        return _box([axis.inside(place) for axis, place in zip(self.axes, self._places, strict=True)])

    @property
    def whole(self) -> bool:
        """Whether the box holds the whole input."""
        return self.clipped == (*(0 for _ in self.axes), *self.input_shape)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Per axis, how many pixels of the box lie before the border, and how many after the other one."""
        places = zip(self.axes, self._places, strict=True)
        return tuple(_beyond(axis.reaching(place), axis.cut(place)) for axis, place in places)

    @property
    def _places(self) -> tuple[int, ...]:
        return self.position if self.traced else (0,) * len(self.axes)

    def at(self, position: Sequence[int] | Tensor) -> ReceptiveField:
        """Give the field of the same layer at another place, without running the network.

        It is exact where the fields move evenly (`Axis.jump`); where that could not be told, and the place was not
        measured, the box is all of the axis.

        Raises:
            DataError: There is no such place.
        """
        numbers = tuple(position.tolist() if isinstance(position, Tensor) else position)
        if self.traced:
            _check_position(numbers, [axis.places for axis in self.axes], self.layer)
        return replace(self, position=numbers)

    def crop(self, inputs: Tensor, fill: float = 0.0) -> Tensor:
        """Cut the box out of inputs; what lies beyond the border is filled.

        Args:
            inputs: (…, channels, *input_shape), such as (N, 3, 32, 32) or (3, 32, 32).
            fill: The value beyond the border.

        Returns:
            (…, channels, height, width of the box).

        Raises:
            DataError: The inputs have another shape.
        """
        if not self.axes:
            return inputs
        count = len(self.axes)
        if inputs.ndim <= count or tuple(inputs.shape[-count:]) != self.input_shape:
            raise DataError(f"inputs of shape {tuple(inputs.shape)}; expected (…, channels, *{self.input_shape})")
        inside, room = [], []
        for axis, place, (before, _) in zip(self.axes, self._places, self.padding, strict=True):
            start, stop = axis.cut(place)
            inside.append(slice(start, stop))
            room.append(slice(before, before + stop - start))
        found = inputs.new_full((*inputs.shape[:-count], *self.box[count:]), fill)
        found[(..., *room)] = inputs[(..., *inside)]
        return found


def receptive_field(
    model: nn.Module,
    layer: str,
    example: Example,
    position: Sequence[int] | None = None,
    *,
    unit: int | None = None,
    unit_axis: int | None = None,
    device: torch.device | str | None = None,
) -> ReceptiveField:
    """Find the box of the input that can change the units of a layer at one place (Araujo et al. 2019).

    NaN is written into all rows above some row: the place becomes NaN if and only if its field begins above that row,
    through every convolution, pooling, normalisation and activation, whatever the weights and however the input happens
    to drive the units; where gradients would stop at inactive units and reach only the winners of a max pooling. The
    row where this changes is found by bisection, likewise from below, left and right: about 2 log2(size) forward
    calls up to the layer, without any gradient. From the fields of some other places follows how the field moves, and
    so how far one at the border reaches into the padding.

    What swallows NaN (`where(x > 0, x, 0)`) could hide a path. So the network runs on random inputs with all
    outside the box replaced; if the layer notices, or takes no notice of NaN at all, the whole input is given.

    Exact for stacks of convolution, pooling and what acts on each place; a weight of zero counts as a connection.
    Global layers, and all after them, have the whole input.

    Args:
        model: The network; it runs in evaluation mode and comes back as it was.
        layer: Name of the layer, as for `capture`.
        example: A batch of inputs (N, channels, height, width), or the shape of one input.
        position: The place in the feature map. Default: its middle.
        unit: One unit. Default: the box that holds the fields of all units, which differ where branches of different
            kernels are concatenated.
        unit_axis: The axis of the units. Default: as `unit_axes` tells it.
        device: Where to run; a network that is elsewhere is copied. Default: where it is.

    Raises:
        DataError: The example, layer, position or unit cannot be used.
        LayerNotFoundError: There is no such layer, or it was not called.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3, padding=1))
    >>> field = receptive_field(model, "3", (1, 12, 12), (0, 3))
    >>> field.box, field.clipped, field.padding
    ((-3, 3, 8, 8), (0, 3, 5, 8), ((3, 0), (0, 0)))
    """
    with watching(model, layer, example, unit_axis=unit_axis, device=device) as watched, _plain_kernels():
        key, spatial = watched.place.key, watched.spatial
        units = None if unit is None else as_units(unit, watched.units, key)
        position = tuple(size // 2 for size in spatial) if position is None else tuple(position)
        _check_position(position, spatial, key)
        sizes = tuple(watched.example.shape[2:])
        probe = _Probe(watched, units)
        if len(sizes) == len(spatial) and sizes and probe.traceable(position):
            axes = tuple(_axis(probe, axis, place) for axis, place in enumerate(position))
            field = ReceptiveField(key, position, axes, True)
            if probe.blind_outside(field):
                return field
        return ReceptiveField(key, position, tuple(Axis(size, 1, None, None, None, {}) for size in sizes), False)


def _check_position(position: tuple[Any, ...], sizes: Sequence[int], layer: str) -> None:
    numbers = all(isinstance(place, int) and not isinstance(place, bool) for place in position)
    if not numbers or len(position) != len(sizes) or not all(0 <= p < n for p, n in zip(position, sizes, strict=True)):
        raise DataError(f"there is no place {position} in layer {layer!r} with places of shape {tuple(sizes)}")


def _box(spans: Sequence[Span]) -> tuple[int, ...]:
    return (*(start for start, _ in spans), *(stop - start for start, stop in spans))


def _beyond(reaching: Span, cut: Span) -> Span:
    before = min(cut[0] - reaching[0], reaching[1] - reaching[0])
    return before, reaching[1] - reaching[0] - (cut[1] - cut[0]) - before


@contextmanager
def _plain_kernels() -> Iterator[None]:
    # Winograd and Fourier kernels compute tiles as wholes, so that one NaN would reach its neighbours. The `flags` of
    # these two backends set more than `enabled`.
    backends = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [backend.enabled for backend in backends]
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
        try:
            for backend in backends:
                backend.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
            yield
        finally:
            for backend, enabled in zip(backends, before, strict=True):
                backend.enabled = enabled  # pyright: ignore[reportAttributeAccessIssue]


class _Probe:
    """Runs a layer on inputs that are NaN in part."""

    def __init__(self, watched: Watched, units: Tensor | None) -> None:
        self.watched, self.units = watched, units
        self.input = watched.example[:1]
        self._known: dict[tuple[int, bool, int], list[bool]] = {}

    def run(self, inputs: Tensor) -> Tensor:
        found = torch.cat([self.watched(part) for part in inputs.split(_BATCH)])
        return found if self.units is None else found[:, self.units.to(found.device)]

    def traceable(self, position: tuple[int, ...]) -> bool:
        """Tell whether the inputs can be NaN, and the units are then NaN at a place."""
        if not self.input.is_floating_point():
            return False
        found = self.run(torch.full_like(self.input, torch.nan))
        return bool(found[(slice(None), slice(None), *position)].isnan().all())

    def reached(self, axis: int, before: bool, cuts: Sequence[int]) -> dict[int, list[bool]]:
        """Tell, per cut, which places along an axis see NaN before (from) the cut."""
        new = sorted({cut for cut in cuts if (axis, before, cut) not in self._known})
        if new:
            inputs = self.input.repeat(len(new), *[1] * (self.input.ndim - 1))
            for row, cut in zip(inputs, new, strict=True):
                size = row.shape[axis + 1]
                row.narrow(axis + 1, *((0, cut) if before else (cut, size - cut))).fill_(torch.nan)
            seen = self.run(inputs).isnan().movedim(axis + 2, 1).flatten(2).any(2).tolist()
            self._known |= {(axis, before, cut): row for cut, row in zip(new, seen, strict=True)}
        return {cut: self._known[axis, before, cut] for cut in cuts}

    def blind_outside(self, field: ReceptiveField) -> bool:
        """Tell whether nothing outside the box changes the units at the place, on random inputs."""
        generator = torch.Generator().manual_seed(0)
        shape = (2 * _TRIALS, *self.input.shape[1:])
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.input)
        count = len(field.axes)
        box = zip(field.clipped[:count], field.clipped[count:], strict=True)
        inside = tuple(slice(start, start + length) for start, length in box)
        inputs[(slice(_TRIALS, None), slice(None), *inside)] = inputs[(slice(_TRIALS), slice(None), *inside)]
        first, second = self.run(inputs)[(slice(None), slice(None), *field.position)].chunk(2)
        scale = first.abs().amax().clamp_min(torch.finfo(first.dtype).tiny)
        return bool(((first - second).abs() <= _TOLERANCE * scale).all())


def _axis(probe: _Probe, axis: int, place: int) -> Axis:
    """Measure the fields of a few places along an axis, and find the rule that they follow."""
    size, places = probe.input.shape[axis + 2], probe.watched.spatial[axis]
    middle = places // 2
    chosen = {p for p in (0, 1, middle - 1, middle, middle + 1, places - 2, places - 1, place) if 0 <= p < places}
    found = _rule(size, places, _spans(probe, axis, size, sorted(chosen)))
    if found.jump is None and places > len(chosen):
        # No rule: what is asked for is measured; the others are too, if there are few.
        more = range(places) if places <= _FEW else [place]
        found = replace(found, measured=found.measured | _spans(probe, axis, size, list(more)))
    return found


def _spans(probe: _Probe, axis: int, size: int, places: Sequence[int]) -> dict[int, Span]:
    # A field begins at the last cut that leaves it without NaN before, and ends at the first without NaN from it on.
    starts = _bisect(lambda cuts: probe.reached(axis, True, cuts), places, 0, size, rising=True)
    stops = _bisect(lambda cuts: probe.reached(axis, False, cuts), places, 0, size, rising=False)
    spans = {place: (starts[place] - 1, stops[place]) for place in places}
    return {place: span for place, span in spans.items() if span[0] < span[1]}  # others see nothing but padding


def _bisect(
    reached: Callable[[Sequence[int]], dict[int, list[bool]]],
    places: Sequence[int],
    low: int,
    high: int,
    rising: bool,
) -> dict[int, int]:
    """Find, for each place, the first cut at which it is reached (rising), or no longer is."""
    ends = dict.fromkeys(places, (low, high))
    while any(b - a > 1 for a, b in ends.values()):
        middle = {place: (a + b) // 2 for place, (a, b) in ends.items() if b - a > 1}
        seen = reached(sorted(set(middle.values())))
        for place, cut in middle.items():
            a, b = ends[place]
            ends[place] = (a, cut) if seen[cut][place] == rising else (cut, b)
    return {place: b for place, (_, b) in ends.items()}


def _rule(size: int, places: int, measured: dict[int, Span]) -> Axis:
    """Find how the fields move; a rule that does not explain what was measured is none."""
    # A tap beyond the border leaves a gap where kernels are dilated, or the last rows stepped over: so the places
    # farthest from a border are asked about it, and the one next to it is not.
    starts = {place: start for place, (start, _) in measured.items() if start > 0 and place > 0}
    stops = {place: stop for place, (_, stop) in measured.items() if stop < size and place < places - 1}
    last = max((place for place in starts if place - 1 in starts), default=None)
    first = min((place for place in stops if place + 1 in stops), default=None)
    jumps = {starts[last] - starts[last - 1]} if last is not None else set()
    jumps |= {stops[first + 1] - stops[first]} if first is not None else set()
    if len(jumps) == 1 and (jump := jumps.pop()) > 0:
        last, first = max(starts, default=None), min(stops, default=None)
        start = None if last is None else starts[last] - jump * last
        stop = None if first is None else stops[first] - jump * first
        rule = Axis(size, places, jump, start, stop, measured)
        if all(_explains(rule, place, span) for place, span in measured.items()):
            return rule
    return Axis(size, places, None, None, None, measured)


def _explains(rule: Axis, place: int, measured: Span) -> bool:
    """Tell whether a rule gives a field that was measured; at the border, one that holds it."""
    start, stop = rule.reaching(place)
    if start >= 0 and stop <= rule.size and rule.start is not None and rule.stop is not None:
        return (start, stop) == measured
    cut = rule.cut(place)
    return cut[0] <= measured[0] and measured[1] <= cut[1]
