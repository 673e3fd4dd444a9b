"""Sparse prediction: each unit of one layer as a combination of few units of another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.moments import Moments
from .lasso import kkt_violation, largest_penalty, lasso_path
from .prediction import Prediction
from .prediction_fit import Method, Rule, Step, fitted, whole
from .regression import Regression, parts


def sparse_prediction(
    moments: Moments | Sequence[Moments],
    predictors: str,
    targets: str,
    *,
    penalty: float | Sequence[float] | None = None,
    held_out: Moments | None = None,
    standardise: bool = True,
    penalties: int = 50,
    smallest: float = 1e-3,
    rule: Rule = "best",
    per_target: bool = False,
    tolerance: float = 1e-6,
    max_iterations: int = 20_000,
) -> Prediction:
    """Predict each unit of one layer by few units of another (Li et al. 2015, section 4), with the LASSO.

    For each target y: min over w of (1/2n)‖y − Xw − b‖² + α‖w‖₁, where X are the predictors, b is the intercept and
    all units have mean 0 and variance 1 (`standardise`). Everything is read off moments, for all targets at once, see
    `lasso_path`; no samples are kept, and R² of other data is exact, with their means.

    To choose α give the moments of disjoint parts of the data, one `Moments` each: each part in turn is left out of
    the training and scored. α has the highest mean R² over targets and parts, or is the largest within one standard
    error of it; then all parts together are fitted.

    Args:
        moments: Moments of the training data, or a sequence of moments of disjoint parts of it. They keep the pairs
            (predictors, predictors) and (predictors, targets); "all" does.
        predictors: Layer that predicts.
        targets: Layer whose units are predicted.
        penalty: α, in units of correlation where `standardise`; at α ≥ 1 nothing is ever predicted. A sequence is a
            path: cross-validation chooses from it where there are parts, else the coefficients are those of its
            smallest. 0 is least squares, of smallest norm where the solution is not unique. Default: cross-validated
            over `penalties` values.
        held_out: Moments of other data to score on.
        standardise: Penalise standardised coefficients, as in the paper; else those of activations as they are.
        penalties: How many penalties, from the smallest that predicts nothing down, in equal ratios.
        smallest: Ratio of the last of these to the first.
        rule: Choose the "best" penalty, or the largest within one standard error of it, "one_se".
        per_target: Choose a penalty for each target instead of one for all.
        tolerance: Largest violation of a condition of optimality, in units of correlation.
        max_iterations: For each penalty.

    Returns:
        Coefficients, R² and counts of predictors per target, and the same along the path.

    Raises:
        DataError: There are no parts to choose a penalty by; a penalty, ratio or rule is none; the two layers are one;
            no unit of a layer varies; or moments do not fit each other.
        LayerNotFoundError: A layer or a pair was not kept.

    >>> x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    >>> y = torch.stack([x[:, 0] + x[:, 1], x[:, 5]], 1)
    >>> moments = Moments()
    >>> moments.update({"a": x, "b": y})
    >>> found = sparse_prediction(moments, "a", "b", penalty=0.2)
    >>> found.count.tolist(), sorted(found.predictors(0)[0].tolist()), [round(r, 2) for r in found.r2_train.tolist()]
    ([2, 1], [0, 1], [0.92, 0.96])
    """
    data, other = parts(moments, held_out, predictors, targets)
    if rule not in ("best", "one_se"):
        raise DataError(f"rule is {rule!r}; expected 'best' or 'one_se'")
    given = as_penalties(penalty, len(data))
    regression = whole(data, standardise)
    if given is None:
        given = falling(largest_penalty(regression.cross, _scale(regression)), penalties, smallest)

    def solve(problem: Regression) -> Iterator[Step]:
        return _steps(problem, given, tolerance, max_iterations)

    method = Method("LASSO", "penalty", given, solve)
    return fitted(method, regression, data, other, rule=rule, per_target=per_target)


def as_penalties(penalty: float | Sequence[float] | None, parts: int) -> list[float] | None:
    """Read a penalty, or several, as falling numbers; None where they are to be made.

    Raises:
        DataError: They are negative or not finite, or there are none and fewer than two parts.
    """
    if penalty is None:
        if parts < 2:
            raise DataError(
                "a penalty can only be chosen by cross-validation, which needs the moments of at least two disjoint "
                "parts of the data: pass a list of Moments, one for each part, or a penalty"
            )
        return None
    try:
        values = [float(value) for value in torch.as_tensor(penalty, dtype=torch.float64).flatten()]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"penalty is {penalty!r}; expected a number, or a sequence of numbers") from error
    if not values or not all(0 <= value < math.inf for value in values):
        raise DataError(f"penalty is {penalty!r}; expected numbers from 0 on")
    return sorted(set(values), reverse=True)


def falling(largest: float, count: int, smallest: float) -> list[float]:
    """Make penalties in equal ratios.

    Raises:
        DataError: Their number or the last ratio is out of range.

    >>> falling(8.0, 4, 1 / 8)
    [8.0, 4.0, 2.0, 1.0]
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 2 or not 0 < smallest < 1:
        raise DataError(f"penalties is {count!r}, smallest is {smallest!r}; expected at least 2, and a ratio below 1")
    largest = largest or 1.0  # predictors and targets that have nothing in common
    return [largest * smallest ** (step / (count - 1)) for step in range(count)]


def least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """Solve G W = C, with the smallest W where G is singular.

    >>> least_squares(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)).flatten()
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps * 10
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ cross))


def _steps(problem: Regression, values: Sequence[float], tolerance: float, limit: int) -> Iterator[Step]:
    positive = [value for value in values if value > 0]
    for found in lasso_path(
        problem.gram, problem.cross, positive, scale=_scale(problem), tolerance=tolerance, max_iterations=limit
    ):
        yield Step(found.coefficients, found.violation, found.iterations)
    if len(positive) < len(values):
        coefficients = problem.standardised(least_squares(*problem.penalised))
        gradient = problem.cross - problem.gram @ coefficients
        yield Step(coefficients, kkt_violation(coefficients, gradient, gradient.new_zeros(())))


def _scale(problem: Regression) -> Tensor | None:
    # α|b| of raw coefficients b = w σ_y / σ_x, over σ_y², is α / (σ_x σ_y) |w| of standardised ones.
    return None if problem.standardise else 1 / (problem.scale_x[:, None] * problem.scale_y)
