"""Unification: what the operators of a network demand of its axes, solved as equations between terms.

Each axis of each parameter starts as an unknown. An operator states that two axes are permuted alike (`equate`), that
an axis is a product or a concatenation (`factor`, `cut`), or that it stays where it is (`pin`). Unknowns are bound to
terms as the equations come in, as in the unification of logical terms (Robinson 1965); what is still unbound at the
end, and not pinned, is free to be permuted. Where an equation has no solution in this algebra both sides are pinned:
the result is then smaller than it could be, never wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .terms import ONE, Product, Sum, concatenation, leaves, product


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
    collects what every tensor and operator admits (None: no restriction so far), `forbidden` what some exclude.
    """

    __slots__ = ("allowed", "bound", "forbidden", "pinned", "size")

    def __init__(self, size: int, allowed: frozenset[Unknown] | None = None, pinned: Reason | None = None) -> None:
        self.size = size
        self.bound: Any = None
        self.pinned = pinned
        self.allowed: set[frozenset[Unknown]] = set() if allowed is None else {allowed}
        self.forbidden: set[Unknown] = set()


def normal(term: Any) -> Any:
    """Rewrite a term with every bound unknown replaced by what it is bound to."""
    if isinstance(term, Unknown):
        if term.bound is None:
            return term
        term.bound = normal(term.bound)
        return term.bound
    if isinstance(term, Product):
        return product(map(normal, term.parts))
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
    factors = [{part for part in _parts(Product, term) if isinstance(part, Unknown)} for term in axes]
    for index, term in enumerate(axes):
        others = frozenset().union(*(f for at, f in enumerate(factors) if at != index))
        yield from _contexts(term, others)


def _contexts(term: Any, beside: frozenset[Unknown]) -> Iterator[tuple[Unknown, frozenset[Unknown]]]:
    if isinstance(term, Unknown):
        yield term, beside | {term}
    elif isinstance(term, Sum):
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


def equate(a: Any, b: Any, reason: Reason) -> None:
    """State that two axes of equal length are permuted alike.

    Args:
        a: A term.
        b: A term of the same size.
        reason: Which operator says so; recorded where both have to be pinned.
    """
    a, b = normal(a), normal(b)
    if a is b or a == b:
        return
    assert a.size == b.size, f"axes of sizes {a.size} and {b.size} equated by {reason.operator}"
    if isinstance(b, Unknown):
        a, b = b, a
    if isinstance(a, Unknown):
        _bind(a, b)
    elif isinstance(a, Product) and isinstance(b, Product):
        _equate_products(list(a.parts), list(b.parts), reason)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _equate_sums(list(a.parts), list(b.parts), reason)
    else:
        _equate_sum_with_product(*((a, b) if isinstance(a, Sum) else (b, a)), reason)


def _bind(unknown: Unknown, term: Any) -> None:
    if isinstance(term, Unknown) and term.pinned and not unknown.pinned:
        unknown.bound = term
    elif unknown.pinned:
        pin(term, unknown.pinned)  # two fixed axes need not be the same one: nothing is bound
    elif isinstance(term, Unknown):
        term.allowed |= unknown.allowed
        term.forbidden |= unknown.forbidden
        unknown.bound = term
    else:
        for leaf, beside in contexts([term]):
            leaf.allowed |= {scope | beside for scope in unknown.allowed}
            leaf.forbidden |= unknown.forbidden
        unknown.bound = term


