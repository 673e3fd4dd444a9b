"""Exact solutions of the LASSO on supports: the finish of `lasso_path`."""

from __future__ import annotations

import torch
from torch import Tensor

_ENTRIES = 1 << 23
_TOGETHER = 32
_JITTER = 1e-12
_SLOWER = 16.0
"""Times that a batch of factorisations takes beside a matrix product of as many floating-point operations."""


def kkt_violation(coefficients: Tensor, gradient: Tensor, threshold: Tensor) -> Tensor:
    """Measure how far each target is from the conditions of optimality of the LASSO.

    Args:
        coefficients: W, (predictors x targets).
        gradient: C − GW, (predictors x targets).
        threshold: α, one number or (predictors x targets).

    Returns:
        max over j of |r_j − α_j sign(w_j)| where w_j ≠ 0, of |r_j| − α_j elsewhere; at least 0, (targets,).

    >>> kkt_violation(torch.tensor([[0.4], [0.0]]), torch.tensor([[0.5], [0.6]]), torch.tensor(0.5))
    tensor([0.1000])
    """
    active = (gradient - threshold * coefficients.sign()).abs()
    return torch.where(coefficients != 0, active, gradient.abs() - threshold).amax(0).clamp_min(0)


def taken(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Take some columns of a matrix, or the one number for all of them."""
    return tensor[:, chosen] if tensor.ndim else tensor


def solving_cost(signs: Tensor) -> float:
    """Estimate the cost of `solved_on_support` in floating-point operations of matrix products."""
    return _SLOWER / 3 * float((signs != 0).sum(0).double().pow(3).sum())


def solved_on_support(gram: Tensor, cross: Tensor, threshold: Tensor, signs: Tensor, near: Tensor) -> Tensor:
    """Solve for each target G_AA w_A = c_A − α s_A, with given signs s and their support A.

    Where the matrix of a support is singular, a step of proximal point from coefficients nearby takes its place.

    Args:
        gram: G, (predictors x predictors) in float64.
        cross: C, (predictors x targets).
        threshold: α, one number or (predictors x targets).
        signs: s, (predictors x targets), of which nonzero places are the supports.
        near: Coefficients nearby, (predictors x targets).

    Returns:
        (predictors x targets), zero outside the supports; `near` where the factorisation fails.

    >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    >>> cross, near = torch.tensor([[0.9], [0.6]]).double(), torch.tensor([[0.3], [0.0]]).double()
    >>> solved_on_support(gram, cross, torch.tensor(0.5), near.sign(), near).flatten()
    tensor([0.4000, 0.0000], dtype=torch.float64)
    """
    solved = near.clone()
    wanted = cross - threshold * signs + _JITTER * near
    sizes, order = (signs != 0).sum(0).sort()
    sizes = sizes.tolist()
    done = 0
    while done < len(order):
        # Supports of about one size together: the largest sets how much is factorised for each.
        largest = max(sizes[min(done + _TOGETHER, len(order)) - 1], 1)
        end = min(done + max(1, min(_TOGETHER, _ENTRIES // largest**2)), len(order))
        chunk = order[done:end]
        solved[:, chunk] = _solve(gram, wanted[:, chunk], signs[:, chunk] != 0, near[:, chunk], sizes[end - 1])
        done = end
    return solved


def _solve(gram: Tensor, wanted: Tensor, support: Tensor, near: Tensor, size: int) -> Tensor:
    units = support.to(torch.int8).argsort(dim=0, descending=True, stable=True)[:size]
    inside = support.gather(0, units)
    matrices = gram[units.T[:, :, None], units.T[:, None, :]]
    # Places beyond a support become rows and columns of the identity.
    matrices = matrices * (inside.T[:, :, None] & inside.T[:, None, :])
    matrices.diagonal(dim1=1, dim2=2).add_(torch.where(inside.T, _JITTER, 1.0))
    factors, failed = torch.linalg.cholesky_ex(matrices)
    right = (wanted.gather(0, units) * inside).T[:, :, None]
    # cholesky_solve takes ten times as long for one column.
    half = torch.linalg.solve_triangular(factors, right, upper=False)
    values = torch.linalg.solve_triangular(factors.mT, half, upper=True)[:, :, 0].T
    solved = torch.zeros_like(near).scatter_(0, units, values * inside)
    return torch.where((failed == 0) & solved.isfinite().all(0), solved, near)


def descended(gram: Tensor, cross: Tensor, threshold: Tensor, start: Tensor, tolerance: float, budget: float) -> Tensor:
    """Change supports one predictor at a time until the LASSO is solved (feature-sign search, Lee et al. 2007).

    Each step solves on the support. Where signs hold, the predictor that violates optimality most is added; else the
    coefficients move until the first of them is zero, or to the solution without those of the wrong sign, whichever
    has the lower objective. The objective never rises. Operator splitting is slow where predictors are nearly
    copies of each other and finds the support only in the end; from its neighbourhood a few steps lead there.

    Args:
        gram: G, (predictors x predictors) in float64.
        cross: C, (predictors x targets).
        threshold: α, one number or (predictors x targets).
        start: Coefficients to start from, (predictors x targets).
        tolerance: Largest violation of a condition of optimality.
        budget: When to give up, in floating-point operations of matrix products.

    Returns:
        (predictors x targets), solutions but for those that were given up.
    """
    result = start.clone()
    places = torch.arange(start.shape[1], device=start.device)
    w, signs = start, start.sign()
    while len(places):
        budget -= solving_cost(signs) + 8.0 * w.numel() * len(w)
        if budget < 0:
            break
        w, whole = _step(gram, cross, threshold, w, signs)
        result[:, places] = w
        gradient = torch.addmm(cross, gram, w, alpha=-1)
        signs = _with_worst(w.sign(), gradient, threshold, whole)
        chosen = kkt_violation(w, gradient, threshold) > tolerance
        places, cross, threshold = places[chosen], cross[:, chosen], taken(threshold, chosen)
        w, signs = w[:, chosen], signs[:, chosen]
    return result


def _step(gram: Tensor, cross: Tensor, threshold: Tensor, w: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    solved = solved_on_support(gram, cross, threshold, signs, w)
    wrong = solved * signs < 0
    reach = torch.where(wrong, w / (w - solved), 1.0)
    nearest = reach.amin(0)
    partly = torch.lerp(w, solved, nearest).masked_fill(wrong & (reach <= nearest), 0)
    clipped = solved.masked_fill(wrong, 0)
    lower = _objective(gram, cross, threshold, clipped) < _objective(gram, cross, threshold, partly)
    return torch.where(lower, clipped, partly), ~wrong.any(0)


def _with_worst(signs: Tensor, gradient: Tensor, threshold: Tensor, whole: Tensor) -> Tensor:
    excess = (gradient.abs() - threshold).masked_fill(signs != 0, 0)
    worst, place = excess.max(0)
    sign = torch.where(whole & (worst > 0), gradient.gather(0, place[None])[0].sign(), signs.gather(0, place[None])[0])
    return signs.scatter(0, place[None], sign[None])


def _objective(gram: Tensor, cross: Tensor, threshold: Tensor, w: Tensor) -> Tensor:
    return (w * (gram @ w / 2 - cross)).sum(0) + (threshold * w.abs()).sum(0)
