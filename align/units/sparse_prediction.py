"""One unit from few: the LASSO of every unit of one layer on all units of another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.moments import Moments
from .fitting import Layers, Rule, Step, falling, predicted
from .lasso import largest_penalty, lasso_path
from .least_squares import least_squares
from .prediction import Prediction
from .regression import Regression

_CHOOSING = 1e-4
"""Tolerance in cross-validation: R² then agrees to about its square."""


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
    """Predict each unit of one layer from few units of another (Li et al. 2015, one-to-many).

    For every target y the LASSO min (1/2n)‖y - Xw‖² + α‖w‖₁ of centred units, with α as in scikit-learn, from moments
    alone: all targets at once, along a falling sequence of penalties, each started from the solution before; see
    `lasso_path`.

    Args:
        moments: Of the training samples; for cross-validation a sequence of `Moments` of disjoint parts, which are left
            out in turn, more than five of them pooled to five. The pairs (predictors, predictors) and (predictors,
            targets) must have been kept.
        predictors: Name of the layer of X.
        targets: Name of the layer of the y, another one.
        penalty: α: a number; several, which are solved from the largest on, the smallest in use; or None, chosen by
            cross-validation. 0 is least squares, of least norm where that is not unique.
        held_out: Moments of other samples, to judge by.
        standardise: Solve for units of standard deviation 1, as in the paper; else for units as they are.
        penalties: Length of the path where the penalty is chosen; it ends sooner where the parts left out are predicted
            ever worse.
        smallest: Its last penalty, as a share of the smallest with which nothing is predicted.
        rule: Choose the "best" mean R², or the strongest penalty within "one_se" (standard error) of it.
        per_target: Choose for each target by itself, not for all together.
        tolerance: Largest violation of a condition of optimality, in correlations.
        max_iterations: For each penalty.

    Returns:
        Coefficients, R², number of predictors and optimality of each target, and the path.

    Raises:
        DataError: A penalty is negative or not finite; there is nothing to cross-validate over; predictors and targets
            are one layer; no unit varies.
        LayerNotFoundError: The moments lack a layer or a pair.

    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    >>> moments = Moments()
    >>> moments.update({"a": torch.stack([x[:, 0] + x[:, 3], x[:, 5]], 1), "b": x})
    >>> found = sparse_prediction(moments, "b", "a", penalty=0.1)
    >>> found.count.tolist(), [row.nonzero().flatten().tolist() for row in found.coefficients.to_dense()]
    ([2, 1], [[0, 3], [5]])
    """
    given = None if penalty is None else list(dict.fromkeys(falling(penalty)))
    if penalties < 1 or not 0 < smallest <= 1:
        raise DataError(f"penalties is {penalties}, smallest {smallest}; expected at least 1, and a share up to 1")

    def solve(problem: Regression, values: Sequence[float], tolerance: float = tolerance) -> Iterator[Step]:
        positive = [value for value in values if value > 0]
        scale = _scale(problem, standardise)
        if positive:
            path = lasso_path(
                problem.gram, problem.cross, positive, scale=scale, tolerance=tolerance, max_iterations=max_iterations
            )
            yield from (Step(found.coefficients, found.violation, found.iterations, found.gradient) for found in path)
        if len(positive) < len(values):
            yield least_squares(problem)

    def spaced(problem: Regression) -> list[float]:
        largest = largest_penalty(problem.cross, _scale(problem, standardise))
        if not largest > 0:
            return [1.0]  # nothing correlates with anything
        return np.geomspace(largest, smallest * largest, penalties).tolist()

    layers = Layers(predictors, targets, "lasso")
    return predicted(
        layers,
        moments,
        held_out,
        solve,
        spaced if given is None else given,
        choose=given is None,
        rough=partial(solve, tolerance=max(tolerance, _CHOOSING)),
        rule=rule,
        per_target=per_target,
    )


def _scale(problem: Regression, standardise: bool) -> Tensor | None:
    # α|w| of units as they are, over the variance of the target, is α / (scale_x · scale_y) times |w| of standardised.
    return None if standardise else 1 / torch.outer(problem.scale_x, problem.scale_y)
