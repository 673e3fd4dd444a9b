"""The matching problem, free of names and shapes: dense pieces of two networks whose dimensions belong to groups.

Every parameter is cut into pieces (see `terms`). For the pieces A of one network and B of the other the problem is to
find the permutation p of the symmetry that maximises the sum over all pieces of <A, p(B)>: the objective of weight
matching (Ainsworth et al. 2023, eq. 1), for any structure of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..assignment import assign, assign_blocks
from ..symmetry import Group, Symmetry
from ..terms import Piece, pieces

# Units of the first network that are in double precision at a time.
_ROWS = 512


@dataclass(frozen=True, eq=False)
class Pair:
    """A piece of the first network beside the same piece of the second; both are read where they lie, when asked for.

    Attributes:
        name: Of the parameter that it is a piece of.
        piece: Which part, and what its dimensions are.
        source_a: Parameters of the first network, by name.
        source_b: Parameters of the second.
    """

    name: str
    piece: Piece
    source_a: Mapping[str, Tensor]
    source_b: Mapping[str, Tensor]

    @property
    def a(self) -> Tensor:
        """The first network's values, with the piece's dimensions."""
        return self.piece.get(self.source_a[self.name].detach())

    @property
    def b(self) -> Tensor:
        """The second network's values, in its own order."""
        return self.piece.get(self.source_b[self.name].detach())


