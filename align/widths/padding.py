"""Two networks of unequal widths in one frame: groups that correspond, and tensors padded with zeros to common sizes.

In the frame every group has the larger of its two sizes, so that matching the two is a permutation of the frame: a unit
whose partner is padding is left over. An assignment in the frame is a rectangular assignment of the true units, since
in every group one side at most is padded, and padding is similar to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ...base.architecture import State, check_same_architecture
from ...base.batches import Batch
from ...base.errors import ArchitectureError, nearest
from ..permutation import Permutation
from ..probe import Probe, as_given, noise
from ..symmetry import Symmetry
from ..terms import Arranged, Dim, Fixed, Piece, Product, Sum, Term, Units, groups_of, pieces, take
from ..verify import change

Side = Literal["a", "b"]
SIDES: tuple[Side, Side] = ("a", "b")


@dataclass(frozen=True, eq=False)
class Frame:
    """What two networks of unequal widths have in common.

    Attributes:
        a: Symmetry of the first network.
        b: Symmetry of the second, its groups under the names that they have in the first.
        common: Every group with the larger of its two sizes.
    """

    a: Symmetry
    b: Symmetry
    common: Symmetry

    def symmetry(self, side: Side) -> Symmetry:
        """Give the symmetry of one network."""
        return self.a if side == "a" else self.b

    def wider(self, side: Side) -> bool:
        """Say whether a network is at least as wide as the other in every group."""
        return all(group.size == self.common.by_name[group.name].size for group in self.symmetry(side).groups)

    def pad(self, name: str, tensor: Tensor, side: Side, fill: float = 0) -> Tensor:
        """Embed a tensor of one network, by name, in the frame; the units that are not there hold `fill`."""
        result = tensor.new_full(self.common.shapes[name], fill)
        for own, large in self._pieces(name, side):
            block = tensor.new_full([dim.size for dim in large.dims], fill)
            block[tuple(slice(dim.size) for dim in own.dims)] = own.get(tensor.detach())
            large.put(result, block)
        return result

    def crop(self, name: str, tensor: Tensor, side: Side) -> Tensor:
        """Cut a tensor of one network, by name, out of the frame."""
        result = tensor.new_zeros(self.symmetry(side).shapes[name])
        for own, large in self._pieces(name, side):
            own.put(result, large.get(tensor)[tuple(slice(dim.size) for dim in own.dims)])
        return result

    def labels(self, group: str, side: Side, permutation: Permutation | None = None) -> Tensor:
        """Number the units of a group in one network along the frame; -1 where it has none.

        Args:
            group: Which; of one that lies within others every unit at all their positions is counted.
            side: Which network.
            permutation: Of the frame, to be applied first.

        Returns:
            (units in the frame,), flat over the groups that it lies within, int64.
        """
        own, common = self.symmetry(side).by_name, self.common.by_name
        names = [*common[group].within, group]
        sizes = [own[name].size for name in names]
        result = torch.full([common[name].size for name in names], -1)
        count = int(torch.tensor(sizes).prod())
        result[tuple(map(slice, sizes))] = torch.arange(count).reshape(sizes)
        if permutation is not None:
            dims = tuple(Dim(name, common[name].size, 0) for name in names)
            result = take(result, Piece(dims, (None,)), permutation.indices, self.common.within)
        return result.flatten()

    def _pieces(self, name: str, side: Side) -> zip[tuple[Piece, Piece]]:
        return zip(pieces(self.symmetry(side).layout[name]), pieces(self.common.layout[name]), strict=True)


def frame(a: Symmetry, b: Symmetry) -> Frame:
    """Bring the groups of two networks into correspondence: by the axes that they lie in, whatever their names.

    Args:
        a: Symmetry of the first network.
        b: Symmetry of the second: the same architecture, its sizes different along axes of groups only.

    Raises:
        ArchitectureError: The parameters differ in name or rank, or along an axis that keeps its order, or their groups
            do not correspond; with both shapes.

    >>> from isthmus import symmetry
    >>> make = lambda n: torch.nn.Sequential(torch.nn.Linear(2, n), torch.nn.ReLU(), torch.nn.Linear(n, 1))
    >>> found = frame(*(symmetry(make(n), torch.ones(1, 2)) for n in (3, 5)))
    >>> found.wider("a"), found.wider("b"), found.pad("0.bias", torch.ones(3), "a").tolist()
    (False, True, [1.0, 1.0, 1.0, 0.0, 0.0])
    """
    _check_parameters(a, b)
    names: dict[str, str] = {}
    layout: dict[str, tuple[Term, ...]] = {}
    for name, terms in a.layout.items():
        layout[name] = tuple(_corresponding((name, axis), (a, b), names) for axis in range(len(terms)))
    _check_nesting(a, b, names)
    sizes = {names[group.name]: group.size for group in b.groups}
    groups = tuple(replace(group, size=max(group.size, sizes[group.name])) for group in a.groups)
    common = Symmetry(groups, (), layout, architecture=a.architecture, unsaved=a.unsaved)
    return Frame(a, _renamed(b, names), common)


def transfer(both: Frame, permutation: Permutation, source: nn.Module | State, side: Side) -> dict[str, Tensor]:
    """Bring one network into the shape and order of the other: matched units only, zeros where it has none.

    Args:
        both: The frame.
        permutation: Of the frame; brings b into the order of a.
        source: The network, or its state dict.
        side: Which of the two it is.

    Returns:
        A state dict for the other's architecture; variances that batch norms divide by are 1 where it has no unit.

    Raises:
        ArchitectureError: The network is of another architecture.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    own = both.symmetry(side)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in own.shapes.items()}
    needed = {name for name, terms in own.layout.items() if groups_of(terms)} - set(own.unsaved) | state.keys()
    known = {name: tensor for name, tensor in shapes.items() if name in needed}
    check_same_architecture(known, state, (f"network {side} of the matching", "what was passed"))
    step = permutation if side == "b" else permutation.inverse()
    other: Side = "a" if side == "b" else "b"
    found = {}
    for name, tensor in state.items():
        padded = both.pad(name, tensor, side, 1 if name.endswith("running_var") else 0)
        found[name] = both.crop(name, step.permute(name, padded), other)
    return found


