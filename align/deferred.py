"""Axes that are not yet terms: factors on trial, and copies.

The factors that a view names are made when an operator asks for them one by one. Until then a cut of one factor is a
cut of the whole axis. That matters for packed projections: of `(3, heads, units)` the three parts become queries, keys
and values, and the units of each may have an order of their own, which factors made at once would not allow.

Along an axis of copies a tensor does not vary, as after `expand` or in `zeros`: there it demands nothing of what it is
combined with, each time anew. Padding is made of copies at both ends. The members of a stack are tied to each other
only when something is computed from all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .terms import ONE, Arranged, Sum, arranged, concatenation
from .unify import around, cut, equate, factor
from .unknown import Reason, Unknown, fixed, normal


class Split:
    """A term beside the sizes of the factors that a view has named."""

    __slots__ = ("_made", "reason", "sizes", "term")

    def __init__(self, term: Any, sizes: Sequence[int], reason: Reason) -> None:
        self.term = term
        self.sizes = tuple(sizes)
        self.reason = reason
        self._made: list[Any] | None = None

    def made(self) -> list[Any]:
        """Give the factors, from now on as terms of their own."""
        if self._made is None:
            self._made = factor(self.term, self.sizes, self.reason)
        return self._made

    def digit(self, at: int) -> Any:
        """Give one factor as an axis."""
        if self.sizes[at] == 1:
            return ONE
        if sum(size != 1 for size in self.sizes) == 1:
            return self.term
        return Digit(self, at)


@dataclass(frozen=True)
class Digit:
    """One factor of a split, as an axis."""

    split: Split
    at: int

    @property
    def size(self) -> int:
        """Length of the axis."""
        return self.split.sizes[self.at]


class Copies:
    """An axis along which a tensor does not vary, so far."""

    __slots__ = ("size", "units")

    def __init__(self, size: int) -> None:
        self.size = size
        self.units: Unknown | None = None

    def settle(self) -> Any:
        """Make an axis of units of it, for good: it is about to be written to, or a part of it to be taken."""
        if self.units is None:
            self.units = Unknown(self.size)
        return self.units


class Padded:
    """An axis with constants before and after it. What is added to them is one set of units, around the others."""

    __slots__ = ("after", "before", "middle", "whole")

    def __init__(self, before: int, middle: Any, after: int) -> None:
        self.before = before
        self.middle = middle
        self.after = after
        self.whole: Any = None

    @property
    def size(self) -> int:
        """Length of the axis."""
        return self.before + self.middle.size + self.after

    def settle(self) -> Any:
        """Make an axis of it, for good: its edges may be permuted together."""
        if self.whole is None:
            count = self.before + self.after
            edge = Unknown(count) if count > 1 else ONE
            order = around(self.before, self.middle.size, self.after)
            self.whole = arranged(concatenation([edge, self.middle]), order)
        return self.whole


class Stack:
    """Tensors of one shape, one after the other along an axis of its own."""

    __slots__ = ("members", "position", "reason")

    def __init__(self, members: Sequence[Sequence[Any]], reason: Reason, position: Reason) -> None:
        self.members = [list(axes) for axes in members]
        self.reason = reason
        self.position = position

    def axes(self, dim: int) -> list[Any]:
        """Describe the stack, its own axis at `dim`; that of a single member has length one."""
        own: list[Any] = (
            [Option(self, at) for at in range(len(self.members[0]))] if self.members[1:] else self.members[0]
        )
        return [*own[:dim], Stacked(self) if self.members[1:] else ONE, *own[dim:]]


@dataclass(frozen=True)
class Stacked:
    """The axis along which a stack counts its members."""

    stack: Stack

    @property
    def size(self) -> int:
        """Length of the axis."""
        return len(self.stack.members)


@dataclass(frozen=True)
class Option:
    """An axis of a stack: that of the member which is looked at, or one for all as soon as they are taken together."""

    stack: Stack
    at: int

    @property
    def size(self) -> int:
        """Length of the axis."""
        return self.stack.members[0][self.at].size

    def settle(self) -> Any:
        """State that all members have one order."""
        first, *others = (settled([axes[self.at]])[0] for axes in self.stack.members)
        for other in others:
            equate(first, other, self.stack.reason)
        return first


def copies(size: int) -> Any:
    """Make an axis along which a tensor does not vary."""
    return ONE if size == 1 else Copies(size)


def uniform(axis: Any) -> bool:
    """Whether a tensor does not vary along an axis."""
    return isinstance(axis, Copies) and axis.units is None


def split_axis(term: Any, sizes: Sequence[int], reason: Reason) -> list[Any]:
    """Take an axis apart, on trial where there is something to gain.

    Args:
        term: The axis.
        sizes: Of the factors, the slowest first.
        reason: Which operator does so.
    """
    term = normal(term)
    if isinstance(term, Unknown) and term.pinned:
        return factor(term, sizes, reason)
    split = Split(term, sizes, reason)
    return [split.digit(at) for at in range(len(split.sizes))]


def settled(axes: Sequence[Any]) -> list[Any]:
    """Replace factors on trial by their terms, and copies by units of no other tensor."""
    return [_settled(axis) for axis in axes]


def _settled(axis: Any) -> Any:
    if isinstance(axis, Digit):
        return axis.split.made()[axis.at]
    if isinstance(axis, (Padded, Option)):
        return axis.settle()
    if isinstance(axis, Stacked):
        return fixed(axis.size, axis.stack.position)
    return (axis.units or Unknown(axis.size)) if isinstance(axis, Copies) else axis


def standing(axes: Sequence[Any]) -> Iterator[Any]:
    """Iterate over the terms that stand side by side, a split on trial as a whole."""
    seen: set[int] = set()
    for axis in axes:
        if isinstance(axis, Copies):
            if axis.units is not None:
                yield axis.units
        elif isinstance(axis, (Stacked, Option)):
            continue  # its members have stood on their own
        elif isinstance(axis, Padded):
            yield axis.middle if axis.whole is None else axis.whole
        elif not isinstance(axis, Digit):
            yield axis
        elif id(axis.split) not in seen:
            seen.add(id(axis.split))
            yield axis.split.term


def rejoined(axes: Sequence[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Put the factors of a split that stand side by side, all and in order, together again.

    Args:
        axes: Axes and their lengths, those of length one left out.
    """
    found: list[tuple[Any, int]] = []
    at = 0
    while at < len(axes):
        axis, size = axes[at]
        if isinstance(axis, Digit):
            split = axis.split
            digits = [split.digit(i) for i, length in enumerate(split.sizes) if length != 1]
            if [entry for entry, _ in axes[at : at + len(digits)]] == digits:
                axis, size = split.term, math.prod(split.sizes)
                at += len(digits) - 1
        found.append((axis, size))
        at += 1
    return found


