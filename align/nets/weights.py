"""Weight matching: coordinate descent over the groups of a network's symmetry (Ainsworth et al. 2023, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.progress import progress as bar
from ..assignment import assign
from ..permutation import Permutation
from ..symmetry import Group, Symmetry
from .problem import Family, Pair, describe, families, pairs, permute, weight_similarities

# A step counts as an improvement if it raises the objective by more than this part of its upper bound |A| |B|.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Found:
    """Result of one or several restarts.

    Attributes:
        permutation: The best one found.
        objective: Sum over the parameters of <A, p(B)>.
        history: For each restart the objective at its start and after every sweep.
    """

    permutation: Permutation
    objective: float
    history: tuple[tuple[float, ...], ...]


def weight_matching(
    symmetry: Symmetry,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    restarts: int = 2,
    max_sweeps: int = 100,
    seed: int = 0,
    only: Sequence[str] | None = None,
    start: Permutation | None = None,
    progress: bool | None = None,
) -> Found:
    """Find the permutation of b that maximises the inner product of its parameters with those of a.

    Groups are visited in random order; each is assigned exactly (the blocks of a group together with the units inside
    them) while the others stay. A group whose neighbours have not changed since its last visit is not visited again.
    A restart ends when no group improves the objective, or after `max_sweeps`. The objective never decreases: where
    a step is exact only to first order, as in a residual stream that meets itself, it is undone unless it helps.

    The first restart begins at the identity (or `start`), the second at the assignment of each unit's profile (its
    values sorted along the other groups' axes, which no permutation changes), further ones at random permutations.

    Args:
        symmetry: Of both networks.
        a: Parameters of the reference network, by name.
        b: Parameters of the network to be permuted.
        restarts: Number of restarts; the best is returned.
        max_sweeps: Sweeps over all groups before a restart gives up.
        seed: Seed of the visiting order and the random starts.
        only: Names of the groups to match; the others stay as in `start`. None takes all.
        start: Where the first restart begins.
        progress: Show a bar; None: on a terminal.

    Raises:
        DataError: `restarts` or `max_sweeps` is not positive.
    """
    if restarts < 1 or max_sweeps < 1:
        raise DataError(f"restarts and max_sweeps must be at least 1, not {restarts} and {max_sweeps}")
    generator = torch.Generator().manual_seed(seed)
    start = start or symmetry.identity()
    best: Found | None = None
    history = []
    for restart in bar(range(restarts), "matching weights", show=progress):
        search = _Search(symmetry, a, b, start, only)
        if restart == 1:
            search.start_from_profiles()
        elif restart > 1:
            search.move_to(_restricted(symmetry.random(generator), start, only))
        found = search.run(generator, max_sweeps)
        history += found.history
        if best is None or found.objective > best.objective:
            best = found
    assert best is not None
    return Found(best.permutation, best.objective, tuple(history))


def _restricted(drawn: Permutation, start: Permutation, only: Sequence[str] | None) -> Permutation:
    if only is None:
        return drawn
    return Permutation(drawn.symmetry, {**start.indices, **{name: drawn.indices[name] for name in only}})


class _Search:
    """One restart: the pieces of b stand permuted by what has been found so far."""

    def __init__(
        self,
        symmetry: Symmetry,
        a: Mapping[str, Tensor],
        b: Mapping[str, Tensor],
        start: Permutation,
        only: Sequence[str] | None,
    ) -> None:
        self.symmetry = symmetry
        self.pairs = pairs(symmetry, a, b)
        self.families = [f for f in families(symmetry) if only is None or set(f.names) <= set(only)]
        self.scale = sum(float(p.a.double().norm() * p.b.double().norm()) for p in self.pairs)
        self.remembered: dict[str, Tensor] = {}
        self.permutation = symmetry.identity()
        self.move_to(start)

    @property
    def objective(self) -> float:
        return sum(pair.value for pair in self.pairs)

    def move_to(self, permutation: Permutation) -> None:
        """Replace what has been found by a given permutation."""
        step = permutation.compose(self.permutation.inverse())
        self._apply(step.indices, self.pairs)
        self.permutation = permutation

    def run(self, generator: torch.Generator, max_sweeps: int) -> Found:
        """Sweep until nothing improves."""
        history = [self.objective]
        pending = set(range(len(self.families)))
        for _ in range(max_sweeps):
            for index in torch.randperm(len(self.families), generator=generator).tolist():
                if index in pending:
                    pending.discard(index)
                    if self._improve(self.families[index]):
                        pending |= self._neighbours(index)
            history.append(self.objective)
            if not pending:
                break
        return Found(self.permutation, history[-1], (tuple(history),))

    def start_from_profiles(self) -> None:
        """Assign every group by what is invariant to all the others."""
        steps = [self._solve(family, profiles=True) for family in self.families if not family.group.within]
        for step in steps:
            self._commit(step)
        # now that their blocks lie side by side
        for family in sorted(self.families, key=lambda family: len(family.group.within)):
            if family.group.within:
                self._commit(self._solve(family, profiles=True))

    def _neighbours(self, index: int) -> set[int]:
        """Families whose assignment depends on this one: those that share a piece; itself where it meets itself."""
        mine = set(self.families[index].names)
        touched: set[str] = set()
        again = False
        for pair in self.pairs:
            names = [dim.group for dim in pair.piece.dims if dim.group]
            if mine & set(names):
                touched |= set(names)
                again |= names.count(self.families[index].group.name) > 1
        near = {at for at, family in enumerate(self.families) if at != index and set(family.names) & touched}
        return near | ({index} if again else set())

    def _improve(self, family: Family) -> bool:
        step = self._solve(family)
        if all(torch.equal(index, self._still(index)) for index in step.values()):
            return False
        touched = [pair for pair in self.pairs if any(dim.group in step for dim in pair.piece.dims)]
        before = sum(pair.value for pair in touched)
        kept = [pair.b for pair in touched]
        self._apply(step, touched)
        if sum(pair.value for pair in touched) - before <= TOLERANCE * self.scale:
            for pair, values in zip(touched, kept, strict=True):
                pair.b = values
            return False
        self._record(step)
        return True

    @staticmethod
    def _still(index: Tensor) -> Tensor:
        return torch.arange(index.shape[-1]).expand(index.shape)

    def _commit(self, step: Mapping[str, Tensor]) -> None:
        self._apply(step, [pair for pair in self.pairs if any(dim.group in step for dim in pair.piece.dims)])
        self._record(step)

    def _apply(self, step: Mapping[str, Tensor], touched: Sequence[Pair]) -> None:
        for pair in touched:
            pair.b = permute(pair, step, self.symmetry)

    def _record(self, step: Mapping[str, Tensor]) -> None:
        change = Permutation(self.symmetry, {**self.symmetry.identity().indices, **step})
        self.permutation = change.compose(self.permutation)

    def _solve(self, family: Family, profiles: bool = False) -> dict[str, Tensor]:
        """Find the best change of a family's order while everything else stays."""
        group = family.group
        if group.within:
            return {group.name: self._solve_within(group, profiles)}
        settled = [] if profiles or family.inner else self._settled(family)
        total = weight_similarities([pair for pair in self.pairs if pair not in settled], family, profiles=profiles)
        if settled:
            total.add(None, self._remembered(family, settled)[:, self.permutation.indices[group.name]])
        return total.solve(family)

    def _settled(self, family: Family) -> list[Pair]:
        """Find large pieces that hold no other group: of their product a change moves the columns and nothing else."""
        group = family.group
        return [
            pair
            for pair in self.pairs
            if [dim.group for dim in pair.piece.dims if dim.group] == [group.name] and pair.a.numel() > group.size**2
        ]

    def _remembered(self, family: Family, settled: list[Pair]) -> Tensor:
        """Give the similarity of settled pieces with b in its first order; computed once."""
        name = family.group.name
        if name not in self.remembered:
            now = weight_similarities(settled, family).outer
            self.remembered[name] = now[:, self.permutation.indices[name].argsort()]
        return self.remembered[name]

    def _solve_within(self, group: Group, profiles: bool) -> Tensor:
        """Assign a group separately in every position of the groups around it, which stay."""
        sizes = [self.symmetry.by_name[name].size for name in group.within]
        count = int(torch.tensor(sizes).prod())
        total = torch.zeros(count, group.size, group.size, dtype=torch.float64)
        for pair in self.pairs:
            for at, dim in enumerate(pair.piece.dims):
                if dim.group == group.name:
                    around = [pair.piece.partner(at, name) for name in group.within]
                    dims = [*(d for d in around if d is not None), at]
                    a, b = (
                        describe(part, pair.piece, dims, profiles).double().reshape(count, group.size, -1)
                        for part in (pair.a, pair.b)
                    )
                    total += torch.bmm(a, b.transpose(1, 2)).to("cpu")
        return torch.stack([assign(matrix) for matrix in total]).reshape(*sizes, group.size)
