"""Where the groups of a symmetry run through a network: modules as rows in order of execution, groups as lanes.

The layout of `drawing`, without a word about ink.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .symmetry import Pinned, Symmetry
from .terms import groups_of

Role = Literal["out", "in", "through", "each"]

_BLOCK = re.compile(r"(?:.*?\.)??(?:\w*\d\.)+")


@dataclass(frozen=True)
class Chart:
    """A symmetry laid out.

    Attributes:
        modules: Names of the modules that hold units of a group, or an axis pinned for want of a rule; in order of
            execution. The name of a parameter that belongs to the model itself is "".
        lanes: For each group the lane in which it runs; lanes are numbered from 0, longest groups first.
        spans: For each group its first and its last row.
        marks: For each row and group what the module does with the units: "out", it makes them; "in", it reads them;
            "through", both, as a depthwise convolution does; "each", it acts on them one by one, as norms do.
        unruled: For each row that has an axis pinned for want of a rule, the operators.
    """

    modules: tuple[str, ...]
    lanes: Mapping[str, int]
    spans: Mapping[str, tuple[int, int]]
    marks: Mapping[tuple[int, str], Role]
    unruled: Mapping[int, tuple[str, ...]]

    @property
    def width(self) -> int:
        """Number of lanes."""
        return max(self.lanes.values(), default=-1) + 1


def chart(symmetry: Symmetry) -> Chart:
    """Lay a symmetry out.

    >>> from torch import nn, ones
    >>> from .derive import symmetry
    >>> found = chart(symmetry(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), ones(2, 4)))
    >>> found.modules, dict(found.marks)
    (('0', '2'), {(0, '0'): 'out', (1, '0'): 'in'})
    """
    operators: dict[str, dict[str, None]] = {}
    for item in symmetry.unruled:
        operators.setdefault(module_of(item.name), {})[item.operator] = None
    marks = _marks(symmetry)
    shown = {module for module, _ in marks} | operators.keys()
    modules = [module for module in execution_order(symmetry) if module in shown]
    row_of = {module: row for row, module in enumerate(modules)}
    rows: dict[str, list[int]] = {}
    for module, group in marks:
        rows.setdefault(group, []).append(row_of[module])
    spans = {group.name: (min(rows[group.name]), max(rows[group.name])) for group in symmetry.groups}
    return Chart(
        tuple(modules),
        pack(spans),
        spans,
        {(row_of[module], group): role for (module, group), role in marks.items()},
        {row_of[module]: tuple(names) for module, names in operators.items()},
    )


def count_units(symmetry: Symmetry) -> int:
    """Count units: of a group that lies within others, those at each of their positions."""
    return sum(
        group.size * math.prod(symmetry.by_name[name].size for name in group.within) for group in symmetry.groups
    )


def module_of(parameter: str) -> str:
    """Name the module that a parameter or buffer belongs to."""
    return parameter.rpartition(".")[0]


def execution_order(symmetry: Symmetry) -> list[str]:
    """List the modules that have parameters or buffers, in the order in which they run.

    That order is known of modules that read a group. One that reads an input of the network comes before the first that
    reads what it makes; any other, such as a norm, follows the one before it in the order of registration.
    """
    entering = _entering(symmetry)
    rank = {module: place for place, module in enumerate(entering)}
    made: dict[str, set[str]] = {}
    for name, terms in symmetry.layout.items():
        made.setdefault(module_of(name), set()).update(groups_of(terms))
    sources = {module_of(item.name) for item in symmetry.pinned if item.kind == "input" or _is_looked_up(item)}
    key, keys = (-1, 1), {}  # place, and -1 before or 1 after the module that has it
    for module, groups in made.items():
        readers = [rank[other] for other, found in entering.items() if found & groups] if module in sources else []
        if module in rank:
            key = (rank[module], 0)
        elif readers:
            key = min(readers), -1
        else:
            key = key[0], key[1] or 1
        keys[module] = key
    return sorted(made, key=lambda module: keys[module])


def _entering(symmetry: Symmetry) -> dict[str, set[str]]:
    """For each module that reads groups, these groups; in order of execution."""
    found: dict[str, set[str]] = {}
    for point in symmetry.points:
        if point.side == "input":
            found.setdefault(point.module, set()).update(groups_of([point.term]))
    return found


def _is_looked_up(item: Pinned) -> bool:
    return item.operator == "embedding" and item.axis == 0


def pack(spans: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Give each span a lane in which nothing else lies on its rows; the longest, such as residual streams, come first.

    >>> pack({"a": (0, 1), "stream": (1, 9), "b": (2, 3)})
    {'a': 1, 'stream': 0, 'b': 1}
    """
    lanes: dict[str, int] = {}
    taken: list[set[int]] = []
    for group in sorted(spans, key=lambda name: (spans[name][0] - spans[name][1], spans[name][0])):
        first, last = spans[group]
        rows = set(range(first, last + 1))
        lane = next((lane for lane, others in enumerate(taken) if rows.isdisjoint(others)), len(taken))
        if lane == len(taken):
            taken.append(set())
        taken[lane] |= rows
        lanes[group] = lane
    return {group: lanes[group] for group in spans}


