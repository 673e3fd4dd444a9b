"""One order for many networks at once: permutations to a common universe, which agree along every cycle.

Both methods make Σ_{p<q} <P_p(A_p), P_q(A_q)> large, one network at a time against all the others: by doubly
stochastic matrices (Frank-Wolfe; Crisostomi et al. 2024, "C²M³") or by whole orders (MergeMany; Ainsworth et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.architecture import check_same_architecture
from ...base.errors import DataError
from ...base.progress import progress as bar
from ..permutation import Permutation
from ..symmetry import Symmetry
from ..terms import take
from .frank_wolfe import Ascent, Mixture, Slope, State, begin, check_settings, dot, parts, precision
from .search import Problem, Search
from .weights import weight_matching

# Entries of each network that are in double precision at a time.
_CHUNK = 1 << 18
# Sweeps over the groups of one network before the next has its turn.
_SWEEPS = 100


@dataclass(frozen=True)
class Universe:
    """Permutations that bring many networks into one order.

    Attributes:
        permutations: One for each network.
        objective: Sum over all pairs p < q of <P_p(A_p), P_q(A_q)>, over the parameters that can be permuted.
        history: The objective at the start and after every sweep; that of the doubly stochastic matrices in
            Frank-Wolfe.
        gap: Sum over the networks of the duality gap max over D of <∇F(X), D - X> at the end: 0 where no corner is
            uphill for a network alone. None where it was not measured.
    """

    permutations: tuple[Permutation, ...]
    objective: float
    history: tuple[float, ...]
    gap: float | None = None


def inner_products(symmetry: Symmetry, states: Sequence[State], permutations: Sequence[Permutation]) -> Tensor:
    """Compute <P_p(A_p), P_q(A_q)> for all pairs of networks, over the parameters that can be permuted.

    Args:
        symmetry: Of all networks.
        states: Parameters by name, one mapping for each network.
        permutations: One for each network.

    Returns:
        (n, n), float64, on the CPU; squared norms on the diagonal.
    """
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name, piece in parts(symmetry, states[0]):
        ordered = [
            take(piece.get(state[name].detach()), piece, permutation.indices, symmetry.within).flatten()
            for state, permutation in zip(states, permutations, strict=True)
        ]
        for columns in zip(*(values.split(_CHUNK) for values in ordered), strict=True):
            block = torch.stack([values.to(columns[0].device, torch.float64) for values in columns])
            total += (block @ block.T).cpu()
    return total


def objective_of(products: Tensor) -> float:
    """Sum the inner products of all pairs of different networks.

    >>> objective_of(torch.tensor([[9.0, 1.0, 2.0], [1.0, 9.0, 4.0], [2.0, 4.0, 9.0]]))
    7.0
    """
    return float(products.triu(1).sum())


def check_states(states: Sequence[State], start: Sequence[Permutation] | None) -> None:
    """Refuse fewer than two networks, networks that differ, and another number of permutations.

    Raises:
        DataError: With the numbers.
        ArchitectureError: With the names and shapes that differ.
    """
    if len(states) < 2:
        raise DataError(f"{len(states)} network(s) given; matching needs at least two")
    if start is not None and len(start) != len(states):
        raise DataError(f"start holds {len(start)} permutations for {len(states)} networks; pass one each")
    for number, state in enumerate(states):
        check_same_architecture(states[0], state, ("network 0", f"network {number}"))


def frank_wolfe(
    symmetry: Symmetry,
    states: Sequence[State],
    *,
    start: Sequence[Permutation] | None = None,
    mixing: float = 0.5,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    progress: bool | None = None,
) -> Universe:
    """Bring many networks into one order by Frank-Wolfe over the doubly stochastic matrices of all groups at once.

    The objective F = Σ_{p<q} <X_p(A_p), X_q(A_q)> is that of C²M³ (Crisostomi et al. 2024, equation 6). Networks take
    turns in random order (block-coordinate Frank-Wolfe, Lacoste-Julien et al. 2013): each makes a step against the sum
    of the others, of exactly the length that is best for it. F never decreases. At the end the matrices are rounded.

    Args:
        symmetry: Of all networks.
        states: Parameters by name, one mapping for each network; they are read where they lie.
        start: A permutation for each network. None begins with the first network in its own order and the others at the
            barycentre, where each is matched to all alike; the first moves from the second sweep on.
        mixing: How far `start` is drawn to the barycentre: 0 begins at the permutations themselves.
        max_steps: Steps of each network before it gives up.
        tolerance: Stop when the duality gaps of a sweep add up to less than this part of the objective.
        seed: Of the order in which networks take turns.
        progress: Show a bar; None: on a terminal.

    Returns:
        The rounded permutations, or the networks as they stood (in `start`, or in their own orders) if these are worse.

    Raises:
        DataError: A number is out of its range, or there are fewer than two networks or not as many permutations.
        ArchitectureError: The networks differ.

    >>> from isthmus import symmetry
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> state = {name: parameter.detach() for name, parameter in net.named_parameters()}
    >>> found = symmetry(net, torch.ones(1, 3))
    >>> planted = [found.random(torch.Generator().manual_seed(number)) for number in range(3)]
    >>> common = frank_wolfe(found, [p.apply(state) for p in planted]).permutations
    >>> common[0].compose(planted[0]) == common[1].compose(planted[1]) == common[2].compose(planted[2])
    True
    """
    check_settings(mixing, max_steps, tolerance)
    check_states(states, start)
    still = symmetry.identity()
    first = [still] + [None] * (len(states) - 1) if start is None else start
    mixtures = [begin(symmetry, at, 0.0 if start is None else mixing) for at in first]
    climb = _Climb(symmetry, states, mixtures)
    generator = torch.Generator().manual_seed(seed)
    history = [climb.objective]
    for sweep in bar(range(max_steps), "Frank-Wolfe", show=progress):
        turns = torch.randperm(len(states), generator=generator).tolist()
        held = {0} if start is None and sweep == 0 else set()
        gap = sum(climb.step(network) for network in turns if network not in held)
        history.append(climb.objective)
        if gap <= tolerance * abs(climb.objective) and not held:
            break
    rounded = [ascent.mixture.rounded() for ascent in climb.ascents]
    candidates = [rounded, [still] * len(states) if start is None else list(start)]
    objectives = [objective_of(inner_products(symmetry, states, candidate)) for candidate in candidates]
    best = objectives.index(max(objectives))
    return Universe(tuple(candidates[best]), objectives[best], tuple(history), climb.gap())


class _Climb:
    """All networks on their way up, beside the sum of their parts."""

    def __init__(self, symmetry: Symmetry, states: Sequence[State], mixtures: Sequence[Mixture]) -> None:
        cut, dtype = parts(symmetry, states[0]), precision(*states)
        self.ascents = [
            Ascent(symmetry, cut, state, mixture, dtype) for state, mixture in zip(states, mixtures, strict=True)
        ]
        self.total: list[Tensor] = []
        self.objective = 0.0
        for ascent in self.ascents:
            mixed = ascent.mixed(ascent.matrices(ascent.mixture))
            self.objective += dot(self.total, mixed) if self.total else 0.0
            self.total = [a + b for a, b in zip(self.total, mixed, strict=True)] if self.total else mixed

    def step(self, network: int) -> float:
        """Move a network as far as is best against the sum of the others; gives its gap before."""
        ascent = self.ascents[network]
        others, slope = self._look(ascent)
        moved = ascent.mixture.towards(slope.corner, slope.size)
        mixed = ascent.mixed(ascent.matrices(moved))
        gain = dot(others, mixed) - slope.value
        if gain > 0:  # not a rounding error
            ascent.mixture = moved
            self.objective += gain
            self.total = [values.add_(more) for values, more in zip(others, mixed, strict=True)]
        return slope.gap

    def gap(self) -> float:
        """Sum the duality gaps of all networks where they stand."""
        return sum(self._look(ascent)[1].gap for ascent in self.ascents)

    def _look(self, ascent: Ascent) -> tuple[list[Tensor], Slope]:
        view = ascent.look()
        others = [total - mixed.detach() for total, mixed in zip(self.total, view.mixed, strict=True)]
        return others, ascent.slope(view, others)


def merge_many(
    symmetry: Symmetry,
    states: Sequence[State],
    *,
    start: Sequence[Permutation] | None = None,
    max_sweeps: int = 100,
    tolerance: float = 1e-6,
    seed: int = 0,
    progress: bool | None = None,
) -> Universe:
    """Bring many networks into one order by matching each to the mean of the others until none moves.

    MergeMany (Ainsworth et al. 2023, algorithm 3): coordinate ascent on Σ_{p<q} <P_p(A_p), P_q(A_q)>, a network at a
    time, by weight matching from where it stands. The objective never decreases.

    Args:
        symmetry: Of all networks.
        states: Parameters by name, one mapping for each network; they are read where they lie.
        start: A permutation for each network; None: their own orders, or those in which each is matched to the first
            network by its weights, whichever are better.
        max_sweeps: Sweeps over all networks before it gives up.
        tolerance: A network moves only if that raises the objective by more than this part of it.
        seed: Of the order in which networks take turns, and of weight matching.
        progress: Show a bar; None: on a terminal.

    Raises:
        DataError: A number is out of its range, or there are fewer than two networks or not as many permutations.
        ArchitectureError: The networks differ.
    """
    check_settings(0, max_sweeps, tolerance)
    check_states(states, start)
    permutations = _matched_to_first(symmetry, states, seed) if start is None else list(start)
    generator = torch.Generator().manual_seed(seed)
    history = [objective_of(inner_products(symmetry, states, permutations))]
    for _ in bar(range(max_sweeps), "matching many", show=progress):
        moved = False
        for network in torch.randperm(len(states), generator=generator).tolist():
            better = _against_others(symmetry, states, permutations, network, tolerance * abs(history[-1]), generator)
            moved |= better is not None
            permutations[network] = better or permutations[network]
        if not moved:
            break
        history.append(objective_of(inner_products(symmetry, states, permutations)))
    return Universe(tuple(permutations), history[-1], tuple(history))


def _matched_to_first(symmetry: Symmetry, states: Sequence[State], seed: int) -> list[Permutation]:
    own = [symmetry.identity()] * len(states)
    matched = [weight_matching(symmetry, states[0], state, seed=seed, progress=False) for state in states[1:]]
    starts = own, [symmetry.identity(), *(found.permutation for found in matched)]
    return max(starts, key=lambda start: objective_of(inner_products(symmetry, states, start)))


def _against_others(
    symmetry: Symmetry,
    states: Sequence[State],
    permutations: Sequence[Permutation],
    network: int,
    least: float,
    generator: torch.Generator,
) -> Permutation | None:
    """Match a network to the sum of the others; None if that does not gain more than so much."""
    others = _sum_of_others(states, permutations, network)
    search = Search(Problem.between(symmetry, others, states[network]), permutations[network])
    line = search.descend(generator, _SWEEPS)
    return search.permutation if line[-1] - line[0] > least else None


def _sum_of_others(states: Sequence[State], permutations: Sequence[Permutation], network: int) -> dict[str, Tensor]:
    """Add up all networks but one, each in the common order."""
    total: dict[str, Tensor] = {}
    for at, (state, permutation) in enumerate(zip(states, permutations, strict=True)):
        if at == network:
            continue
        for name, tensor in state.items():
            values = permutation.permute(name, tensor).to(torch.promote_types(torch.float32, tensor.dtype))
            total[name] = total[name].add_(values) if name in total else values
    return total
