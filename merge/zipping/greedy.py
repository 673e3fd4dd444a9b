"""Zipping the units of several networks: the most correlated become one, across networks or within one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError, NotFiniteError
from .slots import Slots


def zip_units(correlation: Tensor, networks: int, *, within: float = 1.0, penalty: float = 0.0) -> Slots:
    """Merge the k·n units of k networks into n, the most correlated first (Stoica et al. 2024, §4.1 and §4.3).

    The two slots of highest correlation become one until n are left. A slot of several units correlates with others
    as the least of its units does, times the penalty.

    Args:
        correlation: (k·n, k·n), symmetric, finite; the units of the first network first. The diagonal is not read.
        networks: k.
        within: The paper's budget β, from 0 to 1: each network may spend up to β n (k - 1) / k merges on slots that
            both hold units of it. With 0 every merge is across networks, as of permutations.
        penalty: The paper's α, from 0 to 1: what the correlation of a merged slot is multiplied by. With 0 two units
            make a slot and no third joins, as long as there are others. Three networks or more need larger slots.

    Returns:
        The slots, those of the first network's units in their order. Where budget and penalty leave no pair to merge,
        the budget gives way first.

    Raises:
        DataError: A shape or number does not fit.
        NotFiniteError: A correlation is NaN or infinite.

    >>> across = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    >>> both = torch.cat([torch.cat([torch.eye(2), across], 1), torch.cat([across.T, torch.eye(2)], 1)])
    >>> zip_units(both, 2).index
    tensor([[0, 1],
            [1, 0]])
    """
    units = _check(correlation, networks, within, penalty)
    matrix = correlation.detach().to("cpu", torch.float64).numpy().copy()
    merging = _Merging(matrix, networks, int(within * units * (networks - 1) / networks + 1e-9), penalty)
    for _ in range(units * (networks - 1)):
        merging.step()
    return Slots(_numbered(merging.slot, networks))


class _Merging:
    """Slots that are being merged, each under the number of its first unit, and the best partner of each."""

    def __init__(self, matrix: np.ndarray, networks: int, budget: int, penalty: float) -> None:
        total = len(matrix)
        self.matrix, self.penalty = matrix, penalty
        self.units = total // networks
        self.slot = np.arange(total)
        self.holds = np.repeat(np.eye(networks, dtype=bool), self.units, axis=0)
        self.budget = np.full(networks, budget)
        self.alive = np.ones(total, dtype=bool)
        self.merged = np.zeros(total, dtype=bool)
        np.fill_diagonal(matrix, -np.inf)
        self.tier = 0
        self.best, self.value = np.zeros(total, dtype=np.int64), np.full(total, -np.inf)
        self.refresh(np.arange(total))

    def allowed(self, row: int) -> np.ndarray:
        """Tell which slots may join one: in tier 0 within the rules, in 1 beyond the budget, in 2 any."""
        allowed = self.alive.copy()
        allowed[row] = False
        if self.tier < 1:
            spent = self.holds[row] & (self.budget <= 0)
            allowed &= ~(self.holds & spent).any(1)
        if self.tier < 2 and not self.penalty:
            allowed &= ~self.merged if not self.merged[row] else False
        return allowed

    def refresh(self, rows: np.ndarray) -> None:
        """Find the best partner of some slots."""
        for row in rows:
            values = np.where(self.allowed(row), self.matrix[row], -np.inf)
            self.best[row] = values.argmax()
            self.value[row] = values[self.best[row]]

    def step(self) -> None:
        """Merge the two slots of highest correlation."""
        while not np.isfinite(self.value.max()):  # and no later merge makes a pair that an earlier tier would allow
            self.tier += 1
            self.refresh(np.flatnonzero(self.alive))
        row = int(self.value.argmax())
        first, second = sorted((row, int(self.best[row])))
        shared = self.holds[first] & self.holds[second]
        self.budget -= shared
        self.join(first, second)
        spent = self.tier < 1 and bool((shared & (self.budget <= 0)).any())
        stale = self.alive & (spent | np.isin(self.best, (first, second)))
        stale[first] = True
        self.refresh(np.flatnonzero(stale))

    def join(self, first: int, second: int) -> None:
        """Make one slot of two."""
        least = np.minimum(self.matrix[first], self.matrix[second])
        least *= np.where(least > 0, self.penalty, 1.0)  # or units that oppose each other would gain
        self.matrix[first], self.matrix[:, first] = least, least
        self.matrix[first, first] = -np.inf
        self.slot[self.slot == second] = first
        self.holds[first] |= self.holds[second]
        self.merged[first] = True
        self.alive[second], self.value[second] = False, -np.inf


def _numbered(slot: np.ndarray, networks: int) -> Tensor:
    """Number slots by their first units, which are those of the first network where it has one."""
    return torch.from_numpy(np.unique(slot, return_inverse=True)[1].astype(np.int64).reshape(networks, -1))


def _check(correlation: Tensor, networks: int, within: float, penalty: float) -> int:
    shape = tuple(correlation.shape)
    if networks < 1 or len(shape) != 2 or shape[0] != shape[1] or not shape[0] or shape[0] % networks:
        raise DataError(f"correlations of shape {shape} for {networks} networks; expected (k·n, k·n), all of n units")
    for name, value in (("within", within), ("penalty", penalty)):
        if not 0 <= value <= 1:
            raise DataError(f"{name} is {value}; expected a number from 0 to 1")
    if not torch.isfinite(correlation).all():
        raise NotFiniteError(f"correlations of shape {shape} hold NaN or infinity; put 0 where a unit never varies")
    return shape[0] // networks
