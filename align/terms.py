"""Terms: how an axis of a tensor is made of units that may be permuted.

An axis is described by a term. A leaf is a set of units; `Product(a, b)` is the axis of every pair (a major,
b minor: what flattening makes); `Sum(a, b)` is a followed by b (what concatenation makes); `Arranged(a, order)` has the
positions of a in a fixed order (what shuffling makes). The same leaf may occur in many axes and more than once in one:
then one permutation acts on all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Units:
    """The units of a group: they are permuted together, by the group's permutation."""

    group: str
    size: int


@dataclass(frozen=True)
class Fixed:
    """Positions that stay where they are: inputs, outputs, pixels, kernel offsets."""

    size: int


@dataclass(frozen=True)
class Product:
    """Every combination of the factors' positions, the first factor slowest."""

    parts: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Length of the axis."""
        return math.prod(part.size for part in self.parts)


@dataclass(frozen=True)
class Sum:
    """The parts one after the other."""

    parts: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Length of the axis."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Arranged:
    """The positions of a part in another order: position p holds position `order[p]` of the part."""

    part: Any
    order: tuple[int, ...]

    @property
    def parts(self) -> tuple[Any]:
        """The part, in a tuple."""
        return (self.part,)

    @property
    def size(self) -> int:
        """Length of the axis."""
        return len(self.order)


Term = Units | Fixed | Product | Sum | Arranged

ONE = Product(())


def product(parts: Iterable[Any]) -> Any:
    """Join factors: nested products are opened, factors of size one dropped, a single factor stands alone.

    >>> product([Units("a", 3), Fixed(1)])
    Units(group='a', size=3)
    """
    flat = list(_flat(Product, parts, dropped=1))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concatenation(parts: Iterable[Any]) -> Any:
    """Join segments: nested sums are opened, empty segments dropped, a single segment stands alone."""
    flat = list(_flat(Sum, parts, dropped=0))
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def arranged(part: Any, order: Sequence[int]) -> Any:
    """Reorder positions: nothing is left of an order that changes nothing or moves whole segments only.

    >>> arranged(Sum((Units("a", 2), Units("b", 2))), (2, 3, 0, 1))
    Sum(parts=(Units(group='b', size=2), Units(group='a', size=2)))
    >>> arranged(Sum((Units("a", 2), Units("b", 2))), (0, 2, 1, 3)).order
    (0, 2, 1, 3)
    """
    if isinstance(part, Arranged):
        part, order = part.part, tuple(part.order[position] for position in order)
    if all(position == at for at, position in enumerate(order)):
        return part
    if isinstance(part, Sum):
        starts = list(itertools.accumulate((p.size for p in part.parts), initial=0))
        segments = dict(zip(starts, part.parts, strict=False))
        moved, at = [], 0
        while at < len(order) and (found := segments.get(order[at])) is not None:
            if tuple(order[at : at + found.size]) != tuple(range(order[at], order[at] + found.size)):
                break
            moved.append(found)
            at += found.size
        if at == len(order):
            return concatenation(moved)
    return Arranged(part, tuple(order))


def _flat(kind: type, parts: Iterable[Any], dropped: int) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, kind):
            yield from _flat(kind, part.parts, dropped)
        elif part.size != dropped:
            yield part


def leaves(term: Any) -> Iterator[Any]:
    """Iterate over the leaves of a term, in order."""
    if isinstance(term, (Product, Sum, Arranged)):
        for part in term.parts:
            yield from leaves(part)
    else:
        yield term


def groups_of(terms: Iterable[Term]) -> set[str]:
    """Name the groups that occur in some terms."""
    return {leaf.group for term in terms for leaf in leaves(term) if isinstance(leaf, Units)}


def to_json(term: Term) -> Any:
    """Write a term as JSON values: a size, `{"group", "size"}`, `["*", …]`, `["+", …]` or `["@", part, order]`."""
    match term:
        case Fixed(size):
            return size
        case Units(group, size):
            return {"group": group, "size": size}
        case Product(parts):
            return ["*", *map(to_json, parts)]
        case Sum(parts):
            return ["+", *map(to_json, parts)]
        case Arranged(part, order):
            return ["@", to_json(part), list(order)]


def from_json(value: Any) -> Term:
    """Read what `to_json` wrote.

    >>> from_json(to_json(Product((Units("a", 2), Fixed(3)))))
    Product(parts=(Units(group='a', size=2), Fixed(size=3)))
    """
    match value:
        case int():
            return Fixed(value)
        case {"group": group, "size": size}:
            return Units(group, size)
        case ["*", *parts]:
            return Product(tuple(map(from_json, parts)))
        case ["+", *parts]:
            return Sum(tuple(map(from_json, parts)))
        case ["@", part, order]:
            return Arranged(from_json(part), tuple(order))
        case _:
            raise ValueError(f"not a term: {value!r}")


@dataclass(frozen=True)
class Dim:
    """One dimension of a piece: the group whose units it enumerates (None: fixed), and the tensor axis it lies in."""

    group: str | None
    size: int
    axis: int


@dataclass(frozen=True)
class Piece:
    """A dense part of a tensor in which every dimension enumerates one leaf; permutations map it onto itself."""

    dims: tuple[Dim, ...]
    positions: tuple[Tensor | None, ...]  # per tensor axis; None: all of it

    @property
    def numel(self) -> int:
        """Number of its entries."""
        return math.prod(dim.size for dim in self.dims)

    @property
    def groups(self) -> list[str]:
        """Names of the groups of its dimensions, one for each."""
        return [dim.group for dim in self.dims if dim.group]

    def get(self, tensor: Tensor) -> Tensor:
        """Cut the piece out; a view where the piece is the whole tensor."""
        for axis, positions in enumerate(self.positions):
            if positions is not None:
                tensor = tensor.index_select(axis, positions.to(tensor.device))
        return tensor.reshape([dim.size for dim in self.dims])

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write the piece's values back, in place."""
        if all(positions is None for positions in self.positions):
            tensor.copy_(values.reshape(tensor.shape))
            return
        index = [
            torch.arange(size) if positions is None else positions
            for positions, size in zip(self.positions, tensor.shape, strict=True)
        ]
        grid = torch.meshgrid(*index, indexing="ij") if index else ()
        tensor[tuple(axis.to(tensor.device) for axis in grid)] = values.reshape([len(axis) for axis in index])

    def partner(self, dim: int, group: str) -> int | None:
        """Find the dimension of `group` on which `dim` depends: in the same axis if it is there, else in any."""
        found = [other for other, d in enumerate(self.dims) if d.group == group]
        same = [other for other in found if self.dims[other].axis == self.dims[dim].axis]
        return (same or found or [None])[0]

    def around(self, dim: int, within: Sequence[str]) -> list[int]:
        """List the dimensions on whose position the units of `dim` depend, outermost first, and `dim` itself.

        Args:
            dim: A dimension.
            within: The groups that its group lies within.
        """
        outer = [self.partner(dim, name) for name in within]
        return [*(other for other in outer if other is not None), dim]


