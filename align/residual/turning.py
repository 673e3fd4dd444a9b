"""Rotations that can be descended: skew-symmetric numbers, of which Cayley's formula makes orthogonal matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .orthogonal import complement, held
from .streams import Stream


def cayley(free: Tensor) -> Tensor:
    """Make an orthogonal matrix of any square one: (1 - S/2)⁻¹ (1 + S/2) with S = W - Wᵀ (Cayley 1846).

    Small S give exp(S) up to third order; every rotation without an angle of 180° is reached.

    Args:
        free: W, (…, n, n).

    Returns:
        Of the same shape; the identity where W is symmetric.

    >>> turn = cayley(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())
    >>> torch.allclose(turn @ turn.T, torch.eye(4, dtype=turn.dtype)), bool(torch.linalg.det(turn) > 0)
    (True, True)
    """
    half = (free - free.mT) / 2
    one = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    return torch.linalg.solve(one - half, one + half)


class Turns:
    """What is rotated beyond a start, or given any other basis, as numbers that a descent may move.

    Args:
        streams: Of the networks; where the norm is a layer norm, the vector of ones stays where it is.
        start: Rotation by group; what is no stream is one matrix for each block.
        like: A tensor whose device and precision the numbers take.
        dense: Groups that take any invertible matrix, by the exponential.
    """

    def __init__(
        self, streams: Iterable[Stream], start: Mapping[str, Tensor], like: Tensor, dense: Iterable[str] = ()
    ) -> None:
        self.start, self.dense = dict(start), set(dense)
        self.holding = {stream.name for stream in streams if stream.hold_ones}
        self.bases = {name: complement(len(start[name]), like.dtype).to(like.device) for name in self.holding}
        self.free = {name: torch.zeros(self._shape(name), dtype=like.dtype).to(like.device) for name in start}
        for tensor in self.free.values():
            tensor.requires_grad_()

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self.start[name].shape)
        return (shape[0] - 1, shape[1] - 1) if name in self.holding else shape

    def _matrix(self, name: str, free: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(free) if name in self.dense else cayley(free)

    def matrices(self) -> dict[str, Tensor]:
        """Give what comes after the start, with gradients."""
        found = {name: self._matrix(name, tensor) for name, tensor in self.free.items()}
        for name, basis in self.bases.items():
            found[name] = basis @ found[name] @ basis.T + 1 / len(basis)
        return found

    def exact(self) -> dict[str, Tensor]:
        """Give the rotations from the very beginning, exact to the precision of float64, on the CPU."""
        found = {}
        for name, tensor in self.free.items():
            turn = self._matrix(name, tensor.detach().double().cpu())
            turn = held(turn, len(self.start[name])) if name in self.holding else turn
            found[name] = turn @ self.start[name].double()
        return found
