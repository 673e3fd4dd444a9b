"""The permutation symmetry of a network: which axes of which parameters must be permuted together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.architecture import check_same_architecture, full_state
from ..base.batches import Batch
from ..base.errors import SymmetryError
from ..base.files import PathLike, write_atomic
from . import rules_compute, rules_shape  # noqa: F401  (they fill the registry)
from .terms import Fixed, Product, Sum, Term, Units, from_json, groups_of, leaves, to_json
from .trace import Traced, trace
from .unify import Reason, Unknown, dependencies, normal

if TYPE_CHECKING:
    import networkx as nx

    from .permutation import Permutation
    from .verify import Verification

FORMAT = "isthmus symmetry 1"


@dataclass(frozen=True)
class Group:
    """Units that are permuted together.

    Attributes:
        name: The module whose output they are, where there is one.
        size: Number of units.
        kind: "free"; "blocks" (each unit is a block of the units of other groups, and moves as a whole); "within" (one
            permutation for each block of the groups named in `within`).
        axes: Where the units occur: (parameter or buffer, axis).
        within: Names of the groups on whose position this group's permutation depends, outermost first.
    """

    name: str
    size: int
    kind: str
    axes: tuple[tuple[str, int], ...]
    within: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pinned:
    """An axis, or a part of one, that keeps its order.

    Attributes:
        name: Parameter or buffer.
        axis: Which of its axes.
        size: How many positions are held.
        kind: "input", "output", "position" (kernel offsets, tokens, pixels), "operator" (no rule, or a rule that
            found no structure), "unused".
        operator: The operator that demands it.
        reason: The same in words.
    """

    name: str
    axis: int
    size: int
    kind: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Point:
    """Where the units of groups can be seen as activations: an axis of what enters or leaves a module."""

    module: str
    call: int
    side: str
    axis: int
    ndim: int
    term: Term

    @property
    def layer(self) -> str:
        """Name under which the activation is captured."""
        return self.module if self.call == 1 else f"{self.module}#{self.call}"


@dataclass(frozen=True, eq=False)
class Symmetry:
    """All permutations of a network's units that leave its function unchanged.

    Attributes:
        groups: What can be permuted.
        pinned: What cannot, and why.
        layout: For every parameter and buffer a term for each axis.
        points: Where each group's units enter the module that consumes them.
        architecture: Class of the model that was traced.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]
    layout: Mapping[str, tuple[Term, ...]]
    points: tuple[Point, ...] = ()
    architecture: str = ""
    unsaved: tuple[str, ...] = field(default=(), repr=False)  # buffers that a state dict does not hold

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """Groups by name."""
        return {group.name: group for group in self.groups}

    @cached_property
    def within(self) -> dict[str, tuple[str, ...]]:
        """For each group, the groups that its permutation depends on."""
        return {group.name: group.within for group in self.groups}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer."""
        return {name: tuple(term.size for term in terms) for name, terms in self.layout.items()}

    @property
    def unruled(self) -> tuple[Pinned, ...]:
        """What is pinned for want of a rule: here the true symmetry may be larger."""
        return tuple(item for item in self.pinned if item.reason.startswith("no rule"))

    @cached_property
    def graph(self) -> nx.Graph:
        """Bipartite graph of parameter axes, `("axis", name, axis)`, and groups, `("group", name)`."""
        import networkx as nx

        graph = nx.Graph()
        for group in self.groups:
            graph.add_node(("group", group.name), bipartite=1, size=group.size, kind=group.kind)
            for name, axis in group.axes:
                graph.add_node(("axis", name, axis), bipartite=0, size=self.shapes[name][axis])
                graph.add_edge(("axis", name, axis), ("group", group.name))
        return graph

    def random(self, generator: torch.Generator | None = None) -> Permutation:
        """Draw a permutation uniformly from the whole symmetry.

        Args:
            generator: Source of randomness; None takes the global one.
        """
        from .permutation import Permutation

        def draw(group: Group) -> Tensor:
            outer = [self.by_name[name].size for name in group.within]
            count = int(torch.tensor(outer).prod()) if outer else 1
            rows = [torch.randperm(group.size, generator=generator) for _ in range(count)]
            return torch.stack(rows).reshape(*outer, group.size)

        return Permutation(self, {group.name: draw(group) for group in self.groups})

    def check_fits(self, model: nn.Module, what: str) -> None:
        """Refuse a model of another architecture.

        Raises:
            ArchitectureError: With the parameters and shapes that differ.
        """
        shapes = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        check_same_architecture(shapes, full_state(model), ("the symmetry", what))

    def identity(self) -> Permutation:
        """Give the permutation that changes nothing."""
        from .permutation import Permutation

        def arange(group: Group) -> Tensor:
            outer = [self.by_name[name].size for name in group.within]
            return torch.arange(group.size).expand(*outer, group.size).clone()

        return Permutation(self, {group.name: arange(group) for group in self.groups})

    def verify(self, model: nn.Module, example_inputs: Any, **options: Any) -> Verification:
        """Measure in float64 that random permutations leave the model's outputs unchanged; see `verify`."""
        from .verify import verify

        return verify(self, model, example_inputs, **options)

    def to_json(self) -> dict[str, Any]:
        """Give the whole as JSON values."""
        return {
            "format": FORMAT,
            "architecture": self.architecture,
            "groups": [[g.name, g.size, g.kind, [list(axis) for axis in g.axes], list(g.within)] for g in self.groups],
            "pinned": [[p.name, p.axis, p.size, p.kind, p.operator, p.reason] for p in self.pinned],
            "layout": {name: [to_json(term) for term in terms] for name, terms in self.layout.items()},
            "points": [[p.module, p.call, p.side, p.axis, p.ndim, to_json(p.term)] for p in self.points],
            "unsaved": list(self.unsaved),
        }

    @classmethod
    def from_json(cls, value: Any) -> Symmetry:
        """Read what `to_json` gave.

        Raises:
            SymmetryError: It is something else.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise SymmetryError(f"not a saved symmetry (expected the format {FORMAT!r})")
        return cls(
            tuple(Group(n, s, k, tuple((a, i) for a, i in axes), tuple(w)) for n, s, k, axes, w in value["groups"]),
            tuple(Pinned(n, a, s, k, o, r) for n, a, s, k, o, r in value["pinned"]),
            {name: tuple(from_json(term) for term in terms) for name, terms in value["layout"].items()},
            tuple(Point(m, c, s, a, n, from_json(term)) for m, c, s, a, n, term in value["points"]),
            value["architecture"],
            tuple(value["unsaved"]),
        )

    def save(self, path: PathLike) -> Path:
        """Write as a JSON file, whole or not at all."""
        return write_atomic(path, lambda temporary: temporary.write_text(json.dumps(self.to_json())))

    @classmethod
    def load(cls, path: PathLike) -> Symmetry:
        """Read a saved symmetry.

        Raises:
            SymmetryError: The file is missing, damaged or something else.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SymmetryError(f"{path} is not a saved symmetry: {error}") from error