def _equate_products(a: list[Any], b: list[Any], reason: Reason) -> None:
    while a and b:
        if a[0].size < b[0].size:
            a, b = b, a
        if a[0].size == b[0].size:
            equate(a.pop(0), b.pop(0), reason)
        elif a[0].size % b[0].size == 0:
            outer, inner = factor(a[0], (b[0].size, a[0].size // b[0].size), reason)
            equate(outer, b.pop(0), reason)
            a[0:1] = _parts(Product, inner)
        else:
            pin(product([*a, *b]), reason)
            return
        a, b = list(_parts(Product, normal(product(a)))), list(_parts(Product, normal(product(b))))


def _parts(kind: type, term: Any) -> tuple[Any, ...]:
    return term.parts if isinstance(term, kind) else (term,)


def _equate_sums(a: list[Any], b: list[Any], reason: Reason) -> None:
    while a and b:
        if a[0].size < b[0].size:
            a, b = b, a
        if a[0].size > b[0].size:
            a[0:1] = cut(a[0], (b[0].size, a[0].size - b[0].size), reason)
        equate(a.pop(0), b.pop(0), reason)
        a = list(_parts(Sum, normal(concatenation(a)))) if a else a
        b = list(_parts(Sum, normal(concatenation(b)))) if b else b


def _equate_sum_with_product(total: Sum, blocks: Product, reason: Reason) -> None:
    first, rest = blocks.parts[0], product(blocks.parts[1:])
    if any(part.size % rest.size for part in total.parts):
        pin(product([total, blocks]), reason)
        return
    segments = cut(first, [part.size // rest.size for part in total.parts], reason)
    for leaf in unknowns([rest]):  # the same inner order in every segment
        leaf.forbidden |= unknowns([first])
    for part, segment in zip(total.parts, segments, strict=True):
        equate(part, product([segment, rest]), reason)


def factor(term: Any, sizes: Sequence[int], reason: Reason) -> list[Any]:
    """Split an axis into a product; an inner part may be permuted differently in each position of the outer ones.

    Args:
        term: The axis.
        sizes: The factors' sizes, the slowest first; their product is the axis' size.
        reason: Which operator splits it.

    Returns:
        A term for each size.
    """
    term = normal(term)
    if isinstance(term, Unknown) and term.pinned:
        return [fixed(size, term.pinned) for size in sizes]
    fresh = [Unknown(size) if size > 1 else ONE for size in sizes]
    for index, outer in enumerate(fresh):
        if isinstance(outer, Unknown):
            outer.forbidden.update(inner for inner in fresh[index + 1 :] if isinstance(inner, Unknown))
    equate(term, product(fresh), reason)
    return [normal(part) for part in fresh]


def cut(term: Any, sizes: Sequence[int], reason: Reason) -> list[Any]:
    """Cut an axis into segments, one after the other.

    Args:
        term: The axis.
        sizes: The segments' sizes; their sum is the axis' size.
        reason: Which operator cuts it.

    Returns:
        A term for each size; segments of size zero are empty sums.
    """
    term = normal(term)
    kept = [size for size in sizes if size]
    if len(kept) == 1:
        return [term if size else Sum(()) for size in sizes]
    if isinstance(term, Unknown) and term.pinned:
        return [fixed(size, term.pinned) for size in sizes]
    segments = [Unknown(size) if size > 1 else (ONE if size else Sum(())) for size in sizes]
    if isinstance(term, Product):
        return _cut_product(term, sizes, reason)
    whole = concatenation(segments)
    if isinstance(term, Unknown):
        _bind(term, whole)
    else:
        _equate_sums(list(term.parts), list(whole.parts), reason)
    return [normal(segment) for segment in segments]


def _cut_product(term: Product, sizes: Sequence[int], reason: Reason) -> list[Any]:
    first, rest = term.parts[0], product(term.parts[1:])
    if any(size % rest.size for size in sizes):
        pin(term, reason)
        return [fixed(size, reason) for size in sizes]
    for leaf in unknowns([rest]):
        leaf.forbidden |= unknowns([first])
    return [product([part, rest]) for part in cut(first, [size // rest.size for size in sizes], reason)]


def blocks(term: Any, size: int, reason: Reason) -> None:
    """State that the axis consists of blocks of `size` that move as wholes, each with its own order inside.

    A concatenation is taken segment by segment, so that the blocks of one segment stay among themselves.
    """
    term = normal(term)
    if isinstance(term, Sum) and all(part.size % size == 0 for part in term.parts):
        for part in term.parts:
            blocks(part, size, reason)
    else:
        factor(term, (term.size // size, size), reason)


def admit(tensors: Iterable[Iterable[Any]]) -> None:
    """State which axes stand side by side: an unknown's order may depend only on what stands in all its tensors.

    Args:
        tensors: For each tensor, the terms of its axes.
    """
    for axes in tensors:
        for leaf, beside in contexts(list(axes)):
            leaf.allowed.add(beside)


def mix(axes: Sequence[Any], dims: Iterable[int]) -> None:
    """State that entries along `dims` are combined at equal positions of the other axes.

    Then the order of the other axes must not depend on the position in `dims`.
    """
    mixed = {dim % len(axes) for dim in dims}
    inside = unknowns(axes[dim] for dim in mixed)
    for leaf in unknowns(axes[dim] for dim in range(len(axes)) if dim not in mixed) - inside:
        leaf.forbidden |= inside


def dependencies(free: Sequence[Unknown]) -> dict[Unknown, tuple[Unknown, ...]]:
    """Find, for every free unknown, those on whose position its permutation may depend.

    Args:
        free: The unbound, unpinned unknowns, in order of first occurrence.

    Returns:
        For each the others, outermost first; no cycles.
    """
    known = set(free)
    found: dict[Unknown, tuple[Unknown, ...]] = {}
    for leaf in free:
        scopes = [_resolved(scope) for scope in leaf.allowed]
        admitted = set.intersection(*scopes) if scopes else set()
        admitted &= known
        admitted -= unknowns(leaf.forbidden) | {leaf}
        # an order that depends on one that depends on it would be no permutation of the axis
        found[leaf] = tuple(other for other in free if other in admitted and leaf not in found.get(other, ()))
    settled = False
    while not settled:  # what an outer one depends on must be admitted as well, or the outer one is dropped
        kept = {leaf: tuple(o for o in outer if set(found[o]) <= set(outer)) for leaf, outer in found.items()}
        settled, found = kept == found, kept
    return {leaf: tuple(sorted(outer, key=lambda o: len(found[o]))) for leaf, outer in found.items()}


def _resolved(scope: frozenset[Unknown]) -> set[Unknown]:
    resolved: set[Unknown] = set()
    for leaf in scope:
        term = normal(leaf)
        if isinstance(term, Sum) or (isinstance(term, Product) and any(isinstance(p, Sum) for p in term.parts)):
            continue  # a position in a concatenation is no position of one of its parts
        resolved |= set(leaves(term))
    return resolved
