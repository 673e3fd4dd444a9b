"""Groups by hand: what to add to a derived symmetry, and which orders to hold. `verify` decides as on any other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..base.errors import SymmetryError, nearest
from .symmetry import Group, Pinned, Symmetry
from .terms import Fixed, Product, Sum, Term, Units, groups_of

Axis = tuple[str, int]


def add_group(symmetry: Symmetry, name: str, axes: Iterable[Axis]) -> Symmetry:
    """State that some axes, which keep their order so far, are permuted together as one more free group.

    Args:
        symmetry: Derived before; it stays as it is.
        name: Of the new group.
        axes: (parameter or buffer, axis), all of one size; axes count from the end where they are negative. A tensor
            with two names is stated under both.

    Returns:
        Another symmetry, of which nothing is verified.

    Raises:
        SymmetryError: The name is taken; an axis does not exist, differs in size or belongs to a group.

    >>> found = Symmetry((), (), {"up.weight": (Fixed(8), Fixed(4)), "down.weight": (Fixed(3), Fixed(8))})
    >>> more = add_group(found, "hidden", [("up.weight", 0), ("down.weight", 1)])
    >>> more.groups[0].size, more.layout["down.weight"]
    (8, (Fixed(size=3), Units(group='hidden', size=8)))
    """
    if name in symmetry.by_name:
        raise SymmetryError(f"group {name!r} exists already, on {_listed(symmetry.by_name[name].axes)}; choose another")
    chosen = [_axis(symmetry, f"group {name!r}", axis) for axis in axes]
    if not chosen:
        raise SymmetryError(f"group {name!r} has no axes; give (parameter or buffer, axis) pairs")
    size = _common_size(symmetry, name, chosen)
    layout = {key: list(terms) for key, terms in symmetry.layout.items()}
    for key, axis in chosen:
        layout[key][axis] = Units(name, size)
    return _changed(
        symmetry,
        groups=(*symmetry.groups, Group(name, size, "free", tuple(dict.fromkeys(chosen)))),
        pinned=tuple(item for item in symmetry.pinned if (item.name, item.axis) not in chosen),
        layout={key: tuple(terms) for key, terms in layout.items()},
    )


def hold_groups(symmetry: Symmetry, hold: str | Axis | Iterable[str | Axis]) -> Symmetry:
    """Have some groups keep their order.

    A group that lies within a held one keeps a single order, the same at all positions of what is held: that is part
    of what it was allowed, and smaller than it.

    Args:
        symmetry: Derived before; it stays as it is.
        hold: Names of groups, or (parameter or buffer, axis), which stand for all groups of that axis; there need
            not be any.

    Returns:
        A smaller symmetry, which holds if the given one does.

    Raises:
        SymmetryError: There is no such group or axis.
    """
    one = isinstance(hold, str) or (isinstance(hold, tuple) and len(hold) == 2 and isinstance(hold[1], int))
    held: set[str] = set()
    for item in [hold] if one else hold:  # type: ignore[list-item]
        if isinstance(item, str) and item not in symmetry.by_name:
            raise SymmetryError(f"hold: there is no group {item!r}{nearest(item, symmetry.by_name)}")
        if isinstance(item, str):
            held.add(item)
        else:
            key, axis = _axis(symmetry, "hold", item)
            held |= groups_of([symmetry.layout[key][axis]])
    return _without(symmetry, held) if held else symmetry


def _without(symmetry: Symmetry, held: set[str]) -> Symmetry:
    pinned = [
        Pinned(key, axis, size, "held", "hold", "held by request")
        for key, terms in symmetry.layout.items()
        for axis, term in enumerate(terms)
        if (size := _positions(term, held))
    ]
    points = [dataclasses.replace(point, term=_fixed(point.term, held)) for point in symmetry.points]
    within = {g.name: tuple(name for name in g.within if name not in held) for g in symmetry.groups}
    outer = {name for group, others in within.items() if group not in held for name in others}
    groups = [
        dataclasses.replace(group, kind=_kind(group, within[group.name], outer), within=within[group.name])
        for group in symmetry.groups
        if group.name not in held
    ]
    return _changed(
        symmetry,
        groups=tuple(groups),
        pinned=(*symmetry.pinned, *pinned),
        layout={key: tuple(_fixed(term, held) for term in terms) for key, terms in symmetry.layout.items()},
        points=tuple(point for point in points if groups_of([point.term])),
    )


def _kind(group: Group, within: Sequence[str], outer: set[str]) -> str:
    if group.kind not in ("blocks", "within"):
        return group.kind  # heads stay heads
    return "within" if within else "blocks" if group.name in outer else "free"


def _changed(symmetry: Symmetry, **changes: Any) -> Symmetry:
    """Replace fields; what was measured of the symmetry before says nothing of the new one."""
    return dataclasses.replace(symmetry, verification=None, **changes)


def _fixed(term: Term, held: set[str]) -> Term:
    match term:
        case Units(group, size):
            return Fixed(size) if group in held else term
        case Product(parts) | Sum(parts):
            parts = tuple(_fixed(part, held) for part in parts)
            return Fixed(term.size) if all(isinstance(part, Fixed) for part in parts) else type(term)(parts)
        case _:
            return term


def _positions(term: Term, held: set[str]) -> int:
    """Count the positions of some groups in an axis; 0: none is there."""
    match term:
        case Units(group, size):
            return size if group in held else 0
        case Sum(parts):
            return sum(_positions(part, held) for part in parts)
        case Product(parts):
            counts = [count for part in parts if (count := _positions(part, held))]
            return math.prod(counts) if counts else 0
        case _:
            return 0


def _axis(symmetry: Symmetry, what: str, axis: Any) -> Axis:
    if not (isinstance(axis, tuple) and len(axis) == 2 and isinstance(axis[0], str) and isinstance(axis[1], int)):
        raise SymmetryError(f"{what}: {axis!r} is no (parameter or buffer, axis) pair, such as ('fc.weight', 0)")
    name, at = axis
    if name not in symmetry.shapes:
        raise SymmetryError(f"{what}: there is no parameter or buffer {name!r}{nearest(name, symmetry.shapes)}")
    shape = symmetry.shapes[name]
    if not -len(shape) <= at < len(shape):
        raise SymmetryError(f"{what}: {name} of shape {shape} has no axis {at}; axes count from 0")
    return name, at % len(shape)


def _common_size(symmetry: Symmetry, name: str, axes: Sequence[Axis]) -> int:
    """Give the size of axes that can become a group."""
    first = axes[0]
    size = symmetry.shapes[first[0]][first[1]]
    for key, axis in axes:
        found = symmetry.shapes[key][axis]
        there = sorted(groups_of([symmetry.layout[key][axis]]))
        if found != size:
            raise SymmetryError(
                f"group {name!r}: axis {axis} of {key} has {found} positions, but axis {first[1]} of {first[0]} has "
                f"{size}; all axes of a group have one size"
            )
        if there:
            raise SymmetryError(
                f"group {name!r}: axis {axis} of {key} belongs to group {', '.join(there)}; hold that first, with "
                f"hold={there}"
            )
        if key in symmetry.unsaved:
            raise SymmetryError(f"group {name!r}: a state dict does not hold {key}, so that it cannot be permuted")
    if size < 2:
        raise SymmetryError(f"group {name!r}: axis {first[1]} of {first[0]} has size {size}: nothing to permute")
    return size


def _listed(axes: Iterable[Axis]) -> str:
    return ", ".join(f"axis {axis} of {key}" for key, axis in axes)


def overridden(
    symmetry: Symmetry,
    add: Mapping[str, Iterable[Axis]] | None,
    hold: str | Axis | Iterable[str | Axis],
    aliases: Mapping[str, Sequence[str]],
) -> Symmetry:
    """Hold some groups and then add others, so that a held one can be stated anew.

    Args:
        symmetry: Derived before.
        add: See `add_group`.
        hold: See `hold_groups`.
        aliases: All names of every tensor that has several; what is added under one is added under all.
    """
    symmetry = hold_groups(symmetry, hold)
    for name, axes in (add or {}).items():
        pairs = [_axis(symmetry, f"group {name!r}", axis) for axis in axes]
        symmetry = add_group(symmetry, name, [(key, at) for first, at in pairs for key in aliases.get(first, [first])])
    return symmetry
