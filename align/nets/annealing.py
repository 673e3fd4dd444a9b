"""Deterministic annealing: the order of every group starts undecided and hardens while all of them look at each other.

Each group has a doubly stochastic matrix instead of an order. In turn, a group's similarities are computed with all
other groups applied softly, and its matrix becomes the one that maximises <similarity, P> + temperature · entropy(P)
(Sinkhorn 1964; graduated assignment, Gold & Rangarajan 1996), while the temperature falls. What coordinate descent
decides at once, from neighbours that are still in a wrong order, is decided here when enough of the neighbours agree.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..assignment import assign_each
from ..soft import soft_take
from ..symmetry import Group
from .problem import Family, Pair, Similarities, within_similarities
from .search import Each, Problem, Search

# Largest factor by which one rebalancing corrects a unit: what no other unit wants yet must not blow up.
_LARGEST = 1e12


class Annealing:
    """A soft permutation of the second network, relative to the order that a search has found so far.

    Args:
        search: Where it starts, and whose families take part.
        sharpness: Share of the starting order in the matrices at the beginning; 0: nothing is decided.
        dtype: Precision of matrices and products.
    """

    def __init__(
        self,
        search: Search,
        sharpness: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.search = search
        self.problem: Problem = search.problem
        self.dtype = dtype
        self.device = self.problem.pairs[0].a.device if self.problem.pairs else torch.device("cpu")
        groups = self.problem.symmetry.by_name
        self.matrices = {name: self._undecided(groups[name], sharpness) for name in sorted(self.problem.moving)}
        self.potentials: dict[tuple[str, str], Tensor] = {}

    def _undecided(self, group: Group, sharpness: float) -> Tensor:
        matrix = torch.full((group.size, group.size), (1 - sharpness) / group.size, dtype=self.dtype)
        matrix += sharpness * torch.eye(group.size, dtype=self.dtype)
        return matrix.expand(*self.problem.positions(group), *matrix.shape).clone().to(self.device)

    def run(self, generator: torch.Generator, steps: int, hot: float, cold: float, each: Each = map) -> None:
        """Cool from `hot` to `cold`, in standard deviations of each group's similarities.

        Args:
            generator: Of the orders in which the families are visited.
            steps: Temperatures.
            hot: The first.
            cold: The last.
            each: Applies a function to several families, as `map` does; it may do so at once.
        """
        for temperature in temperatures(steps, hot, cold):
            order = torch.randperm(len(self.problem.families), generator=generator).tolist()
            for run in self.problem.apart(order):
                decided = each(lambda index, t=temperature: self.decide(self.problem.families[index], t), run)
                for matrices in list(decided):
                    self.matrices.update(matrices)

    def decide(self, family: Family, temperature: float) -> dict[str, Tensor]:
        """Find a family's matrices at a temperature, with everything else as it is."""
        if family.group.within:
            total = self._within(family)
            return {family.group.name: self._balance((family.group.name, ""), total, temperature)[0]}
        total = self._similarities(family)
        worth = total.outer
        inside = {}
        for name, similarity in total.inner.items():
            batch = similarity.transpose(1, 2)  # (G, G, m, m): the units of every pair of blocks
            inside[name], value = self._balance((family.group.name, name), batch, temperature)
            worth = worth + value
        chosen = self._balance((family.group.name, ""), worth, temperature)[0]
        # inside, the mean over the blocks that a block may come from
        means = {name: torch.einsum("ac,acij->aij", chosen, matrices) for name, matrices in inside.items()}
        return {family.group.name: chosen, **means}

    def harden(self) -> None:
        """Decide every family for good, with those that are left still soft, and move the search there."""
        step: dict[str, Tensor] = {}
        for family in self.problem.families:
            if family.group.within:
                found = {family.group.name: assign_each(self._within(family))}
            else:
                found = self._similarities(family).solve(family)
            step.update(found)
            for name, order in found.items():
                self.matrices[name] = one_hot(order, order.shape[-1]).to(self.matrices[name])
        self.search.commit(step)

    def softened(self, pair: Pair, still: tuple[str, ...]) -> Tensor:
        """Give the second network's piece with all matrices applied but those of some groups."""
        matrices = {name: matrix for name, matrix in self.matrices.items() if name not in still}
        return soft_take(self.search.now(pair).to(self.dtype), pair.piece, matrices, self.problem.symmetry.within)

    def _similarities(self, family: Family) -> Similarities:
        order = self.search.permutation.indices[family.group.name]
        total = Similarities.zeros(family, self.dtype, self.device)
        return self.problem.similarities(family, order, lambda pair: self.softened(pair, family.names), total)

    def _within(self, family: Family) -> Tensor:
        group, kind = family.group, {"dtype": self.dtype, "device": self.device}
        total = torch.zeros(*self.problem.positions(group), group.size, group.size, **kind)
        found = self.problem.touching(family)
        return within_similarities(found, group, total, lambda pair: self.softened(pair, family.names))

    def _balance(self, key: tuple[str, str], similarity: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        heat = temperature * float(similarity.std(correction=0))
        if heat == 0:
            size = similarity.shape[-1]
            return torch.full_like(similarity, 1.0 / size), similarity.mean(-1).sum(-1)
        matrix, self.potentials[key] = balance(similarity, heat, self.potentials.get(key))
        return matrix, (matrix * similarity).sum((-2, -1))


def temperatures(steps: int, hot: float, cold: float) -> Iterator[float]:
    """Fall from hot to cold, by the same factor at each step."""
    for step in range(steps):
        yield hot * (cold / hot) ** (step / max(1, steps - 1))


def balance(similarity: Tensor, heat: float, potential: Tensor | None = None, rounds: int = 5) -> tuple[Tensor, Tensor]:
    """Find, nearly, the doubly stochastic matrices P that maximise <similarity, P> + heat · entropy(P).

    A few rounds of Sinkhorn's algorithm, which go on from the potentials of the temperature before: so that columns
    that no row wants most do not underflow, and so that a few rounds are enough. Rows sum to 1 exactly, columns nearly.

    Args:
        similarity: (…, n, n).
        heat: Above zero, in the units of the similarity.
        potential: (…, n), what was returned before; None starts at zero.
        rounds: Of balancing rows and columns.

    Returns:
        The matrices (…, n, n), and the columns' potentials (…, n).

    >>> matrix, _ = balance(torch.tensor([[1.0, 0.9], [1.0, 0.0]]), 0.05, rounds=50)
    >>> (matrix > 0.9).tolist()
    [[False, True], [True, False]]
    """
    if potential is None:
        potential = torch.zeros_like(similarity[..., 0, :])
    exponent = (similarity + potential.unsqueeze(-2)) / heat
    kernel = exponent.sub_(exponent.max(-1, keepdim=True).values).exp_()
    column = torch.ones_like(potential)
    for _ in range(rounds):
        row = 1.0 / (kernel @ column.unsqueeze(-1)).squeeze(-1)
        column = 1.0 / (row.unsqueeze(-2) @ kernel).squeeze(-2).clamp_min(1e-30)
    column = column.clamp(1.0 / _LARGEST, _LARGEST)
    kernel *= column.unsqueeze(-2)
    kernel /= kernel.sum(-1, keepdim=True)
    potential = potential + heat * column.log()
    return kernel, potential - potential.mean(-1, keepdim=True)