def embedding_error(
    both: Frame, permutation: Permutation, models: tuple[nn.Module, nn.Module], example: Batch, seed: int = 0
) -> float | None:
    """Measure by how much zeros for surplus units change the outputs of the narrow network in the wide architecture.

    Args:
        both: The frame.
        permutation: Of the frame.
        models: Both networks. The narrow one is perturbed first, in a copy in float64, so that nothing is zero at
            initialisation.
        example: Inputs of the shapes to compare on.
        seed: Of the perturbation and of the noise that takes the place of the inputs.

    Returns:
        Largest change of any output relative to the largest one; None where neither network is the wider one.
    """
    if not (both.wider("a") or both.wider("b")):
        return None
    side: Side = "a" if both.wider("b") else "b"
    narrow, wide = models if side == "a" else models[::-1]
    generator = torch.Generator().manual_seed(seed)
    symmetry = both.symmetry(side)
    before, after = Probe(narrow, symmetry.outputs), Probe(wide, symmetry.outputs)
    moved = {name for name, terms in symmetry.layout.items() if groups_of(terms)}
    before.perturb(moved.__contains__, generator, 0.3)
    embedded = {**after.state, **transfer(both, permutation, before.state, side)}
    given = as_given(example, before.device)
    inputs = noise(given, generator)
    try:
        outputs = before.run(before.state, inputs)
    except Exception:  # a network may refuse numbers that make no sense to it
        inputs, outputs = given, before.run(before.state, given)
    return change(outputs, after.run(embedded, inputs))


