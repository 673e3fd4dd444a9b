"""The state of a search for a permutation, and the step that every search shares: one family, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...base.architecture import check_finite
from ..assignment import assign, assign_each
from ..permutation import Permutation
from ..symmetry import Group, Symmetry
from ..terms import take
from .problem import Family, Pair, Similarities, families, pairs, weight_similarities, within_similarities

# A step counts as an improvement if it raises the objective by more than this part of its upper bound |A| |B|.
TOLERANCE = 1e-12

Each = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]


@dataclass(eq=False)
class Problem:
    """What all searches between two networks share, and never change.

    Attributes:
        symmetry: Of both networks.
        pairs: Their pieces; the parameters are read where they lie.
        families: What is assigned at once; those outside `only` are left out.
        scale: Upper bound |A| |B| of the objective.
    """

    symmetry: Symmetry
    pairs: list[Pair]
    families: list[Family]
    scale: float
    remembered: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        symmetry: Symmetry,
        a: Mapping[str, Tensor],
        b: Mapping[str, Tensor],
        only: Sequence[str] | None = None,
    ) -> Problem:
        """State the problem of bringing b into the order of a; only the groups named in `only` move.

        Raises:
            NotFiniteError: A parameter holds NaN or infinity.
        """
        found = pairs(symmetry, a, b)
        scale = 0.0
        for pair in found:
            product = float(pair.a.double().norm() * pair.b.double().norm())
            if not math.isfinite(product):
                check_finite({pair.name: pair.a}, "network a")
                check_finite({pair.name: pair.b}, "network b")
            scale += product
        moving = [f for f in families(symmetry) if only is None or set(f.names) <= set(only)]
        return cls(symmetry, found, moving, scale)

    @property
    def moving(self) -> set[str]:
        """Names of the groups that may move."""
        return {name for family in self.families for name in family.names}

    def touching(self, family: Family) -> list[Pair]:
        """Pieces that hold units of a family."""
        return [pair for pair in self.pairs if set(pair.piece.groups) & set(family.names)]

    def neighbours(self, index: int) -> set[int]:
        """Families whose assignment depends on this one: those that share a piece; itself where it meets itself."""
        mine = self.families[index]
        touched: set[str] = set()
        again = False
        for pair in self.touching(mine):
            touched |= set(pair.piece.groups)
            again |= pair.piece.groups.count(mine.group.name) > 1
        near = {at for at, family in enumerate(self.families) if at != index and set(family.names) & touched}
        return near | ({index} if again else set())

    @cached_property
    def near(self) -> list[set[int]]:
        """The neighbours of every family."""
        return [self.neighbours(index) for index in range(len(self.families))]

    def apart(self, order: list[int]) -> Iterator[list[int]]:
        """Cut an order of visits into runs of families that do not touch: each run may be solved at once.

        What is taken out of `order` while a run is being worked on is not visited.
        """
        while order:
            run: list[int] = []
            while order and not any(order[0] in self.near[index] for index in run):
                run.append(order.pop(0))
            yield run

    def settled(self, family: Family) -> list[Pair]:
        """Find large pieces that hold no other group: of their product a change moves the columns and nothing else."""
        group = family.group
        return [
            pair
            for pair in self.pairs
            if pair.piece.groups == [group.name] and pair.piece.numel > group.size**2 and not family.inner
        ]

    def similarities(
        self, family: Family, order: Tensor, moved: Callable[[Pair], Tensor], total: Similarities
    ) -> Similarities:
        """Compute the inner products of the units of a family; those of settled pieces once for all searches.

        Args:
            family: Whose units.
            order: That of the family's group in the second network, so far.
            moved: Gives the second network's values of a pair, permuted.
            total: What to add to.
        """
        settled = self.settled(family)
        if settled:
            name = family.group.name
            if name not in self.remembered:
                self.remembered[name] = weight_similarities(settled, family).outer
            total.add(None, self.remembered[name][:, order])
        rest = [pair for pair in self.touching(family) if pair not in settled]
        return weight_similarities(rest, family, moved=moved, total=total)

    def positions(self, group: Group) -> list[int]:
        """Sizes of the groups that a group lies within."""
        return [self.symmetry.by_name[name].size for name in group.within]


class Search:
    """A permutation of the second network on its way to a better one; b stays where it lies and is permuted in passing.

    Attributes:
        problem: What is searched.
        permutation: What has been found so far.
        certain: Per family, when it was last visited: the share of units whose match is the best of both sides.
    """

    def __init__(self, problem: Problem, start: Permutation) -> None:
        self.problem = problem
        self.permutation = start
        self.certain: dict[int, float] = {}

    def now(self, pair: Pair) -> Tensor:
        """The second network's piece in the order found so far."""
        return take(pair.b, pair.piece, self.permutation.indices, self.problem.symmetry.within)

    def value(self, found: Iterable[Pair]) -> float:
        """Sum of <A, p(B)> over pieces, in float64."""
        return sum(float(torch.dot(pair.a.flatten().double(), self.now(pair).flatten().double())) for pair in found)

    @property
    def objective(self) -> float:
        """<A, p(B)> over all pieces."""
        return self.value(self.problem.pairs)

    def descend(self, generator: torch.Generator, max_sweeps: int, each: Each = map) -> list[float]:
        """Sweep over the families in random order until nothing improves; gives the objective after each sweep.

        A family whose neighbours have not changed since its last visit is not visited again. The objective never
        falls: where a step is exact only to first order, as in a residual stream that meets itself, it is undone
        unless it helps.

        Args:
            generator: Of the orders.
            max_sweeps: When to give up.
            each: Applies a function to several things, as `map` does; it may do so at once.
        """
        history = [self.objective]
        pending = set(range(len(self.problem.families)))
        for _ in range(max_sweeps):
            gained = 0.0
            order: list[int] = torch.randperm(len(self.problem.families), generator=generator).tolist()
            for run in self.problem.apart(order):
                due = [index for index in run if index in pending]
                pending -= set(due)
                for index, proposal in zip(due, each(self.propose, due), strict=True):
                    gain = self.accept(index, *proposal)
                    pending |= self.problem.near[index] if gain > 0 else set()
                    gained += gain
            history.append(history[-1] + gained)
            if not pending:
                break
        final = self.objective  # the sums of gains differ from it by rounding
        return [*(min(value, final) for value in history[:-1]), final]

    def propose(self, index: int) -> tuple[dict[str, Tensor], float | None]:
        """Find the best order of one family while everything else stays, and what it gains, where that is exact."""
        family = self.problem.families[index]
        if family.inner or family.group.within:
            return self._solve(index), None
        similarity = self.similarities(family).outer
        order = assign(similarity)
        self.certain[index] = _mutual(similarity, order)
        return {family.group.name: order}, float(similarity.gather(1, order[:, None]).sum() - similarity.trace())

    def accept(self, index: int, step: Mapping[str, Tensor], gain: float | None) -> float:
        """Take a step if it helps; gives what the objective gains."""
        family = self.problem.families[index]
        if all(torch.equal(order, _still(order)) for order in step.values()):
            return 0.0
        touched = self.problem.touching(family)
        if gain is None or any(pair.piece.groups.count(family.group.name) > 1 for pair in touched):
            gain = self._measured_gain(step, touched)
        if gain <= TOLERANCE * self.problem.scale:
            return 0.0
        self.commit(step)
        return gain

    def _measured_gain(self, step: Mapping[str, Tensor], touched: list[Pair]) -> float:
        before, kept = self.value(touched), self.permutation
        self.commit(step)
        after = self.value(touched)
        self.permutation = kept
        return after - before

    def commit(self, step: Mapping[str, Tensor]) -> None:
        """Follow what has been found by a further change of order."""
        symmetry = self.problem.symmetry
        change = Permutation(symmetry, {**symmetry.identity().indices, **step})
        self.permutation = change.compose(self.permutation)

    def _solve(self, index: int) -> dict[str, Tensor]:
        """Find the best change of order of a family of blocks, or of one that lies within others."""
        family = self.problem.families[index]
        if family.group.within:
            total = self.within(family.group, self.problem.pairs)
            step = {family.group.name: assign_each(total)}
            self.certain[index] = _mutual(total, step[family.group.name])
            return step
        total = self.similarities(family)
        step = total.solve(family)
        blocks = step[family.group.name]
        inside = [
            _mutual(similarity[torch.arange(len(blocks)), :, blocks], step[name])
            for name, similarity in total.inner.items()
        ]
        self.certain[index] = min(inside)
        return step

    def similarities(self, family: Family) -> Similarities:
        """Inner products of the units of a family, columns in the order found so far."""
        order = self.permutation.indices[family.group.name]
        return self.problem.similarities(family, order, self.now, Similarities.zeros(family))

    def within(
        self,
        group: Group,
        found: Iterable[Pair],
        *,
        profiles: bool = False,
        weights: Mapping[Pair, float] | None = None,
    ) -> Tensor:
        """Inner products of the units of a group in every position of the groups around it: (*positions, n, n)."""
        total = torch.zeros(*self.problem.positions(group), group.size, group.size, dtype=torch.float64)
        return within_similarities(found, group, total, self.now, profiles=profiles, weights=weights)


def _still(order: Tensor) -> Tensor:
    return torch.arange(order.shape[-1]).expand(order.shape)


def _mutual(similarity: Tensor, order: Tensor) -> float:
    """Share of the rows of (…, n, n) whose match is the best of its row and of its column."""
    matched = similarity.gather(-1, order.unsqueeze(-1)).squeeze(-1)
    best = (matched >= similarity.amax(-1)) & (matched >= similarity.amax(-2).gather(-1, order))
    return float(best.double().mean())