def shuffled(run: Sequence[Any]) -> Any:
    """Merge the factors of a split, all of them but in another order, into one axis; None: they are something else.

    Where the axis is known to be made of segments, each keeps an order of its own.
    """
    if not all(isinstance(axis, Digit) and axis.split is run[0].split for axis in run):
        return None
    split = run[0].split
    term = normal(split.term)
    if len(run) != sum(size != 1 for size in split.sizes) or not isinstance(term, (Sum, Arranged)):
        return None
    steps = {axis.at: math.prod(split.sizes[axis.at + 1 :]) for axis in run}
    counted = itertools.product(*(range(0, steps[axis.at] * axis.size, steps[axis.at]) for axis in run))
    return arranged(term, tuple(map(sum, counted)))


def divide(axes: Sequence[Any], dim: int, sizes: Sequence[int], reason: Reason) -> list[list[Any]]:
    """Cut one axis of a tensor into segments.

    Args:
        axes: The tensor's axes, factors on trial included.
        dim: Which of them is cut.
        sizes: Lengths of the segments, in order; empty ones are allowed.
        reason: Which operator cuts.

    Returns:
        For each segment the axes of the tensor that is left.
    """
    axis = axes[dim].settle() if isinstance(axes[dim], (Copies, Padded, Option)) else axes[dim]
    if isinstance(axis, Stacked):
        return _members(axes, dim, sizes)
    if not isinstance(axis, Digit):
        return [[*axes[:dim], part, *axes[dim + 1 :]] for part in cut(axis, sizes, reason)]
    split, at = axis.split, axis.at
    inner = split.sizes[at + 1 :]
    *around, whole = factor(split.term, (*split.sizes[:at], math.prod(split.sizes[at:])), split.reason)
    parts = cut(whole, [size * math.prod(inner) for size in sizes], split.reason)
    found = []
    for size, part in zip(sizes, parts, strict=True):
        rest = Split(part, (size, *inner), split.reason)
        found.append([_replaced(entry, split, around, rest) for entry in axes])
    return found


def _members(axes: Sequence[Any], dim: int, sizes: Sequence[int]) -> list[list[Any]]:
    stack: Stack = axes[dim].stack
    found, start = [], 0
    for size in sizes:
        some = Stack(stack.members[start : start + size] or stack.members[:1], stack.reason, stack.position)
        own = some.axes(dim=len(stack.members[0]))
        kept = [own[axis.at] if isinstance(axis, Option) and axis.stack is stack else axis for axis in axes]
        kept[dim] = own[-1]
        found.append(kept)
        start += size
    return found


def _replaced(entry: Any, split: Split, around: Sequence[Any], rest: Split) -> Any:
    if not (isinstance(entry, Digit) and entry.split is split):
        return entry
    at = len(around)
    return around[entry.at] if entry.at < at else rest.digit(entry.at - at)
