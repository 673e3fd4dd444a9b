"""A symmetry in words: what keeps its order and why, a table of the groups, how many permutations there are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from isthmus.align.lanes import count_units

from .folding import fold
from .plain import percent, table

if TYPE_CHECKING:
    from isthmus.align import Group, Pinned, Symmetry

_WIDTH = 100  # of a list of names, after which it is cut short
_MODULE = re.compile(r" in (\S+)")
_HELD = {"input": "of inputs", "output": "of outputs", "position": "of positions", "unused": "unused"}
_REMEDY = "remedy: write a rule for the operator (docs/extending.md), or state the group: symmetry(..., add=...)"


def symmetry_lines(found: Symmetry, share: float, *, everything: bool = False) -> Iterator[str]:
    """List a symmetry: first what is pinned and why, then the groups, then what they amount to.

    Args:
        found: The symmetry.
        share: Of the parameters, how many belong to a tensor with an axis that can be permuted; from 0 to 1.
        everything: List every axis. Default: axes of the same kind are counted, and groups that differ in nothing but
            the numbers in their names share a row.
    """
    yield from _pinned_lines(found, everything)
    yield ""
    if found.groups:
        yield from _group_table(found, everything)
        yield ""
    yield (
        f"{found.architecture}: {_counted(len(found.groups), 'group')}, {_counted(count_units(found), 'unit')}, "
        f"{_permutations(found.order)}; {percent(share)} of the parameters have an axis to permute; {_verified(found)}"
    )


def _verified(found: Symmetry) -> str:
    measured = found.verification
    if measured is None:
        return "not verified"
    return f"{'verified' if measured.passed else 'verification failed'} (error {measured.error:.1g})"


def _permutations(order: float) -> str:
    if order < math.log(1e9):
        return _counted(round(math.exp(order)), "permutation")
    return f"10^{order / math.log(10):,.0f} permutations"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun if count == 1 else 'axes' if noun == 'axis' else f'{noun}s'}"


def _shortened(patterns: Mapping[str, Sequence[str]], noun: str) -> str:
    """List patterns until the line is full, then how many names are left."""
    shown: list[str] = []
    left = sum(map(len, patterns.values()))
    for pattern, names in patterns.items():
        if shown and sum(map(len, shown)) + len(pattern) > _WIDTH:
            return f"{', '.join(shown)} and {_counted(left, noun)} more"
        shown.append(pattern)
        left -= len(names)
    return ", ".join(shown)


# What is pinned


def _pinned_lines(found: Symmetry, everything: bool) -> Iterator[str]:
    sections: dict[str, list[Pinned]] = {}
    unruled = set(found.unruled)
    for item in found.pinned:
        sections.setdefault("unruled" if item in unruled else _section(item), []).append(item)
    if "unruled" in sections:
        yield "pinned for want of a rule; the true symmetry may be larger:"
        yield from _by_operator(sections.pop("unruled"), everything)
        yield f"  {_REMEDY}"
    else:
        yield "nothing is pinned for want of a rule"
    for heading, items in ((name, items) for name, items in sections.items() if name not in _HELD):
        yield f"{heading}:"
        yield from _by_operator(items, everything)
    held = {kind: sections[kind] for kind in _HELD if kind in sections}
    if held:
        counts = ", ".join(f"{len(items):,} {_HELD[kind]}" for kind, items in held.items())
        yield f"axes that keep their order by meaning: {counts}" + (":" if everything else " (--all lists them)")
    if everything:
        yield from (_axis_line(item) for items in held.values() for item in items)


def _section(item: Pinned) -> str:
    if item.kind in _HELD:
        return item.kind
    if item.operator == "constant":
        return "pinned by a constant, a tensor that is no parameter"
    return "pinned by an operator" if item.kind == "operator" else f"pinned: {item.kind}"


def _by_operator(items: Iterable[Pinned], everything: bool) -> Iterator[str]:
    """List axes, or count them by operator and by what it says of them."""
    if everything:
        yield from map(_axis_line, items)
        return
    alike: dict[tuple[str, str], dict[str, list[Pinned]]] = {}
    for item in items:
        where = _MODULE.search(item.reason)
        module = where[1] if where else item.name.rpartition(".")[0] or "the model"
        why = item.reason.replace(f" in {module}", "").removeprefix(f"{item.operator} ")
        alike.setdefault((item.operator, why), {}).setdefault(module, []).append(item)
    for (operator, why), modules in alike.items():
        axes = sum(map(len, modules.values()))
        reason = "" if operator == "constant" or why == f"no rule for {operator}" else f" ({why})"
        yield f"  {operator}: {_counted(axes, 'axis')}, in {_shortened(fold(modules), 'module')}{reason}"


def _axis_line(item: Pinned) -> str:
    return f"  {item.name}[{item.axis}] ({item.size}): {item.operator}: {item.reason}"


# The groups


def _group_table(found: Symmetry, everything: bool) -> Iterator[str]:
    rows = [[group] for group in found.groups] if everything else _alike(found.groups)
    names = [next(iter(fold(group.name for group in row))) for row in rows]
    kinds = _flush(["kind", *map(_kind, rows)])
    axes = _flush(["parameters [axis]", *(_axes(row, everything) for row in rows)])
    counts = ["count", *map(len, rows)]
    sizes = ["size", *(row[0].size for row in rows)]
    columns = [["group", *names], counts, sizes, kinds, axes]
    header, *cells = zip(*(columns[:1] + columns[2:] if everything else columns), strict=True)
    yield table(header, cells)


def _flush(cells: Sequence[str]) -> list[str]:
    """Make cells equally wide, so that a table leaves them flush left."""
    width = max(map(len, cells))
    return [cell.ljust(width) for cell in cells]


def _alike(groups: Sequence[Group]) -> list[list[Group]]:
    """Put groups together that differ in nothing but numbers, as long as one pattern names them."""
    shapes: dict[object, dict[str, Group]] = {}
    for group in groups:
        shapes.setdefault(_shape(group), {})[group.name] = group
    rows = [[alike[name] for name in names] for alike in shapes.values() for names in fold(alike).values()]
    place = {group.name: at for at, group in enumerate(groups)}
    return sorted(rows, key=lambda row: place[row[0].name])


def _shape(group: Group) -> object:
    def bare(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    axes = tuple((bare(name), axis) for name, axis in group.axes)
    return bare(group.name), group.size, group.kind, axes, tuple(map(bare, group.within))


def _kind(row: Sequence[Group]) -> str:
    outer = list(zip(*(group.within for group in row), strict=True))
    if not outer:
        return row[0].kind
    names = " and ".join(_shortened(fold(dict.fromkeys(names)), "group") for names in outer)
    return f"within {names}" if row[0].kind == "within" else f"{row[0].kind} within {names}"


def _axes(row: Sequence[Group], everything: bool) -> str:
    names = dict.fromkeys(f"{name}[{axis}]" for group in row for name, axis in group.axes)
    return ", ".join(names) if everything else _shortened(fold(names), "axis")
