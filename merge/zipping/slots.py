"""Slots: which units of several networks become one unit, and the two matrices that say so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.errors import DataError


@dataclass(frozen=True, eq=False)
class Slots:
    """A partition of the units of k networks, n each, into n slots; the units in a slot are merged into one.

    Attributes:
        index: (k, n) int64: of each network's units the slot that each is in.

    Raises:
        DataError: A slot is empty, or there is none of that number.

    >>> pairs = Slots(torch.tensor([[0, 1], [1, 0]]))
    >>> pairs.merge
    tensor([[0.5000, 0.0000, 0.0000, 0.5000],
            [0.0000, 0.5000, 0.5000, 0.0000]], dtype=torch.float64)
    >>> torch.equal(pairs.merge @ pairs.unmerge, torch.eye(2, dtype=torch.float64))
    True
    """

    index: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.index.shape)
        if self.index.ndim != 2 or not self.index.numel() or self.index.dtype != torch.int64:
            raise DataError(f"slots of shape {shape} and type {self.index.dtype}; expected (networks, units), int64")
        if not torch.equal(self.index.unique(), torch.arange(shape[1])):
            raise DataError(f"slots of shape {shape}: every number from 0 to {shape[1] - 1} must occur, and no other")

    @classmethod
    def identity(cls, networks: int, units: int) -> Slots:
        """Put the units of each place into one slot: what averaging does.

        Args:
            networks: How many.
            units: Of each network.
        """
        return cls(torch.arange(units).repeat(networks, 1))

    @property
    def networks(self) -> int:
        """Number of networks, k."""
        return len(self.index)

    @property
    def size(self) -> int:
        """Number of slots, n."""
        return self.index.shape[1]

    @property
    def counts(self) -> Tensor:
        """Number of units in each slot, (n,)."""
        return torch.bincount(self.index.flatten(), minlength=self.size)

    @property
    def merge(self) -> Tensor:
        """The merge matrix M, (n, k·n) in float64: each slot is the mean of its units."""
        return self.unmerge.T / self.counts[:, None]

    @property
    def unmerge(self) -> Tensor:
        """The unmerge matrix U, (k·n, n) in float64: each unit is read off its slot, and M U = 1."""
        return torch.nn.functional.one_hot(self.index.flatten(), self.size).to(torch.float64)

    @property
    def across(self) -> float:
        """Share of the slots that hold one unit of every network: 1 for permutations."""
        held = torch.stack([torch.bincount(row, minlength=self.size) for row in self.index])
        return float((held == 1).all(0).double().mean())
