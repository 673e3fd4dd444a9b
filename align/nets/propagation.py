"""Where to start: the order spreads from what is fixed, the ends of the network, to what touches it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..assignment import assign_each
from .problem import Family, Pair, Similarities, describe, front
from .search import Problem, Search

Step = dict[str, Tensor]

# A family of which so many times fewer numbers are known than of another waits: as one with known biases only.
_FEW = 4


@dataclass(frozen=True)
class Proposal:
    """An order for a family, by what is known so far, and how clearly it stands out."""

    step: Step
    confidence: float


def spread_weights(problem: Problem) -> dict[Pair, float]:
    """Give each piece the weight at which all entries, of large layers and of small ones, tell the same.

    If b is a permuted plus noise in proportion to each layer's spread, the most likely order maximises the inner
    products divided by that spread squared.
    """
    weights = {}
    for pair in problem.pairs:
        spread = float(pair.a.double().std(correction=0)) * float(pair.b.double().std(correction=0))
        weights[pair] = 1.0 / spread if spread > 0 else 0.0
    return weights


def propagate(search: Search, weights: Mapping[Pair, float] | None = None) -> None:
    """Order every family by the weights that lead to groups whose order is known already, the clearest first.

    Inputs, outputs and groups that do not move are known from the beginning. Where nothing known touches what is left,
    the family that stands out most by its profiles (which no order of the others changes) goes first.

    Args:
        search: Its permutation is replaced, as far as its families go.
        weights: Of each piece; `spread_weights` by default.
    """
    problem = search.problem
    weights = spread_weights(problem) if weights is None else weights
    known = {group.name for group in problem.symmetry.groups} - problem.moving
    waiting = list(problem.families)
    proposals: dict[Family, tuple[int, Proposal]] = {}
    while waiting := [family for family in waiting if family.group.name not in known]:
        telling = {family: _telling(problem, family, known) for family in waiting}
        numbers = {family: sum(look.numbers for look in looks) for family, looks in telling.items()}
        enough = max(numbers.values()) / _FEW
        for family in waiting:
            if 0 < numbers[family] >= enough and proposals.get(family, (0,))[0] != numbers[family]:
                proposals[family] = numbers[family], _propose(search, family, telling[family], weights)
        found = [proposals[family][1] for family in waiting if family in proposals]
        if not found:
            found = [_by_profile(search, family, weights) for family in waiting if set(family.group.within) <= known]
        best = max(found, key=lambda proposal: proposal.confidence)
        search.commit(best.step)
        known |= best.step.keys()


@dataclass(frozen=True)
class _Look:
    """A piece that tells units of a family apart by numbers whose order is known."""

    pair: Pair
    dims: list[int]
    inner: str | None
    numbers: int


def _telling(problem: Problem, family: Family, known: set[str]) -> list[_Look]:
    """List the pieces of a family of which everything else is known."""
    group, found = family.group, list[_Look]()
    if not set(group.within) <= known:
        return found
    for pair in problem.touching(family):
        for at, dim in enumerate(pair.piece.dims):
            if dim.group == group.name:
                dims, inner = front(pair.piece, at, family)
                others = [other for other in range(len(pair.piece.dims)) if other not in dims]
                names = {name for other in others if (name := pair.piece.dims[other].group)}
                if names <= known:
                    sizes = [pair.piece.dims[other].size for other in others]
                    found.append(_Look(pair, dims, inner, math.prod(sizes)))
    return found


def _propose(search: Search, family: Family, looks: list[_Look], weights: Mapping[Pair, float]) -> Proposal:
    if family.group.within:
        total = search.within(family.group, [look.pair for look in looks], weights=weights)
        step = assign_each(total)
        return Proposal({family.group.name: step}, _standing_out(total, step))
    seen = {look.inner for look in looks}
    # groups inside of which nothing is known yet wait until their blocks lie side by side
    told = Family(family.group, tuple(group for group in family.inner if group.name in seen))
    sums = Similarities.zeros(told, torch.float32)  # whatever it decides is decided again, in double precision
    for look in looks:
        a, b = (describe(t, look.pair.piece, look.dims, False) for t in (look.pair.a, search.now(look.pair)))
        sums.add_product(look.inner, a, b, weights[look.pair])
    step = sums.solve(told)
    return Proposal(step, _confidence(sums, step, family.group.name))


def _by_profile(search: Search, family: Family, weights: Mapping[Pair, float]) -> Proposal:
    if family.group.within:
        total = search.within(family.group, search.problem.touching(family), profiles=True, weights=weights)
        step = assign_each(total)
        return Proposal({family.group.name: step}, _standing_out(total, step))
    similarity = Similarities.zeros(Family(family.group))
    for pair in search.problem.touching(family):
        for at, dim in enumerate(pair.piece.dims):
            if dim.group == family.group.name:
                a, b = (describe(tensor, pair.piece, [at], True) for tensor in (pair.a, search.now(pair)))
                # what all units have in common would drown what tells them apart
                similarity.add_product(None, a - a.mean(0), b - b.mean(0), weights[pair])
    step = similarity.solve(Family(family.group))
    return Proposal(step, _standing_out(similarity.outer, step[family.group.name]))


def _confidence(total: Similarities, step: Step, outer: str) -> float:
    if not total.inner:
        return _standing_out(total.outer, step[outer])
    blocks = step[outer]
    return max(
        _standing_out(similarity[torch.arange(len(blocks)), :, blocks], step[name])
        for name, similarity in total.inner.items()
    )


def _standing_out(similarity: Tensor, order: Tensor) -> float:
    """By how many standard deviations matched units are more alike than any two."""
    matched = similarity.gather(-1, order.unsqueeze(-1))
    spread = float(similarity.std(correction=0))
    return float(matched.mean() - similarity.mean()) / spread if spread > 0 else 0.0
