"""Dependence: on whose position the order of a set of units may depend, as the order inside a head on the head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .terms import Arranged, Product, Sum, leaves
from .unknown import Unknown, contexts, normal, parts_of, unknowns


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
    inside |= {leaf for unit in inside if unit.picks is not None for leaf in unknowns([unit.picks[1]])}
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
        parts = parts_of(Product, term)
        if any(isinstance(part, (Sum, Arranged)) for part in parts):
            continue  # a position in a concatenation is no position of one of its parts
        resolved |= set(leaves(term))
    return resolved