@dataclass(frozen=True)
class Family:
    """What is assigned at once: a group and, if it is one of blocks, the groups inside its blocks."""

    group: Group
    inner: tuple[Group, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its groups."""
        return (self.group.name, *(group.name for group in self.inner))


def families(symmetry: Symmetry) -> list[Family]:
    """List what is assigned at once: each group with the groups inside its blocks, and each of those alone.

    Where two inner groups meet in one tensor, the assignment with their blocks sees that tensor for one of them only;
    alone, with the blocks and all others held, each is assigned exactly.
    """
    inner = {group.name: tuple(o for o in symmetry.groups if o.within == (group.name,)) for group in symmetry.groups}
    outer = [Family(group, inner[group.name]) for group in symmetry.groups if not group.within]
    return outer + [Family(group) for group in symmetry.groups if group.within]


def pairs(symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[Pair]:
    """Cut two networks' parameters into pieces; only those with a group are kept, and tied ones once.

    Args:
        symmetry: Of both networks.
        a: Parameters of the first, by name.
        b: Parameters of the second.
    """
    return [Pair(name, piece, a, b) for name in a for piece in pieces(symmetry.layout[name]) if piece.groups]


def front(piece: Piece, at: int, family: Family) -> tuple[list[int], str | None]:
    """Find the dimensions that enumerate a family's units at dimension `at`: its own, and one inside its blocks."""
    for other, dim in enumerate(piece.dims):
        inner = next((group for group in family.inner if group.name == dim.group), None)
        if inner and piece.partner(other, family.group.name) == at:
            return [at, other], inner.name
    return [at], None


def rows(tensor: Tensor, dims: list[int]) -> Tensor:
    """Bring dimensions to the front and flatten: (units of `dims`, everything else)."""
    count = 1
    for dim in dims:
        count *= tensor.shape[dim]
    return tensor.movedim(dims, list(range(len(dims)))).reshape(count, -1)


def profile(tensor: Tensor, piece: Piece, dims: list[int]) -> Tensor:
    """Describe each unit by what no permutation of other groups changes: its values, sorted along their dimensions."""
    others = [at for at in range(tensor.ndim) if at not in dims]
    loose = [at for at in others if piece.dims[at].group is not None]
    held = [at for at in others if at not in loose]
    ordered = tensor.permute(*dims, *held, *loose)
    leading = ordered.shape[: len(dims) + len(held)]
    ordered = ordered.reshape(*leading, -1).sort(-1).values
    return ordered.reshape(-1, ordered[(0,) * len(dims)].numel())


@dataclass(frozen=True)
class Similarities:
    """Similarity of a family's units in two networks; in float64 on the CPU unless it was started otherwise.

    Attributes:
        outer: (G, G) for the units of the family's group, or those of blocks that do not depend on the units inside.
        inner: Per group inside the blocks (G, m, G, m).
    """

    outer: Tensor
    inner: dict[str, Tensor]

    @classmethod
    def zeros(
        cls, family: Family, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Similarities:
        """Start with nothing."""
        size, kind = family.group.size, {"dtype": dtype, "device": device}
        inner = {g.name: torch.zeros(size, g.size, size, g.size, **kind) for g in family.inner}
        return cls(torch.zeros(size, size, **kind), inner)

    def add(self, inner: str | None, similarity: Tensor) -> None:
        """Add a matrix over the units of the group inside the blocks, or over the group itself (None)."""
        target = self.outer if inner is None else self.inner[inner]
        target += similarity.to(target).reshape(target.shape)

    def add_product(self, inner: str | None, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        """Add the inner products of units in the precision of the sums, some rows at a time.

        Whole networks are never held in double.

        Args:
            inner: As in `add`.
            a: (units, features) of the first network.
            b: The same of the second.
            weight: Of these products in the sum.
        """
        target = (self.outer if inner is None else self.inner[inner]).view(len(a), len(b))
        columns = b.to(target.dtype).T
        for rows_of_a, rows_of_target in zip(a.split(_ROWS), target.split(_ROWS), strict=True):
            product = rows_of_a.to(target.dtype) @ columns
            rows_of_target.add_(product.to(target.device), alpha=weight)

    def solve(self, family: Family) -> dict[str, Tensor]:
        """Assign the units of every group in the family."""
        if not self.inner:
            return {family.group.name: assign(self.outer)}
        matched, picked = assign_blocks(self.outer, self.inner)
        return {family.group.name: matched, **picked}


def weight_similarities(
    found: Iterable[Pair],
    family: Family,
    *,
    profiles: bool = False,
    moved: Callable[[Pair], Tensor] | None = None,
    total: Similarities | None = None,
) -> Similarities:
    """Compute the inner products of all weights of the units of a family, or of their profiles.

    Args:
        found: The pieces of both networks.
        family: Whose units.
        profiles: Compare what no permutation of other groups changes.
        moved: Gives the second network's values of a pair, permuted; by default they are as they come.
        total: What to add to; by default a new sum in float64 on the CPU.
    """
    total = Similarities.zeros(family) if total is None else total
    for pair in found:
        if family.group.name not in pair.piece.groups:
            continue
        values = pair.a, (pair.b if moved is None else moved(pair))
        for at, dim in enumerate(pair.piece.dims):
            if dim.group == family.group.name:
                dims, inner = front(pair.piece, at, family)
                a, b = (describe(tensor, pair.piece, dims, profiles) for tensor in values)
                total.add_product(inner, a, b)
    return total


def within_similarities(
    found: Iterable[Pair],
    group: Group,
    total: Tensor,
    moved: Callable[[Pair], Tensor],
    *,
    profiles: bool = False,
    weights: Mapping[Pair, float] | None = None,
) -> Tensor:
    """Add the inner products of the units of a group in every position of the groups around it.

    Args:
        found: The pieces of both networks.
        group: One that lies within others.
        total: (*sizes of the groups around it, n, n), what to add to, in the precision of the products.
        moved: Gives the second network's values of a pair, permuted.
        profiles: Compare what no permutation of other groups changes.
        weights: Of each pair; 1 by default.
    """
    for pair in found:
        if group.name not in pair.piece.groups:
            continue
        values = pair.a, moved(pair)
        for at, dim in enumerate(pair.piece.dims):
            if dim.group == group.name:
                dims = pair.piece.around(at, group.within)
                a, b = (
                    describe(part, pair.piece, dims, profiles).to(total.dtype).reshape(*total.shape[:-1], -1)
                    for part in values
                )
                product = (a @ b.transpose(-1, -2)).to(total.device)
                total += product if weights is None else weights[pair] * product
    return total


def describe(tensor: Tensor, piece: Piece, dims: list[int], profiles: bool) -> Tensor:
    """Describe each unit by its values or, if `profiles`, by what no permutation of other groups changes."""
    return profile(tensor, piece, dims) if profiles else rows(tensor, dims)
