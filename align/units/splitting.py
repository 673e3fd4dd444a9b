"""The LASSO of many targets by operator splitting: the iterations behind `lasso_path`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .active_set import descended, kkt_violation, taken

_RELAXATION = 1.7
_CHECK = 4
"""Iterations between two looks at the optimality of each target; a look costs as much as one more iteration."""
_REBALANCE = 40
"""Iterations between two changes of ρ; nearly all penalties of a path take fewer than the first of them."""
_RHO_BY_DENSITY = (1.0, 0.7, 0.5, 0.35, 0.25)
_RHO_LIMITS = (1e-3, 10.0)
_FINISH = 16
"""Iterations before the first exact finish; another one whenever they have doubled."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was found for some targets: columns of W and of C − GW, the violation of each, and the iterations."""

    coefficients: Tensor
    gradient: Tensor
    violation: Tensor
    iterations: int = 0

    def put(self, places: Tensor, other: Found) -> None:
        """Write what was found for the targets at some places."""
        self.coefficients[:, places], self.gradient[:, places] = other.coefficients, other.gradient
        self.violation[places] = other.violation


@dataclass
class _Open:
    """Targets that have not converged yet, a column each; `shift` is (G + ρI)⁻¹C."""

    places: Tensor
    cross: Tensor
    threshold: Tensor
    coefficients: Tensor
    dual: Tensor
    shift: Tensor

    def keep(self, chosen: Tensor) -> None:
        if bool(chosen.all()):
            return
        self.places = self.places[chosen]
        for name in ("cross", "threshold", "coefficients", "dual", "shift"):
            setattr(self, name, taken(getattr(self, name), chosen))


class Splitting:
    """The alternating direction method of multipliers for the LASSO on one Gram matrix, in one precision.

    With Z sparse and U the scaled dual (Boyd et al. 2011, section 6.4): X = (G + ρI)⁻¹(C + ρ(Z − U)), over-relaxed;
    Z = soft(X + U, α/ρ); U = U + X − Z. It converges for every positive semi-definite G and every ρ > 0. The best ρ
    lies between the eigenvalues of G on the supports: near 1 where these are small, towards the smallest eigenvalue
    where they are everything. Where that guess is bad the balance of residuals corrects it (Stellato et al. 2020).

    Args:
        gram: G, (predictors x predictors).
        eigen: Eigenvalues and eigenvectors of G.
        dtype: Precision of the iterations.
    """

    def __init__(self, gram: Tensor, eigen: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        self._gram = gram.to(dtype)
        self._values, self._vectors = (part.to(dtype) for part in eigen)
        self._rho = 0.0
        self._inverse = self._gram

    def solve(
        self, cross: Tensor, threshold: Tensor, start: Tensor, tolerance: float, limit: int, *, exact: bool
    ) -> Found:
        """Iterate until every target meets the conditions of optimality.

        Args:
            cross: C, (predictors x targets).
            threshold: α, one number or (predictors x targets).
            start: Coefficients to start from, (predictors x targets).
            tolerance: Largest violation.
            limit: Iterations at most.
            exact: Now and then let `descended` finish, at no more than the cost of the iterations so far.
        """
        found = self._judged(start.clone(), cross, threshold)
        targets = self._opened(found, cross, threshold, tolerance)
        iterations, spent, finish = 0, 0.0, _FINISH
        while len(targets.places) and iterations < limit:
            balance = self._iterate(targets)
            iterations += _CHECK
            spent += _CHECK * 2.0 * targets.coefficients.numel() * len(cross)
            new = self._judged(targets.coefficients, targets.cross, targets.threshold)
            if exact and iterations == finish:
                new = self._finished(targets, new, tolerance, spent)
                finish *= 2
            found.put(targets.places, new)
            targets.keep(new.violation > tolerance)
            if iterations % _REBALANCE == 0:
                self._rebalance(targets, balance)
        return Found(found.coefficients, found.gradient, found.violation, iterations)

    def _judged(self, coefficients: Tensor, cross: Tensor, threshold: Tensor) -> Found:
        gradient = torch.addmm(cross, self._gram, coefficients, alpha=-1)
        return Found(coefficients, gradient, kkt_violation(coefficients, gradient, threshold))

    def _opened(self, found: Found, cross: Tensor, threshold: Tensor, tolerance: float) -> _Open:
        start, gradient = found.coefficients, found.gradient
        density = float((start != 0).sum()) / start.numel()
        self._set(_RHO_BY_DENSITY[min(int(density * len(_RHO_BY_DENSITY)), len(_RHO_BY_DENSITY) - 1)])
        dual = torch.where(start != 0, threshold * start.sign(), gradient.clamp(-threshold, threshold)) / self._rho
        targets = _Open(torch.arange(start.shape[1], device=start.device), cross, threshold, start, dual, cross)
        targets.keep(found.violation > tolerance)
        targets.shift = self._inverse @ targets.cross
        return targets

    def _set(self, rho: float) -> None:
        if rho != self._rho:
            self._rho = rho
            self._inverse = (self._vectors / (self._values.clamp_min(0) + rho)) @ self._vectors.T

    def _iterate(self, targets: _Open) -> float:
        threshold = targets.threshold / self._rho
        z, u = targets.coefficients, targets.dual
        x = old = z
        for _ in range(_CHECK):
            old = z
            x = torch.addmm(targets.shift, self._inverse, z - u, alpha=self._rho)
            both = torch.lerp(z, x, _RELAXATION).add_(u)
            u = both.clamp(-threshold, threshold)
            z = both.sub_(u)
        targets.coefficients, targets.dual = z, u
        primal, dual = float((x - z).norm()), float((z - old).norm())
        scales = max(float(x.norm()), float(z.norm())), float(u.norm())
        return math.sqrt(primal * scales[1] / (dual * scales[0])) if dual * scales[0] else 1.0

    def _rebalance(self, targets: _Open, balance: float) -> None:
        rho = min(max(self._rho * balance, _RHO_LIMITS[0]), _RHO_LIMITS[1])
        if len(targets.places) and not 0.5 < rho / self._rho < 2:
            targets.dual = targets.dual * (self._rho / rho)
            self._set(rho)
            targets.shift = self._inverse @ targets.cross

    def _finished(self, targets: _Open, found: Found, tolerance: float, budget: float) -> Found:
        tried = (found.violation > tolerance).nonzero().flatten()
        cross, threshold = targets.cross[:, tried], taken(targets.threshold, tried)
        solved = descended(self._gram, cross, threshold, found.coefficients[:, tried], tolerance, budget)
        new = self._judged(solved, cross, threshold)
        done = new.violation <= tolerance
        # The others go on from where they were: a solution on a wrong support is no better start.
        both = Found(found.coefficients.clone(), found.gradient, found.violation)
        both.put(tried[done], Found(new.coefficients[:, done], new.gradient[:, done], new.violation[done]))
        return both
