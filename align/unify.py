"""Unification: what the operators of a network demand of its axes, solved as equations between terms.

Each axis of each parameter starts as an unknown. An operator states that two axes are permuted alike (`equate`), that
an axis is a product or a concatenation (`factor`, `cut`), or that it stays where it is (`pin`). Unknowns are bound to
terms as the equations come in, as in the unification of logical terms (Robinson 1965); what is still unbound at the
end, and not pinned, is free to be permuted. Where an equation has no solution in this algebra both sides are pinned:
the result is then smaller than it could be, never wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from .terms import ONE, Arranged, Product, Sum, Term, arranged, concatenation, leaves, product
from .unknown import Reason, Unknown, contexts, fixed, normal, parts_of, pin, unknowns


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
        _bind(a, b, reason)
    elif isinstance(a, Arranged) or isinstance(b, Arranged):
        _equate_arranged(*((a, b) if isinstance(a, Arranged) else (b, a)), reason)
    elif isinstance(a, Product) and isinstance(b, Product):
        _equate_products(list(a.parts), list(b.parts), reason)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        _equate_sums(list(a.parts), list(b.parts), reason)
    else:
        _equate_sum_with_product(*((a, b) if isinstance(a, Sum) else (b, a)), reason)


def _bind(unknown: Unknown, term: Any, reason: Reason) -> None:
    if isinstance(term, Unknown) and term.pinned and not unknown.pinned:
        unknown.bound = term
    elif isinstance(term, Arranged) and unknown in leaves(term):
        pin(term, reason)  # an axis that is its own in another order
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
        elif isinstance(a[0], Unknown) and (count := _prefix(b, a[0].size)):
            whole, b[:count] = product(b[:count]), []
            equate(a.pop(0), whole, reason)
        elif a[0].size % b[0].size == 0:
            outer, inner = factor(a[0], (b[0].size, a[0].size // b[0].size), reason)
            equate(outer, b.pop(0), reason)
            a[0:1] = parts_of(Product, inner)
        else:
            pin(product([*a, *b]), reason)
            return
        a, b = list(parts_of(Product, normal(product(a)))), list(parts_of(Product, normal(product(b))))


def _prefix(parts: Sequence[Any], size: int) -> int:
    """Count the factors whose product is a size, from the first on; 0: there are none."""
    products = list(accumulate((part.size for part in parts), operator.mul))
    return products.index(size) + 1 if size in products else 0


def _equate_sums(a: list[Any], b: list[Any], reason: Reason) -> None:
    while a and b:
        if a[0].size < b[0].size:
            a, b = b, a
        if a[0].size > b[0].size:
            a[0:1] = cut(a[0], (b[0].size, a[0].size - b[0].size), reason)
        equate(a.pop(0), b.pop(0), reason)
        a = list(parts_of(Sum, normal(concatenation(a)))) if a else a
        b = list(parts_of(Sum, normal(concatenation(b)))) if b else b


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
    if isinstance(term, Arranged):
        return _cut_arranged(term, sizes, reason)
    segments = [Unknown(size) if size > 1 else (ONE if size else Sum(())) for size in sizes]
    if isinstance(term, Product):
        return _cut_product(term, sizes, reason)
    whole = concatenation(segments)
    if isinstance(term, Unknown):
        _bind(term, whole, reason)
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


def interleaved(parts: int, size: int) -> tuple[int, ...]:
    """Give the order in which position i of each part comes before position i + 1 of any.

    >>> interleaved(2, 3)
    (0, 3, 1, 4, 2, 5)
    """
    return tuple(part * size + at for at in range(size) for part in range(parts))


def around(before: int, middle: int, after: int) -> tuple[int, ...]:
    """Give the order in which units of one group, that come first, stand before and after others.

    >>> around(1, 2, 2)
    (0, 3, 4, 1, 2)
    """
    edge = before + after
    return (*range(before), *range(edge, edge + middle), *range(before, edge))


def _equate_arranged(a: Arranged, b: Any, reason: Reason) -> None:
    """State that an axis in another order is permuted like a second one, which is no unknown."""
    if isinstance(b, Arranged) and a.order == b.order:
        equate(a.part, b.part, reason)
    elif isinstance(b, Sum):
        segments = _cut_arranged(a, [part.size for part in b.parts], reason)
        for mine, other in zip(segments, b.parts, strict=True):
            equate(mine, other, reason)
    elif set(leaves(a)) & set(leaves(b)):
        _pin_both(a, b, reason)
    elif isinstance(b, Arranged) or isinstance(a.part, Unknown):
        equate(a.part, arranged(b, _inverse(a.order)), reason)
    else:
        _equate_interleaved(a, b, reason)


def _equate_interleaved(a: Arranged, b: Any, reason: Reason) -> None:
    """Interleaved parts of equal size are every pair of a position and a part."""
    parts = a.part.parts if isinstance(a.part, Sum) else ()
    size = parts[0].size if parts else 0
    if not parts or any(p.size != size for p in parts) or a.order != interleaved(len(parts), size):
        _pin_both(a, b, reason)
        return
    position, which = factor(b, (size, len(parts)), reason)
    pin(which, reason)
    for part in parts:
        equate(part, position, reason)


def _pin_both(a: Any, b: Any, reason: Reason) -> None:
    pin(a, reason)
    pin(b, reason)


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _cut_arranged(term: Arranged, sizes: Sequence[int], reason: Reason) -> list[Any]:
    """Cut an axis in another order: each part is cut where one segment's share of it ends and another's begins."""
    ends = list(accumulate(sizes))
    owner = [0] * term.size
    for at, position in enumerate(term.order):
        owner[position] = next(index for index, end in enumerate(ends) if at < end)
    pieces: list[tuple[int, int, Any]] = []  # start in the part, owner, term
    start = 0
    for part in term.part.parts if isinstance(term.part, Sum) else (term.part,):
        runs = _runs(owner[start : start + part.size])
        if len({who for who, _ in runs}) < len(runs):  # a share that is not of one piece
            pin(term, reason)
            return [fixed(size, reason) if size else Sum(()) for size in sizes]
        for (who, size), piece in zip(runs, cut(part, [size for _, size in runs], reason), strict=True):
            pieces.append((start, who, piece))
            start += size
    return [
        _segment(term, pieces, index, end - size, end)
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def _runs(owners: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for who in owners:
        if runs and runs[-1][0] == who:
            runs[-1] = (who, runs[-1][1] + 1)
        else:
            runs.append((who, 1))
    return runs


def _segment(term: Arranged, pieces: Sequence[tuple[int, int, Any]], index: int, start: int, end: int) -> Term:
    mine = [(at, piece) for at, who, piece in pieces if who == index]
    place: dict[int, int] = {}
    for at, piece in mine:
        for offset in range(piece.size):
            place[at + offset] = len(place)
    return arranged(concatenation(piece for _, piece in mine), [place[p] for p in term.order[start:end]])
