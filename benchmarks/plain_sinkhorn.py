"""Re-basin by gradients through the Sinkhorn operator (Peña et al. 2023), as a user would write it.

A matrix of scores for each group becomes doubly stochastic by twenty Sinkhorn iterations; Adam lowers the squared
distance between the networks; its gradient passes the operator by implicit differentiation (Eisenberger et al. 2022).
The scores are rounded to permutations by assignment after each step, and the best ones are kept. Permutations are
specified by hand; nothing here knows of `isthmus`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plain_specifications as plain
import torch
from plain_specifications import Orders, Specification, State
from scipy.optimize import linear_sum_assignment
from torch import Tensor


class Sinkhorn(torch.autograd.Function):
    """Rows and columns scaled in turn until they sum to one."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, iterations: int) -> Tensor:
        """Scale exp(scores)."""
        log = scores
        for _ in range(iterations):
            log = log - log.logsumexp(0, keepdim=True)
            log = log - log.logsumexp(1, keepdim=True)
        matrix = log.exp()
        ctx.save_for_backward(matrix)
        return matrix

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve for what the scaling takes off the gradient: its part along rows and columns."""
        (matrix,) = ctx.saved_tensors
        size = len(matrix)
        weighted = gradients[0] * matrix
        system = torch.zeros(2 * size, 2 * size)
        system[:size, :size], system[size:, size:] = torch.diag(matrix.sum(1)), torch.diag(matrix.sum(0))
        system[:size, size:], system[size:, :size] = matrix, matrix.T
        sums = torch.cat((weighted.sum(1), weighted.sum(0)))
        # A constant may move from rows to columns: the last unknown is zero.
        solution = torch.cat((torch.linalg.solve(system[:-1, :-1], sums[:-1]), torch.zeros(1)))
        return weighted - matrix * (solution[:size, None] + solution[size:]), None


def sinkhorn_rebasin(
    specification: Specification,
    a: State,
    b: State,
    rates: Sequence[float] = (1.0, 10.0),
    steps: int = 50,
    iterations: int = 20,
) -> Orders:
    """Give the best rounded permutation met in fifty steps from near the identity, at each of several rates."""
    found = [_descend(specification, a, b, lr, steps, iterations) for lr in rates]
    values = [plain.objective(a, plain.permute(specification, b, orders)) for orders in found]
    return found[int(np.argmax(values))]


def _descend(specification: Specification, a: State, b: State, lr: float, steps: int, iterations: int) -> Orders:
    compared = plain.parameters(specification)
    generator = torch.Generator().manual_seed(0)
    scores = {
        group: (torch.eye(size) + 0.1 * torch.randn(size, size, generator=generator)).requires_grad_()
        for group, size in plain.groups(compared, a).items()
    }
    optimizer = torch.optim.AdamW(list(scores.values()), lr=lr)
    count = sum(a[name].numel() for name in compared)
    best, best_value = plain.identity(specification, a), plain.objective(a, b)
    for _ in range(steps):
        matrices = {group: Sinkhorn.apply(score, iterations) for group, score in scores.items()}
        distance = torch.zeros(())
        for name, axes in compared.items():
            moved = b[name]
            for axis, group in enumerate(axes):
                if group is not None:
                    moved = plain.mixed(matrices[group], moved, axis)
            distance = distance + (a[name] - moved).square().sum() / count
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        orders = {group: _assign(score) for group, score in scores.items()}
        value = plain.objective(a, plain.permute(specification, b, orders))
        if value > best_value:
            best, best_value = orders, value
    return best


def _assign(scores: Tensor) -> np.ndarray:
    return linear_sum_assignment(scores.detach().double().numpy(), maximize=True)[1]
