"""Axes that are not yet terms: factors on trial, and copies.

The factors that a view names are made when an operator asks for them one by one. Until then a cut of one factor is a
cut of the whole axis. That matters for packed projections: of `(3, heads, units)` the three parts become queries, keys
and values, and the units of each may have an order of their own, which factors made at once would not allow.

Along an axis of copies a tensor does not vary, as after `expand` or in `zeros`: there it demands nothing of what it is
combined with, each time anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .terms import ONE
from .unify import Reason, Unknown, cut, factor, normal


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
    return (axis.units or Unknown(axis.size)) if isinstance(axis, Copies) else axis


def standing(axes: Sequence[Any]) -> Iterator[Any]:
    """Iterate over the terms that stand side by side, a split on trial as a whole."""
    seen: set[int] = set()
    for axis in axes:
        if isinstance(axis, Copies):
            if axis.units is not None:
                yield axis.units
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
    axis = axes[dim].settle() if isinstance(axes[dim], Copies) else axes[dim]
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


def _replaced(entry: Any, split: Split, around: Sequence[Any], rest: Split) -> Any:
    if not (isinstance(entry, Digit) and entry.split is split):
        return entry
    at = len(around)
    return around[entry.at] if entry.at < at else rest.digit(entry.at - at)
