"""The LASSO of many targets at once, from products of units alone: what sparse prediction solves."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.errors import DataError, NotFiniteError
from .splitting import Splitting

_ROUGH = 5e-6
_ROUGH_ITERATIONS = 120
_INDEFINITE = 1e-12


@dataclass(frozen=True, eq=False)
class LassoSolution:
    """Solution for one penalty.

    Attributes:
        penalty: α.
        coefficients: W, (predictors x targets) in float64, with exact zeros.
        gradient: C − GW, the covariance of each predictor with what is left of each target, (predictors x targets).
        violation: For each target the largest violation of a condition of optimality, (targets,).
        iterations: Until the last target had converged.
    """

    penalty: float
    coefficients: Tensor
    gradient: Tensor
    violation: Tensor
    iterations: int


def lasso_path(
    gram: Tensor,
    cross: Tensor,
    penalties: Sequence[float],
    *,
    scale: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 20_000,
) -> Iterator[LassoSolution]:
    """Solve the LASSO of every target for a falling sequence of penalties, each from the solutions before.

    For every column c of C: min over w of ½ wᵀGw − cᵀw + α Σ_j s_j |w_j|. With G and c the correlations of
    standardised predictors with each other and with the target this is (1/2n)‖y − Xw‖² + α‖w‖₁, as in Tibshirani
    (1996) and scikit-learn.

    All targets are solved together by operator splitting (Boyd et al. 2011, section 6.4), which makes one matrix
    product of each iteration: first in float32, then in float64; targets that have converged drop out. The start is
    extrapolated along the path, as the solution is linear in α between two changes of its support. Where it is cheap
    the last step is exact, on the support. A target has converged when it meets the conditions of optimality:
    r = c − Gw has r_j = αs_j sign(w_j) where w_j ≠ 0, and |r_j| ≤ αs_j elsewhere.

    Args:
        gram: G, (predictors x predictors), symmetric and positive semi-definite, perhaps singular. It converges fast
            for diagonal entries of 1, or 0 for predictors that do not vary.
        cross: C, (predictors x targets), on the same device.
        penalties: α, positive and falling.
        scale: s, positive, (predictors x targets). Default: 1.
        tolerance: Largest violation of a condition of optimality, in the units of C. Default: 1e-6.
        max_iterations: For each penalty; a target that has not converged by then is warned about.

    Returns:
        An iterator that solves for one penalty at a time.

    Raises:
        DataError: Shapes, devices or penalties do not fit.
        NotFiniteError: A matrix holds NaN or infinity.

    >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> solutions = lasso_path(gram, torch.tensor([[0.9], [0.6]]), [1.0, 0.5])
    >>> [[round(w, 4) for w in solution.coefficients.flatten().tolist()] for solution in solutions]
    [[0.0, 0.0], [0.4, 0.0]]
    """
    gram, cross = _checked("gram", gram), _checked("cross", cross)
    if gram.shape[0] != gram.shape[1] or len(gram) != len(cross) or gram.device != cross.device:
        raise DataError(
            f"gram of shape {tuple(gram.shape)} on {gram.device} and cross of shape {tuple(cross.shape)} on "
            f"{cross.device}; expected (predictors x predictors) and (predictors x targets) on one device"
        )
    penalties = [float(penalty) for penalty in penalties]
    if not all(0 < penalty < float("inf") for penalty in penalties) or not 0 < tolerance < float("inf"):
        raise DataError(f"penalties are {penalties}, tolerance is {tolerance}; expected positive numbers")
    if any(after > before for before, after in itertools.pairwise(penalties)):
        raise DataError(f"penalties are {penalties}; expected them in falling order")
    if scale is not None:
        scale = _checked("scale", scale)
        if scale.shape != cross.shape or not bool((scale > 0).all()):
            raise DataError(
                f"scale has shape {tuple(scale.shape)}; expected positive numbers of the shape {tuple(cross.shape)}"
            )
    return _path(gram, cross, penalties, scale, tolerance, max_iterations)


def largest_penalty(cross: Tensor, scale: Tensor | None = None) -> float:
    """Give the smallest α for which nothing is predicted: max |c_j| / s_j over all predictors and targets.

    Args:
        cross: C, (predictors x targets).
        scale: s, (predictors x targets). Default: 1.

    >>> largest_penalty(torch.tensor([[0.5, -0.75]]))
    0.75
    """
    return float((cross.abs() if scale is None else cross.abs() / scale).max())


def _checked(name: str, matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or not matrix.numel() or not matrix.is_floating_point():
        raise DataError(f"{name} has shape {tuple(matrix.shape)} and is {matrix.dtype}; expected a matrix of numbers")
    if not bool(matrix.isfinite().all()):
        raise NotFiniteError(f"{name} of shape {tuple(matrix.shape)} holds NaN or infinity")
    return matrix.detach().to(torch.float64)


def _path(
    gram: Tensor,
    cross: Tensor,
    penalties: Sequence[float],
    scale: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> Iterator[LassoSolution]:
    eigen = torch.linalg.eigh(gram)
    if float(eigen[0][0]) < -_INDEFINITE * float(eigen[0][-1]):
        # Products of low precision; the objective would have no minimum.
        gram = (eigen[1] * eigen[0].clamp_min(0)) @ eigen[1].T
    rough, fine = (Splitting(gram, eigen, dtype) for dtype in (torch.float32, torch.float64))
    cross_rough = cross.to(torch.float32)
    earlier: list[LassoSolution] = []
    for penalty in penalties:
        threshold = cross.new_tensor(penalty) if scale is None else penalty * scale
        start = _extrapolated(earlier, penalty, cross).to(torch.float32)
        limited = threshold.clamp_max(torch.finfo(torch.float32).max).to(torch.float32)
        # Most of the way in half the time. Where float32 cannot go further, float64 takes over.
        start = rough.solve(
            cross_rough, limited, start, max(tolerance, _ROUGH), min(_ROUGH_ITERATIONS, max_iterations), exact=False
        )
        found = fine.solve(
            cross, threshold, start.coefficients.to(torch.float64), tolerance, max_iterations, exact=True
        )
        iterations = start.iterations + found.iterations
        solution = LassoSolution(penalty, found.coefficients, found.gradient, found.violation, iterations)
        _warn(solution, tolerance, max_iterations)
        earlier = [*earlier[-1:], solution]
        yield solution


def _extrapolated(earlier: Sequence[LassoSolution], penalty: float, cross: Tensor) -> Tensor:
    if not earlier:
        return torch.zeros_like(cross)
    last = earlier[-1].coefficients
    step = earlier[0].penalty - earlier[-1].penalty
    if not step:
        return last
    ahead = torch.lerp(earlier[0].coefficients, last, (earlier[0].penalty - penalty) / step)
    # A coefficient that would change its sign, or had none yet, is not on a line.
    return torch.where(ahead * last > 0, ahead, 0.0)


def _warn(solution: LassoSolution, tolerance: float, max_iterations: int) -> None:
    late = int((solution.violation > tolerance).sum())
    if late:
        warnings.warn(
            f"at penalty {solution.penalty:g}, {late} of {len(solution.violation)} targets had not converged after "
            f"{max_iterations} iterations: conditions of optimality are violated by up to "
            f"{float(solution.violation.max()):.1e} (tolerance {tolerance:g}); allow more iterations or a larger "
            "tolerance, or begin with larger penalties",
            UserWarning,
            stacklevel=3,
        )
