"""Unknowns: sets of units of which it is not yet known what they are, and the terms that they occur in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .terms import ONE, Arranged, Product, Sum, arranged, concatenation, leaves, product


@dataclass(frozen=True)
class Reason:
    """Why an axis stays where it is.

    Attributes:
        kind: "input", "output", "position", "operator" or "unused".
        operator: The operator, or the part of the network, that demands it.
        text: The reason in words.
    """

    kind: str
    operator: str
    text: str


class Unknown:
    """A set of units of which it is not yet known what they are.

    Its permutation may differ from block to block of other unknowns that stand beside it in the same tensors. `allowed`
    collects what every tensor and operator admits (None: no restriction so far), `forbidden` what some exclude. `picks`
    says that each position, with those of other axes, stands for one on a further axis: that of the expert of a token.
    """

    __slots__ = ("allowed", "bound", "forbidden", "picks", "pinned", "size")

    def __init__(self, size: int, allowed: frozenset[Unknown] | None = None, pinned: Reason | None = None) -> None:
        self.size = size
        self.bound: Any = None
        self.pinned = pinned
        self.allowed: set[frozenset[Unknown]] = set() if allowed is None else {allowed}
        self.forbidden: set[Unknown] = set()
        self.picks: tuple[frozenset[Unknown], Any] | None = None


def normal(term: Any) -> Any:
    """Rewrite a term with every bound unknown replaced by what it is bound to."""
    if isinstance(term, Unknown):
        if term.bound is None:
            return term
        term.bound = normal(term.bound)
        return term.bound
    if isinstance(term, Product):
        return product(map(normal, term.parts))
    if isinstance(term, Arranged):
        return arranged(normal(term.part), term.order)
    return concatenation(map(normal, term.parts))


def unknowns(terms: Iterable[Any]) -> set[Unknown]:
    """Collect the unbound unknowns that occur in some terms."""
    return {leaf for term in terms for leaf in leaves(normal(term))}


def contexts(axes: Sequence[Any]) -> Iterator[tuple[Unknown, frozenset[Unknown]]]:
    """Iterate over the unknowns of a tensor, each with those whose position is defined wherever its own is.

    These are its fellow factors, the factors around the concatenation that it is part of, and the factors of the
    other axes; not the parts of another segment.
    """
    axes = [normal(term) for term in axes]
    factors = [{part for part in parts_of(Product, term) if isinstance(part, Unknown)} for term in axes]
    picked = picked_by(set().union(*factors))
    for index, term in enumerate(axes):
        others = picked.union(*(f for at, f in enumerate(factors) if at != index))
        yield from _contexts(term, others)


def picked_by(here: set[Unknown]) -> frozenset[Unknown]:
    """Collect the units whose positions are known where those of some axes are."""
    found = [unit.picks for unit in here if unit.picks is not None]
    return frozenset(leaf for needed, term in found if needed <= here for leaf in leaves(normal(term)))


def _contexts(term: Any, beside: frozenset[Unknown]) -> Iterator[tuple[Unknown, frozenset[Unknown]]]:
    if isinstance(term, Unknown):
        yield term, beside | {term}
    elif isinstance(term, (Sum, Arranged)):
        for part in term.parts:
            yield from _contexts(part, beside)
    else:
        beside |= {part for part in term.parts if isinstance(part, Unknown)}
        for part in term.parts:
            yield from _contexts(part, beside)


def fixed(size: int, reason: Reason) -> Any:
    """Make an axis of positions that stay where they are."""
    return ONE if size == 1 else Unknown(size, frozenset(), reason)


def pin(term: Any, reason: Reason) -> None:
    """Pin every unknown of a term; the first reason stays."""
    for leaf in leaves(normal(term)):
        leaf.pinned = leaf.pinned or reason


def parts_of(kind: type, term: Any) -> tuple[Any, ...]:
    """Give the parts of a term of a kind; any other is its own only part."""
    return term.parts if isinstance(term, kind) else (term,)