def fold(modules: Sequence[str], count: int) -> list[range]:
    """Cut rows into that many columns of like length, where a block of the network begins if one is near.

    >>> fold(["stem", "a.0.x", "a.0.y", "a.1.x", "a.1.y", "head"], 2)
    [range(0, 3), range(3, 6)]
    """
    total = len(modules)
    length = total / count
    starts = [row for row in range(1, total) if block_of(modules[row]) != block_of(modules[row - 1])]
    cuts = [0]
    for ideal in (round(length * column) for column in range(1, count)):
        near = [row for row in starts if abs(row - ideal) <= length / 6]
        cuts.append(max(cuts[-1], min(near, key=lambda row: abs(row - ideal), default=ideal)))
    return [range(first, last) for first, last in zip(cuts, [*cuts[1:], total], strict=True) if first < last]


def block_of(module: str) -> str:
    """Name the repeated block that a module is part of, by the first numbers in its path; "" outside of any.

    >>> [block_of(name) for name in ("layer1.0.downsample.0", "model.layers.11.mlp.up_proj", "fc1")]
    ['layer1.0', 'model.layers.11', '']
    """
    found = _BLOCK.match(module)
    return found[0].removesuffix(".") if found else ""


def _marks(symmetry: Symmetry) -> dict[tuple[str, str], Role]:
    entering = _entering(symmetry)
    biased: dict[str, set[str]] = {}
    for name, terms in symmetry.layout.items():
        if len(terms) == 1:
            biased.setdefault(module_of(name), set()).update(groups_of(terms))
    looked_up = {item.name for item in symmetry.pinned if _is_looked_up(item)}
    marks: dict[tuple[str, str], Role] = {}
    for name, terms in symmetry.layout.items():
        module, held = module_of(name), [groups_of([term]) for term in terms]
        sizes, enters = [term.size for term in terms], entering.get(module, set())
        vector = sum(size > 1 for size in sizes) < 2 or not any(held[:-1])
        if len(held) < 2 or (vector and not name.endswith("weight")):
            found: list[tuple[set[str], Role]] = [(set().union(*held), "each")]  # added or multiplied unit by unit
        elif name in looked_up:
            found = [(held[1] & enters, "in"), (held[1] - enters, "out")]  # the head may be tied to it
        else:
            made, read = _flow(held, sizes, enters, biased.get(module, set()))
            found = [(made - read, "out"), (read - made, "in"), (made & read, "through")]
        for groups, role in found:
            for group in groups:
                marks[module, group] = _both(marks.get((module, group), "each"), role)
    return marks


def _both(one: Role, other: Role) -> Role:
    """Join what two parameters of a module do with the same units."""
    if one == other or other == "each":
        return one
    return other if one == "each" else "through"


def _flow(
    held: Sequence[set[str]], sizes: Sequence[int], enters: set[str], biased: set[str]
) -> tuple[set[str], set[str]]:
    """Tell what a weight makes from what it reads: outputs come first, but in transposed convolutions and in GPT-2.

    Args:
        held: For each axis the groups on it.
        sizes: Of each axis.
        enters: Groups that are seen to enter the module.
        biased: Groups of its vectors, such as the bias.
    """
    inputs_first = bool(held[0]) and held[0] <= enters and not held[1] & enters and sizes[1] > 1
    inputs_first = inputs_first or bool(held[1] & biased - held[0])
    made = held[1 if inputs_first else 0]
    others = [held[0], *held[2:]] if inputs_first else held[1:]
    return made, set().union(*others) | (made & enters)
