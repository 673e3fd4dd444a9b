"""What sparse prediction is measured against: ridge regression, matching pursuit, the one-to-one partner."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.moments import Moments
from .fitting import Layers, Rule, Step, falling, predicted
from .least_squares import Ridge
from .prediction import Prediction
from .regression import Regression

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_SPAN = 1e4
_EXPLAINED = 1e-12


def ridge_prediction(
    moments: Moments | Sequence[Moments],
    predictors: str,
    targets: str,
    *,
    penalty: float | Sequence[float] | None = None,
    held_out: Moments | None = None,
    penalties: int = 30,
    rule: Rule = "best",
    per_target: bool = False,
) -> Prediction:
    """Predict each unit of one layer from all units of another: min (1/2n)‖y - Xw‖² + (α/2)‖w‖², standardised.

    scikit-learn's `Ridge` calls nα what is α here. One eigendecomposition serves all penalties.

    Args:
        moments: Of the training samples; for cross-validation a sequence of `Moments` of disjoint parts.
        predictors: Name of the layer of the predictors.
        targets: Name of the layer of the targets, another one.
        penalty: α: a number; several, the smallest in use; or None, chosen by cross-validation.
        held_out: Moments of other samples, to judge by.
        penalties: How many are tried where it is chosen, from 10 down to 0.001.
        rule: Choose the "best" mean R², or the strongest penalty within "one_se" (standard error) of it.
        per_target: Choose for each target by itself.

    Raises:
        DataError: A penalty is negative or not finite; there is nothing to cross-validate over; the layers are one.
        LayerNotFoundError: The moments lack a layer or a pair.

    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments()
    >>> moments.update({"a": x @ torch.tensor([[1.0], [2.0], [0.0]]), "b": x})
    >>> ridge_prediction(moments, "b", "a", penalty=1e-6).r2_train.round(decimals=4)
    tensor([1.], dtype=torch.float64)
    """
    spaced = np.geomspace(10, 10 / _SPAN, max(penalties, 1)).tolist()
    values = spaced if penalty is None else falling(penalty)

    def solve(problem: Regression, wanted: Sequence[float]) -> Iterator[Step]:
        ridge = Ridge(problem)
        return (ridge.step(value) for value in wanted)

    layers = Layers(predictors, targets, "ridge")
    how = {"choose": penalty is None, "rule": rule, "per_target": per_target}
    return predicted(layers, moments, held_out, solve, values, **how)


def omp_prediction(
    moments: Moments | Sequence[Moments],
    predictors: str,
    targets: str,
    *,
    count: int | None = None,
    most: int = 20,
    held_out: Moments | None = None,
    rule: Rule = "best",
    per_target: bool = False,
) -> Prediction:
    """Predict each unit of one layer from a given number of units of another, taken greedily.

    Orthogonal matching pursuit (Pati et al. 1993) on standardised units: of all predictors the one that correlates most
    with what is left of the target joins, and all that joined are fitted anew.

    Args:
        moments: Of the training samples; for cross-validation a sequence of `Moments` of disjoint parts.
        predictors: Name of the layer of the predictors.
        targets: Name of the layer of the targets, another one.
        count: Number of predictors; None, chosen by cross-validation. A target that fewer explain wholly takes fewer.
        most: The largest number that is tried.
        held_out: Moments of other samples, to judge by.
        rule: Choose the "best" mean R², or the smallest number within "one_se" (standard error) of it.
        per_target: Choose for each target by itself.

    Raises:
        DataError: A number is below 1; there is nothing to cross-validate over; the layers are one.
        LayerNotFoundError: The moments lack a layer or a pair.

    >>> x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments()
    >>> moments.update({"a": x[:, 1:2] - 2 * x[:, 4:], "b": x})
    >>> omp_prediction(moments, "b", "a", count=2).coefficients.to_dense().nonzero()[:, 1]
    tensor([1, 4])
    """
    for name, value in (("count", count), ("most", most)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; expected at least 1 predictor")
    numbers = range(1, (most if count is None else count) + 1)
    layers = Layers(predictors, targets, "omp")
    how = {"choose": count is None, "rule": rule, "per_target": per_target}
    return predicted(layers, moments, held_out, _pursued, [float(number) for number in numbers], **how)


def one_to_one_prediction(
    moments: Moments | Sequence[Moments],
    predictors: str,
    targets: str,
    *,
    matching: Tensor | ArrayLike | None = None,
    held_out: Moments | None = None,
) -> Prediction:
    """Predict each unit of one layer from one unit of another, by the line of least squares.

    Args:
        moments: Of the training samples, whole or in parts.
        predictors: Name of the layer of the predictors.
        targets: Name of the layer of the targets, another one.
        matching: (targets,), the predictor of each target, -1 for none, such as `bipartite_matching(...).partner`; a
            target without one is predicted by its mean. Default: the one that correlates most, in magnitude.
        held_out: Moments of other samples, to judge by.

    Raises:
        DataError: The matching has another shape or names units that are not there; the layers are one.
        LayerNotFoundError: The moments lack a layer or a pair.

    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments()
    >>> moments.update({"a": x[:, [1, 0]] * 3, "b": x})
    >>> one_to_one_prediction(moments, "b", "a", matching=[1, -1]).r2_train.round(decimals=4).abs()
    tensor([1., 0.], dtype=torch.float64)
    """
    partner = None if matching is None else torch.as_tensor(matching)

    def solve(problem: Regression, _: Sequence[float]) -> Iterator[Step]:
        yield _matched(problem, partner)

    return predicted(Layers(predictors, targets, "one-to-one"), moments, held_out, solve, [1.0], choose=False)


def _matched(problem: Regression, partner: Tensor | None) -> Step:
    p, q = problem.given.across.shape
    if partner is None:
        places = problem.cross.abs().argmax(0)
    else:
        if partner.shape != (q,) or partner.is_floating_point() or not bool(((partner >= -1) & (partner < p)).all()):
            raise DataError(
                f"matching of shape {tuple(partner.shape)} and {partner.dtype}; expected for each of {q} targets the "
                f"place of one of {p} predictors, or -1"
            )
        inner = torch.full((p + 1,), -1, device=problem.cross.device)
        inner[problem.kept_x] = torch.arange(len(problem.kept_x), device=inner.device)
        places = inner[partner.to(inner.device)[problem.kept_y]]  # -1 reads the last entry, which is -1
    coefficients = torch.zeros_like(problem.cross)
    targets = (places >= 0).nonzero().flatten()
    coefficients[places[targets], targets] = problem.cross[places[targets], targets]
    return Step(coefficients, torch.zeros_like(problem.cross[0]))


def _pursued(problem: Regression, numbers: Sequence[float]) -> Iterator[Step]:
    gram, cross = problem.gram, problem.cross
    coefficients, left = torch.zeros_like(cross), cross
    chosen = torch.zeros(0, cross.shape[1], dtype=torch.int64, device=cross.device)
    going = torch.ones(cross.shape[1], dtype=torch.bool, device=cross.device)
    for number in numbers:
        if number <= len(gram):
            going = going & (left.abs().amax(0) > _EXPLAINED)
            chosen = torch.cat([chosen, left.abs().argmax(0)[None]])
            coefficients, going = _refitted(gram, cross, chosen, coefficients, going)
            left = cross - gram @ coefficients
        # What was taken is fitted exactly: its slope is zero but for rounding.
        taken = (left * (coefficients != 0)).abs().amax(0)
        yield Step(coefficients, taken, int(number))


def _refitted(gram: Tensor, cross: Tensor, chosen: Tensor, before: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    matrices = gram[chosen.T[:, :, None], chosen.T[:, None, :]]
    factors, failed = torch.linalg.cholesky_ex(matrices)
    # A predictor that the others make up adds nothing: such a target stays as it was.
    going = going & (failed == 0) & (factors.diagonal(dim1=1, dim2=2).amin(1) > math.sqrt(_EXPLAINED))
    right = cross.gather(0, chosen).T[:, :, None]
    half = torch.linalg.solve_triangular(factors, right, upper=False)
    values = torch.linalg.solve_triangular(factors.mT, half, upper=True)[:, :, 0].T
    fitted = torch.zeros_like(before).scatter_(0, chosen, values)
    return torch.where(going, fitted, before), going
