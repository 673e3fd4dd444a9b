"""From what a run has shown to a symmetry: groups with names, what is pinned, and where groups can be seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .depend import dependencies
from .follow import Traced
from .symmetry import Group, Pinned, Point, Symmetry
from .terms import Arranged, Fixed, Product, Sum, Term, Units, groups_of, leaves
from .unknown import Reason, Unknown, normal


def assemble(model: nn.Module, traced: Traced) -> Symmetry:
    """Read groups and what is pinned off the terms of all parameters."""
    free: dict[Unknown, None] = {}
    for terms in traced.parameters.values():
        for leaf in _leaves(terms):
            if not leaf.pinned:
                free[leaf] = None
    depends = dependencies(list(free))
    names = _names(traced, list(free))
    outer = {other for others in depends.values() for other in others}
    layout = {name: tuple(_resolve(term, names) for term in terms) for name, terms in traced.parameters.items()}
    axes: dict[str, list[tuple[str, int]]] = {name: [] for name in names.values()}
    for parameter, terms in layout.items():
        for axis, term in enumerate(terms):
            for group in dict.fromkeys(leaf.group for leaf in leaves(term) if isinstance(leaf, Units)):
                axes[group].append((parameter, axis))
    heads = set(_leaves(traced.heads))

    def kind(leaf: Unknown) -> str:
        if leaf in heads:
            return "heads"
        return "within" if depends[leaf] else "blocks" if leaf in outer else "free"

    groups = [
        Group(
            names[leaf],
            leaf.size,
            kind(leaf),
            tuple(axes[names[leaf]]),
            tuple(names[other] for other in depends[leaf]),
        )
        for leaf in free
    ]
    saved = set(model.state_dict(keep_vars=True))
    unsaved = tuple(name for name in layout if name not in saved)
    points = tuple(_points(traced, layout, names))
    buffers = tuple(name for name, _ in model.named_buffers(remove_duplicate=False) if name in layout)
    pinned = tuple(_pinned(traced))
    return Symmetry(tuple(groups), pinned, layout, points, type(model).__name__, unsaved, buffers=buffers)


def _leaves(terms: Iterable[Any]) -> Iterable[Unknown]:
    for term in terms:
        yield from leaves(normal(term))


def _resolve(term: Any, names: Mapping[Unknown, str]) -> Term:
    term = normal(term)
    if isinstance(term, Unknown):
        return Units(names[term], term.size) if term in names else Fixed(term.size)
    parts = tuple(_resolve(part, names) for part in term.parts)
    if all(isinstance(part, Fixed) for part in parts):
        return Fixed(term.size)
    if isinstance(term, Arranged):
        return Arranged(parts[0], term.order)
    return Product(parts) if isinstance(term, Product) else Sum(parts)


def _names(traced: Traced, free: list[Unknown]) -> dict[Unknown, str]:
    """Name each group after the module whose output it is: the first weight that has it on its first axis."""
    sources: dict[Unknown, str] = {}
    for rank in (2, 1):  # a weight names better than a bias
        for parameter, terms in traced.parameters.items():
            if len(terms) >= rank:
                for leaf in _leaves(terms[:1]):
                    sources.setdefault(leaf, parameter)
    for parameter, terms in traced.parameters.items():
        for leaf in _leaves(terms):
            sources.setdefault(leaf, parameter)
    names: dict[Unknown, str] = {}
    for leaf in free:
        stem = sources[leaf].rpartition(".")[0] or sources[leaf]
        taken = set(names.values())
        name, count = stem, 2
        while name in taken:
            name, count = f"{stem}:{count}", count + 1
        names[leaf] = name
    return names


def _pinned(traced: Traced) -> Iterable[Pinned]:
    for name, terms in traced.parameters.items():
        for axis, term in enumerate(terms):
            for reason, size in _held(normal(term)).items():
                yield Pinned(name, axis, size, reason.kind, reason.operator, reason.text)


def _held(term: Any) -> dict[Reason, int]:
    if isinstance(term, Unknown):
        return {term.pinned: term.size} if term.pinned else {}
    sizes: dict[Reason, int] = {}
    for part in map(_held, term.parts):
        for reason, size in part.items():
            known = sizes.get(reason)
            sizes[reason] = size if known is None else known * size if isinstance(term, Product) else known + size
    return sizes


def _points(traced: Traced, layout: Mapping[str, tuple[Term, ...]], names: Mapping[Unknown, str]) -> Iterable[Point]:
    """Choose where to look at each group: as it enters a module whose weights hold it, else as it last leaves one."""
    consumed: dict[str, set[str]] = {}
    for parameter, terms in layout.items():
        if len(terms) >= 2:
            consumed.setdefault(parameter.rpartition(".")[0], set()).update(groups_of(terms))
    candidates = [
        (record, Point(record.module, record.call, record.side, axis, len(record.axes), resolved))
        for record in traced.recorded
        for axis, resolved in enumerate(_resolve(term, names) for term in record.axes)
        if groups_of([resolved])
    ]
    seen: set[str] = set()
    shown: set[int] = set()
    for record, point in candidates:
        if record.side == "input" and (here := groups_of([point.term]) & consumed.get(record.module, set())):
            seen |= here
            shown.add(id(record))
    last = {g: record for record, point in candidates if point.side == "output" for g in groups_of([point.term])}
    shown |= {id(record) for group, record in last.items() if group not in seen}
    # with every axis that holds units: a view of some must know whether another order stands beside them
    yield from (point for record, point in candidates if id(record) in shown)
