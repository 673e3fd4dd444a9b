"""Rules of the operators that pick by position, or tell positions.

The entries of an integer tensor may be positions on an axis, as those of `topk` and `argmax` are. Picking by them from
an axis with the same units, or comparing them with `arange`, leaves these units free: they are told by what they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .deferred import settled
from .depend import mix
from .rules_compute import broadcast, reduce
from .rules_shape import constant_axes, rearranged
from .terms import leaves, product
from .trace import Axes, Call, NoRuleError, rule
from .unify import equate
from .unknown import Unknown, normal


def pick(call: Call, term: Any, index: Tensor) -> None:
    """State that an axis is picked from by positions: they follow its order, or it keeps its order."""
    positions = call.positions(index)
    if positions is None:
        call.pin(term)
    elif positions.size == term.size:
        equate(term, positions, call.reason)
    else:
        call.pin(term)
        call.pin(positions)


def places_of(call: Call, indices: Sequence[Tensor]) -> Axes:
    """Describe the axes of index tensors; where they are positions, each place stands for what it picks."""
    places = broadcast(call, indices)
    positions = [call.positions(index) for index in indices]
    if len(positions) != 1 or positions[0] is None:
        return places
    marked = [term if term.size == 1 else call.fixed(term.size) for term in settled(places)]
    ours = frozenset(term for term in marked if isinstance(term, Unknown))
    for term in ours:
        term.picks = (ours, positions[0])
    return marked if all(_held(term) for term in settled(places)) else places


def _held(term: Any) -> bool:
    return all(leaf.pinned for leaf in leaves(normal(term)))


def _known_order(call: Call, index: Tensor, term: Any) -> Any:
    """Give the axis that picking every position once makes, where the positions are known; None: they are not."""
    known = call.tracer.constants.numbers(index)
    if known is None or index.ndim != 1 or call.positions(index) is not None or len(index) != term.size:
        return None
    order = [int(position) % term.size for position in known]
    return rearranged(term, order) if len(set(order)) == len(order) else None


def ranked(call: Call, dim: int) -> tuple[Axes, Axes]:
    """Describe the best along an axis and their positions: the rank is fixed, whatever the order of the axis."""
    tensor: Tensor = call["self"]
    axes = call.axes(tensor)
    if not axes:
        return [], []
    mix(axes, [dim])
    found = list(axes)
    found[dim] = call.fixed(call.result[0].shape[dim])
    call.point(call.result[1], axes[dim])
    return found, list(found)


@rule("topk", "sort", "kthvalue", "mode")
def rank(call: Call) -> tuple[Axes, Axes]:
    """Order the entries along an axis by their value."""
    tensor: Tensor = call["self"]
    dim = -1 if call["dim"] is None else call["dim"]
    if call.operator in ("kthvalue", "mode"):
        return _reduced(call, dim)
    return ranked(call, dim % max(tensor.ndim, 1))


@rule("argsort")
def argsort(call: Call) -> Axes:
    """Tell the positions in the order of the entries."""
    axes = call.axes(call["self"])
    dim = (-1 if call["dim"] is None else call["dim"]) % len(axes)
    mix(axes, [dim])
    call.point(call.result, axes[dim])
    return [*axes[:dim], call.fixed(call.result.shape[dim]), *axes[dim + 1 :]]


@rule("max", "min", "median", "nanmedian")
def extremum(call: Call) -> Axes | tuple[Axes, ...]:
    """Find the largest entry of all, or of an axis with its position, or of two tensors at each place."""
    if call["other"] is not None:
        return broadcast(call, [call["self"], call["other"]])
    return reduce(call) if call["dim"] is None else _reduced(call, call["dim"])


def _reduced(call: Call, dim: int) -> tuple[Axes, Axes]:
    kept = reduce(call)
    call.point(call.result[1], call.axes(call["self"])[dim])
    return list(kept), list(kept)


@rule("argmax", "argmin")
def argmax(call: Call) -> Axes:
    """Tell the position of the largest entry along an axis."""
    tensor: Tensor = call["self"]
    if call["dim"] is None:
        call.pin(product(call.axes(tensor)))
        return constant_axes(call.result.shape)
    kept = reduce(call)
    call.point(call.result, call.axes(tensor)[call["dim"]])
    return list(kept)


@rule("arange")
def arange(call: Call) -> Axes:
    """Count positions: of an axis that is not known yet if they begin at zero."""
    result: Tensor = call.result
    if result.is_floating_point() or (call["start"] or 0) != 0 or (call["step"] or 1) != 1 or len(result) < 2:
        return [call.fixed(len(result))]
    units = Unknown(len(result))
    call.point(result, units)
    return [units]


@rule("eq", "ne", entries="used")
def compare(call: Call) -> Axes:
    """Compare entries at the same place; positions are compared with positions on the same axis."""
    tensors = [value for value in (call["self"], call["other"]) if isinstance(value, Tensor)]
    known = [term for term in map(call.positions, tensors) if term is not None]
    if len(known) == 2 and known[0].size == known[1].size:
        equate(known[0], known[1], call.reason)
    else:
        for term in known:
            call.pin(term)
    return broadcast(call, tensors)


@rule("embedding", entries="used")
def embedding(call: Call) -> Axes:
    """Look rows up: their number is what the indices mean, their entries are free."""
    weight = call.axes(call["weight"])
    pick(call, weight[0], call["indices"])
    return [*places_of(call, [call["indices"]]), weight[1]]


@rule("index_select", entries="used")
def index_select(call: Call) -> Axes:
    """Pick positions of an axis by index."""
    axes = call.axes(call["self"])
    dim = call["dim"] % max(len(axes), 1)
    _hand_on(call)
    if axes and (moved := _known_order(call, call["index"], axes[dim])) is not None:
        return [*axes[:dim], moved, *axes[dim + 1 :]]
    pick(call, axes[dim], call["index"])
    return [*axes[:dim], *(places_of(call, [call["index"]]) or [call.fixed(1)]), *axes[dim + 1 :]]


def _hand_on(call: Call) -> None:
    """Entries that are picked from remain what they were."""
    term = call.positions(call["self"])
    if term is not None:
        call.point(call.result, term)


@rule("index", "_unsafe_index", entries="used")
def index(call: Call) -> Axes:
    """Pick by several index tensors at once, which are broadcast against each other."""
    axes = call.axes(call["self"])
    picked = _picked(call, axes)
    indices = [call["indices"][dim] for dim in picked]
    if len(picked) == 1 and (moved := _known_order(call, indices[0], axes[picked[0]])) is not None:
        _hand_on(call)
        return [*axes[: picked[0]], moved, *axes[picked[0] + 1 :]]
    places = places_of(call, indices)
    for dim in picked:
        pick(call, axes[dim], call["indices"][dim])
    _hand_on(call)
    kept = [dim for dim in range(len(axes)) if dim not in picked]
    adjacent = picked == list(range(picked[0], picked[-1] + 1))
    first = picked[0] if adjacent else 0  # indices that do not stand side by side come to the front
    return [*(axes[d] for d in kept[:first]), *places, *(axes[d] for d in kept[first:])]


def _picked(call: Call, axes: Axes) -> list[int]:
    indices = call["indices"]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices) or len(indices) > len(axes):
        raise NoRuleError
    return [dim for dim, i in enumerate(indices) if i is not None]


@rule("index_put", "_unsafe_index_put", entries="used")
def index_put(call: Call) -> Axes:
    """Overwrite, or add to, what index tensors pick."""
    axes = call.axes(call["self"])
    picked = _picked(call, axes)
    for dim in picked:
        pick(call, axes[dim], call["indices"][dim])
    if call.positions(call["self"]) is not None or call.positions(call["values"]) is not None:
        raise NoRuleError
    places = broadcast(call, [call["indices"][dim] for dim in picked])
    kept = [dim for dim in range(len(axes)) if dim not in picked]
    adjacent = picked == list(range(picked[0], picked[-1] + 1))
    first = picked[0] if adjacent else 0
    target = [*(axes[d] for d in kept[:first]), *places, *(axes[d] for d in kept[first:])]
    values: Tensor = call["values"]
    for mine, other, size in zip(reversed(target), reversed(call.axes(values)), reversed(values.shape), strict=False):
        if size != 1 and mine.size == size:
            equate(mine, other, call.reason)
        else:
            call.pin(other)
    return axes


@rule("gather", entries="used")
def gather(call: Call) -> Axes:
    """Pick along one axis, at each place by its own index."""
    index: Tensor = call["index"]
    axes, places = call.axes(call["self"]), call.axes(index)
    if not axes:
        return places
    dim = call["dim"] % len(axes)
    _beside(call, axes, places, dim)
    pick(call, axes[dim], index)
    mix(axes, [dim])
    _hand_on(call)
    return places


def _beside(call: Call, axes: Axes, places: Axes, dim: int) -> None:
    """The other axes of an index run along those of the tensor, or along their beginning."""
    for at, (mine, other) in enumerate(zip(axes, places, strict=True)):
        if at != dim and mine.size == other.size:
            equate(mine, other, call.reason)
        elif at != dim:
            call.pin(mine)
            call.pin(other)


@rule("scatter", "scatter_add", "scatter_reduce", entries="used")
def scatter(call: Call) -> Axes:
    """Overwrite, or add to, positions along one axis, at each place by its own index."""
    index: Tensor = call["index"]
    axes, places = call.axes(call["self"]), call.axes(index)
    if any(call.positions(t) is not None for t in (call["self"], call["src"]) if isinstance(t, Tensor)):
        raise NoRuleError
    dim = call["dim"] % len(axes)
    _beside(call, axes, places, dim)
    pick(call, axes[dim], index)
    mix(axes, [dim])
    source = call["src"]
    if isinstance(source, Tensor):
        for mine, other in zip(places, call.axes(source), strict=True):
            if mine.size == other.size:
                equate(mine, other, call.reason)
            else:
                call.pin(mine)
                call.pin(other)
    return axes


@rule("index_add", "index_copy", "index_fill", entries="used")
def index_add(call: Call) -> Axes:
    """Add slices at positions of an axis, overwrite or fill them."""
    axes = call.axes(call["self"])
    dim = call["dim"] % len(axes)
    pick(call, axes[dim], call["index"])
    source = call["source"]
    if isinstance(source, Tensor) and source.ndim:
        for at, (mine, other) in enumerate(zip(axes, call.axes(source), strict=True)):
            equate(call.axes(call["index"])[0] if at == dim else mine, other, call.reason)
    return axes