def symmetry(model: nn.Module, example_inputs: Any, *, verify: bool = True) -> Symmetry:
    """Find which axes of a network's parameters can be permuted together without changing its function.

    The model runs once, in evaluation mode, on tensors without data; each operator states what it demands of the
    axes (see `trace`). The permutation symmetries of weight space are those of Hecht-Nielsen (1990).

    Args:
        model: Any module. It is not changed.
        example_inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs. Shapes and types matter;
            the values do not.
        verify: Measure afterwards that a random permutation leaves the outputs unchanged.

    Returns:
        The symmetry; `.groups`, `.pinned` and `.graph` show it.

    Raises:
        SymmetryError: The model cannot be traced, or the check fails.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = symmetry(net, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    >>> [(group.name, group.size, group.axes) for group in found.groups]
    [('0', 8, (('0.weight', 0), ('0.bias', 0), ('2.weight', 1)))]
    """
    batch = as_example(example_inputs)
    found = _assemble(model, trace(model, batch))
    if verify:
        found.verify(model, batch).check()
    return found


def as_example(example_inputs: Any) -> Batch:
    """Read example inputs: a tensor, positional inputs in a tuple or list, keyword inputs in a mapping, or a batch."""
    match example_inputs:
        case Batch():
            return Batch(example_inputs.args, example_inputs.kwargs)
        case Tensor():
            return Batch((example_inputs,))
        case Mapping():
            return Batch((), dict(example_inputs))
        case tuple() | list():
            return Batch(tuple(example_inputs))
        case _:
            raise SymmetryError(
                f"example_inputs is a {type(example_inputs).__name__}; expected a tensor, a tuple of positional inputs "
                "or a mapping of keyword inputs"
            )


def _assemble(model: nn.Module, traced: Traced) -> Symmetry:
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
    groups = [
        Group(
            names[leaf],
            leaf.size,
            "within" if depends[leaf] else "blocks" if leaf in outer else "free",
            tuple(axes[names[leaf]]),
            tuple(names[other] for other in depends[leaf]),
        )
        for leaf in free
    ]
    saved = set(model.state_dict(keep_vars=True))
    unsaved = tuple(name for name in layout if name not in saved)
    points = tuple(_points(traced, layout, names))
    return Symmetry(tuple(groups), tuple(_pinned(traced)), layout, points, type(model).__name__, unsaved)


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
    for record, point in candidates:
        if record.side == "input" and (here := groups_of([point.term]) & consumed.get(record.module, set())):
            seen |= here
            yield point
    last = {group: point for _, point in candidates if point.side == "output" for group in groups_of([point.term])}
    unseen = {id(point): point for group, point in last.items() if group not in seen}
    yield from unseen.values()
