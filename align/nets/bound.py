"""How good a matching can be at most: the bound of Gilmore (1962) and Lawler (1963) for quadratic assignment."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .annealing import balance
from .problem import Pair, profile
from .search import Problem

# Entries of the networks beyond which sorting them all costs more than the bound is worth.
_MOST = 1 << 24


def upper_bound(problem: Problem, reached: float) -> float:
    """Bound the objective <A, p(B)> from above, over all permutations p of the symmetry.

    Σ |A| |B| over the pieces is such a bound, and the one that is given where it is reached, or where the networks
    have more than 16 million entries. Else it is sharpened. Every piece is counted with one group that it holds.
    Between a unit of one network and one of the other it cannot be worth more than their values along all other groups
    sorted alike (rearrangement inequality); the best assignment of units by these worths, or what its dual problem says
    that it is at most, bounds what the group's pieces can give together. The smaller of two ways to share the pieces
    among groups is taken: each with the first group it holds, or each with the last.

    Args:
        problem: The networks; groups that may not move count as if they could.
        reached: The highest objective that was found.

    Returns:
        The bound, in the unit of the objective; without rounding it is reached where b is a permuted copy of a.
    """
    entries = sum(pair.piece.numel for pair in problem.pairs)
    if reached >= problem.scale * (1 - 1e-9) or entries > _MOST:
        return problem.scale
    return min(problem.scale, _shared(problem, min), _shared(problem, max))


def _shared(problem: Problem, choose: Callable[[list[int]], int]) -> float:
    worth: dict[str, Tensor] = {}
    bound = 0.0
    for pair in problem.pairs:
        free = [at for at, dim in enumerate(pair.piece.dims) if dim.group and not problem.symmetry.within[dim.group]]
        if not free:
            bound += _sorted_alike(pair)
            continue
        at = choose(free)
        name = str(pair.piece.dims[at].group)
        x, y = (profile(tensor.double(), pair.piece, [at]) for tensor in (pair.a, pair.b))
        product = (x @ y.T).cpu()
        worth[name] = worth[name] + product if name in worth else product
    return bound + sum(map(assignment_bound, worth.values()))


def assignment_bound(similarity: Tensor) -> float:
    """Bound the value of an assignment by Σᵢ maxⱼ (Sᵢⱼ + gⱼ) - Σⱼ gⱼ, which holds for any prices g of the columns.

    The prices are those at which an assignment that is soft by a few hundredths is balanced: the bound is close, and
    much cheaper than the assignment where units hardly differ.

    Args:
        similarity: (n, n), float64.
    """
    prices = None
    for heat in (1.0, 0.3, 0.1, 0.03):
        prices = balance(similarity, max(heat * float(similarity.std(correction=0)), 1e-300), prices)[1]
    assert prices is not None
    priced = float((similarity + prices).max(1).values.sum() - prices.sum())
    return min(priced, float(similarity.max(1).values.sum()), float(similarity.max(0).values.sum()))


def _sorted_alike(pair: Pair) -> float:
    x, y = (tensor.double().flatten().sort().values for tensor in (pair.a, pair.b))
    return float(torch.dot(x, y))
