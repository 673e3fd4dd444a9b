"""The permutation symmetry of a network: which axes of which parameters must be permuted together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.architecture import check_same_architecture, full_state
from ..base.errors import SymmetryError
from ..base.files import PathLike, write_atomic
from .terms import Term, from_json, to_json

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes

    from .permutation import Permutation
    from .verification import Verification

FORMAT = "isthmus symmetry 1"


@dataclass(frozen=True)
class Group:
    """Units that are permuted together.

    Attributes:
        name: The module whose output they are, where there is one.
        size: Number of units.
        kind: "free"; "heads" (attention heads, which move as wholes); "blocks" (each unit is a block of the units of
            other groups, and moves as a whole); "within" (one permutation for each block of the groups named in
            `within`). Heads of queries that share keys have both: they lie within the heads of keys.
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
            found no structure), "unused", "held" (by request).
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
        unsaved: Buffers that a state dict does not hold.
        outputs: Keys or places of the outputs that stay as they are; None: see `align.outputs.chosen`.
        verification: What was measured of it; None: nothing yet.
        buffers: Names in the layout that are buffers, and no parameters.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]
    layout: Mapping[str, tuple[Term, ...]]
    points: tuple[Point, ...] = ()
    architecture: str = ""
    unsaved: tuple[str, ...] = field(default=(), repr=False)
    outputs: tuple[str | int, ...] | None = None
    verification: Verification | None = None
    buffers: tuple[str, ...] = field(default=(), repr=False)

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

    @property
    def order(self) -> float:
        """Natural logarithm of the number of permutations in the symmetry.

        A group of n units that lies within others has n! orders for each of their positions.

        >>> from isthmus import symmetry
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> found = symmetry(net, torch.ones(1, 2))
        >>> round(math.exp(found.order))  # 4! · 3!
        144
        """
        copies = {g.name: math.prod(self.by_name[outer].size for outer in g.within) for g in self.groups}
        return math.fsum(copies[g.name] * math.lgamma(g.size + 1) for g in self.groups)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw groups as lanes beside the modules that hold them; see `align.drawing.plot`."""
        from .drawing import plot

        return plot(self, ax)

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

    @property
    def is_verified(self) -> bool:
        """Whether it was measured, and holds."""
        return self.verification is not None and self.verification.passed

    def verified(self, model: nn.Module, example_inputs: Any, also: Sequence[Any] = ()) -> Symmetry:
        """Give a symmetry that is known to hold: itself if it was verified before, else a copy with the measurements.

        Args:
            model: Any network of the architecture.
            example_inputs: As in `symmetry`.
            also: Further ones; see `verify`.

        Raises:
            ArchitectureError: The symmetry belongs to another architecture.
            SymmetryError: It does not hold, with the groups that fail; or it cannot be measured.
        """
        self.check_fits(model, "the model")
        if self.is_verified:
            return self
        return replace(self, verification=self.verify(model, example_inputs, also=also).check())

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
            "outputs": None if self.outputs is None else list(self.outputs),
            "buffers": list(self.buffers),
            "verification": None if self.verification is None else self.verification.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any) -> Symmetry:
        """Read what `to_json` gave.

        Raises:
            SymmetryError: It is something else.
        """
        from .verification import Verification

        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise SymmetryError(f"not a saved symmetry (expected the format {FORMAT!r})")
        outputs, measured = value.get("outputs"), value.get("verification")  # older files have neither
        return cls(
            tuple(Group(n, s, k, tuple((a, i) for a, i in axes), tuple(w)) for n, s, k, axes, w in value["groups"]),
            tuple(Pinned(n, a, s, k, o, r) for n, a, s, k, o, r in value["pinned"]),
            {name: tuple(from_json(term) for term in terms) for name, terms in value["layout"].items()},
            tuple(Point(m, c, s, a, n, from_json(term)) for m, c, s, a, n, term in value["points"]),
            value["architecture"],
            tuple(value["unsaved"]),
            None if outputs is None else tuple(outputs),
            None if measured is None else Verification.from_json(measured),
            tuple(value.get("buffers", ())),
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
