"""Least squares and ridge regression of all targets, from one eigendecomposition."""

from __future__ import annotations

import torch

from .fitting import Step
from .regression import Regression

_ROUNDING = 1e-12
"""Eigenvalues below this share of the largest are rounding of correlations, not directions."""


class Ridge:
    """Ridge regressions of one problem: min (1/2n)‖y - Xw‖² + (α/2)‖w‖² for any α."""

    def __init__(self, problem: Regression) -> None:
        self._problem = problem
        self._values, self._vectors = torch.linalg.eigh(problem.gram)
        self._seen = self._vectors.T @ problem.cross

    def step(self, penalty: float) -> Step:
        """Solve for α; 0 gives the least squares of least norm."""
        kept = self._values > _ROUNDING * self._values[-1]
        inverse = torch.where(kept, 1 / torch.where(kept, self._values + penalty, 1.0), 0.0)
        coefficients = self._vectors @ (inverse[:, None] * self._seen)
        slope = self._problem.cross - self._problem.gram @ coefficients - penalty * coefficients
        return Step(coefficients, slope.abs().amax(0), 1)


def least_squares(problem: Regression) -> Step:
    """Solve without a penalty, by the coefficients of least norm where there is more than one solution."""
    return Ridge(problem).step(0.0)