def _check_parameters(a: Symmetry, b: Symmetry) -> None:
    for one, other, label in ((a, b, "a"), (b, a, "b")):
        for name, shape in one.shapes.items():
            if name not in other.shapes:
                raise ArchitectureError(
                    f"only network {label} has {name}, of shape {shape}{nearest(name, other.shapes)}; networks of "
                    "unequal widths need the same layers"
                )
            if len(other.shapes[name]) != len(shape):
                raise ArchitectureError(
                    f"{name} has shape {a.shapes[name]} in a and {b.shapes[name]} in b; widths may differ, not the "
                    "number of axes"
                )


def _check_nesting(a: Symmetry, b: Symmetry, names: Mapping[str, str]) -> None:
    for group in b.groups:
        mine, theirs = a.by_name[names[group.name]], tuple(names[outer] for outer in group.within)
        if mine.within != theirs:
            raise ArchitectureError(
                f"group {mine.name} lies within {mine.within or 'nothing'} in a, of {mine.size} units, and within "
                f"{theirs or 'nothing'} in b, of {group.size}; pass networks whose widths alone differ"
            )


def _corresponding(place: tuple[str, int], both: tuple[Symmetry, Symmetry], names: dict[str, str]) -> Term:
    name, axis = place
    shapes = [symmetry.shapes[name] for symmetry in both]
    try:
        return _joined(both[0].layout[name][axis], both[1].layout[name][axis], names)
    except ValueError as error:
        raise ArchitectureError(
            f"axis {axis} of {name}, of shape {shapes[0]} in a and {shapes[1]} in b, does not correspond: {error}. "
            "Pass networks of one architecture whose widths alone differ"
        ) from error


def _joined(x: Term, y: Term, names: dict[str, str]) -> Term:
    """Join two terms to one of the larger sizes, and note which group of b is which of a; ValueError says why not."""
    if isinstance(x, Arranged) or isinstance(y, Arranged):  # a fixed order depends on the sizes; the frame needs none
        return _joined(_unarranged(x), _unarranged(y), names)
    if isinstance(x, Units) and isinstance(y, Units):
        known = next((theirs for theirs, mine in names.items() if mine == x.group), y.group)
        if names.setdefault(y.group, x.group) != x.group or known != y.group:
            other = known if known != y.group else names[y.group]
            raise ValueError(f"it is group {x.group} in a and {y.group} in b, of which one is {other} elsewhere")
        return Units(x.group, max(x.size, y.size))
    if isinstance(x, Fixed) and isinstance(y, Fixed):
        if x.size != y.size:
            raise ValueError(f"it keeps its order, and is {x.size} long in a and {y.size} in b")
        return x
    for kind in (Product, Sum):
        if isinstance(x, kind) and isinstance(y, kind) and len(x.parts) == len(y.parts):
            return kind(tuple(_joined(one, other, names) for one, other in zip(x.parts, y.parts, strict=True)))
    raise ValueError(f"it is made of {_described(x)} in a and of {_described(y)} in b")


def _unarranged(term: Term) -> Term:
    return term.part if isinstance(term, Arranged) else term


def _described(term: Term) -> str:
    match term:
        case Units(group, size):
            return f"{size} units of {group}"
        case Fixed(size):
            return f"{size} positions that keep their order"
        case Product(parts):
            return "(" + " times ".join(map(_described, parts)) + ")"
        case Sum(parts):
            return "(" + " and then ".join(map(_described, parts)) + ")"
        case Arranged(part):
            return _described(part)


def _renamed(symmetry: Symmetry, names: Mapping[str, str]) -> Symmetry:
    def term(old: Term) -> Term:
        match old:
            case Units(group, size):
                return Units(names[group], size)
            case Product(parts):
                return Product(tuple(map(term, parts)))
            case Sum(parts):
                return Sum(tuple(map(term, parts)))
            case Arranged(part, order):
                return Arranged(term(part), order)
        return old

    def within(outer: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names[name] for name in outer)

    return replace(
        symmetry,
        groups=tuple(replace(g, name=names[g.name], within=within(g.within)) for g in symmetry.groups),
        layout={name: tuple(map(term, terms)) for name, terms in symmetry.layout.items()},
        points=tuple(replace(point, term=term(point.term)) for point in symmetry.points),
    )
