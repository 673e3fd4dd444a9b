"""The Sinkhorn operator: from scores to a doubly stochastic matrix, with the gradients of its fixed point."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...base.errors import DataError, NotFiniteError
from ...base.finite import all_finite

# Products with the matrix between two returns to logarithms; each costs a tenth of such a return.
_INNER = 10

# Scores with a smaller spread converge fast from anywhere; others are approached by temperatures that fall by a factor.
_EASY, _COOLING = 16.0, 4.0

# What the linear system may lack in rank where the matrix falls apart into blocks, as at a permutation.
_RIDGE = 1e-12


def sinkhorn(
    log_scores: Tensor, temperature: float = 1.0, *, iterations: int = 1000, tolerance: float = 1e-5
) -> Tensor:
    """Scale the rows and columns of exp(scores / temperature) until each sums to one; differentiable in the scores.

    The iterations run in the logarithms, so that no temperature is too low, and leave no graph behind: the gradient is
    that of the fixed point, one linear system of n unknowns for each matrix (Eisenberger et al. 2022; Peña et al.
    2023). It is exact where the iterations have converged, whatever their number; memory does not grow
    with it.

    Args:
        log_scores: (…, n, n), finite; each matrix of a batch is scaled on its own.
        temperature: The lower, the closer to the permutation with the largest sum of scores.
        iterations: Give up after so many; the columns then sum to one and the rows nearly so.
        tolerance: Largest deviation of a row's sum from one.

    Returns:
        Of the same shape, type and device: entries in [0, 1], rows and columns that sum to one.

    Raises:
        DataError: The matrices are not square, or a number is not positive.
        NotFiniteError: A score is NaN or infinite.

    Reference:
        Eisenberger, Toker, Leal-Taixé, Bernard, Cremers. A Unified Framework for Implicit Sinkhorn Differentiation.
        CVPR 2022. https://arxiv.org/abs/2205.06688

    >>> scores = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> [[round(entry, 4) for entry in row] for row in sinkhorn(scores).tolist()]
    [[0.7311, 0.2689], [0.2689, 0.7311]]
    """
    if log_scores.ndim < 2 or log_scores.shape[-1] != log_scores.shape[-2] or not log_scores.is_floating_point():
        raise DataError(
            f"the scores have shape {tuple(log_scores.shape)} and type {log_scores.dtype}; "
            "expected floating-point matrices of shape (…, n, n)"
        )
    if not (0 < temperature < math.inf and tolerance > 0 and iterations >= 1):
        raise DataError(
            f"temperature, iterations and tolerance must be positive, not {temperature}, {iterations} and {tolerance}"
        )
    scores = log_scores / temperature
    if not all_finite(scores):
        raise NotFiniteError(f"scores of shape {tuple(scores.shape)} over the temperature hold NaN or infinity")
    return _Sinkhorn.apply(scores, iterations, tolerance)  # pyright: ignore[reportReturnType]  (untyped in torch)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, iterations: int, tolerance: float) -> Tensor:
        plan = _scaled(scores, iterations, tolerance)
        ctx.save_for_backward(plan)
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (plan,) = ctx.saved_tensors
        return pull_back(plan, gradient), None, None


def _scaled(scores: Tensor, iterations: int, tolerance: float) -> Tensor:
    columns = _warmed_up(scores)
    done = 0
    while True:
        inner = min(_INNER, iterations - done)
        plan, columns = _round(scores, columns, inner)
        done += inner
        if done >= iterations or float((plan.sum(-1) - 1).abs().max()) <= tolerance:
            return plan


def _warmed_up(scores: Tensor) -> Tensor:
    """Give potentials of the columns to start from: those of temperatures that fall to the one that is asked for.

    From nothing, the number of iterations that a low temperature takes grows with the spread of the scores.
    """
    columns = torch.zeros_like(scores[..., :1, :])
    low, high = scores.aminmax()
    hotter = math.ceil(math.log(max(float(high - low) / _EASY, 1.0), _COOLING))
    for stage in range(hotter, 0, -1):
        columns = _COOLING * _round(scores / _COOLING**stage, columns, _INNER)[1]
    return columns


def _round(scores: Tensor, columns: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Iterate once in logarithms and then on the matrix itself: the matrix, and the potentials of its columns."""
    rows = -(scores + columns).logsumexp(-1, keepdim=True)
    columns = -(scores + rows).logsumexp(-2, keepdim=True)
    plan = (scores + rows + columns).exp_()
    left, right = _scalings(plan, iterations)
    return left.mT * plan * right, columns + right.log()


def _scalings(plan: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Iterate on the matrix itself, which is fast but bounded by the range of its type: factors of rows and columns."""
    least = torch.finfo(plan.dtype).tiny ** 0.5
    left = right = torch.ones_like(plan[..., :1, :])
    for _ in range(iterations):
        # rows of numbers in front of the matrices: ten times as fast on a CPU as columns behind them
        left = (right @ plan.mT).clamp_min_(least).reciprocal_()
        right = (left @ plan).clamp_min_(least).reciprocal_()
    return left, right


def pull_back(plan: Tensor, gradient: Tensor) -> Tensor:
    """Carry a gradient from a doubly stochastic matrix P back to the scores S of which it is the Sinkhorn matrix.

    dP = P * (dS + f 1ᵀ + 1 gᵀ), with f and g such that no sum of a row r or column c changes. The transposed map is
    P * (G - a 1ᵀ - 1 bᵀ), where diag(r) a + P b = (P * G) 1 and Pᵀ a + diag(c) b = (P * G)ᵀ 1; a is eliminated.

    Args:
        plan: (…, n, n) as the operator gave it.
        gradient: The same shape.
    """
    p, weighted = plan.double(), (plan * gradient).double()
    ones = torch.ones_like(p[..., :1])
    # a row that the iterations have not reached may be empty
    r, c = (p @ ones).clamp_min(_RIDGE), p.mT @ ones
    over_rows = p / r
    # the potentials are known up to a constant shift from one to the other: that of b has mean zero
    system = torch.diag_embed(c.squeeze(-1) + _RIDGE) - p.mT @ over_rows + 1 / p.shape[-1]
    p_rows, p_columns = weighted @ ones, weighted.mT @ ones
    b = torch.cholesky_solve(p_columns - over_rows.mT @ p_rows, torch.linalg.cholesky(system))
    a = p_rows / r - over_rows @ b
    return (weighted - p * (a + b.mT)).to(gradient)