def pieces(axes: Sequence[Term]) -> list[Piece]:
    """Cut a tensor into its dense pieces: one for each choice of a segment on every axis.

    Args:
        axes: A term for each axis of the tensor.
    """
    choices = [[(positions, dims) for positions, dims in _segments(term, axis)] for axis, term in enumerate(axes)]
    found = []
    for choice in itertools.product(*choices):
        whole = [
            torch.equal(positions, torch.arange(term.size)) for (positions, _), term in zip(choice, axes, strict=True)
        ]
        positions = tuple(None if full else chosen for full, (chosen, _) in zip(whole, choice, strict=True))
        found.append(Piece(tuple(dim for _, dims in choice for dim in dims), positions))
    return found


def _segments(term: Term, axis: int) -> list[tuple[Tensor, tuple[Dim, ...]]]:
    """List, for every segment, its positions on the axis (flat) and its dimensions."""
    match term:
        case Units(group, size):
            return [(torch.arange(size), (Dim(group, size, axis),))]
        case Fixed(size):
            return [(torch.arange(size), (Dim(None, size, axis),))]
        case Sum(parts):
            starts = itertools.accumulate((part.size for part in parts[:-1]), initial=0)
            return [
                (start + positions, dims)
                for start, part in zip(starts, parts, strict=True)
                for positions, dims in _segments(part, axis)
            ]
        case Arranged(part, order):
            places = torch.tensor(order).argsort()
            return [(places[positions], dims) for positions, dims in _segments(part, axis)]
        case Product(parts):
            combined: list[tuple[Tensor, tuple[Dim, ...]]] = [(torch.zeros(1, dtype=torch.long), ())]
            for part in parts:
                combined = [
                    ((outer[:, None] * part.size + inner).flatten(), (*dims, *more))
                    for outer, dims in combined
                    for inner, more in _segments(part, axis)
                ]
            return combined


def take(
    tensor: Tensor, piece: Piece, permutations: Mapping[str, Tensor], within: Mapping[str, tuple[str, ...]]
) -> Tensor:
    """Permute a piece: new[…, j, …] = old[…, p(j), …] in every dimension of a group that `permutations` names.

    Args:
        tensor: The piece's values, with `piece.dims` as dimensions.
        piece: What each dimension is.
        permutations: Per group, indices of shape (*sizes of the groups that it lies within, size).
        within: Per group, the groups on whose position its permutation depends, outermost first.
    """
    order = sorted(range(len(piece.dims)), key=lambda d: len(within.get(piece.dims[d].group or "", ())))
    for d in order:  # the outer ones first, so that an inner permutation is chosen by the new outer position
        group = piece.dims[d].group
        if group is None or group not in permutations:
            continue
        index = permutations[group].to(tensor.device)
        outer = within[group]
        if outer:
            # the index comes with the outer groups' dimensions and then its own; lay them along the tensor's
            places = [_place(piece, d, name) for name in outer] + [d]
            shape = [piece.dims[at].size if at in places else 1 for at in range(tensor.ndim)]
            index = index.permute([places.index(at) for at in sorted(places)]).reshape(shape)
            tensor = tensor.take_along_dim(index, d)
        else:
            tensor = tensor.index_select(d, index)
    return tensor


def _place(piece: Piece, dim: int, group: str) -> int:
    at = piece.partner(dim, group)
    assert at is not None, f"{piece.dims[dim].group} lies within {group}, which this tensor does not have"
    return at
