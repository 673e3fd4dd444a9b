"""What sparse prediction is compared with: ridge regression, orthogonal matching pursuit, and one unit each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.moments import Moments
from .prediction import Prediction
from .prediction_fit import Method, Rule, Step, fitted, whole
from .regression import Regression, parts
from .sparse_prediction import as_penalties, falling, least_squares

_DEPENDENT = 1e-10


def ridge_prediction(
    moments: Moments | Sequence[Moments],
    predictors: str,
    targets: str,
    *,
    penalty: float | Sequence[float] | None = None,
    held_out: Moments | None = None,
    standardise: bool = True,
    penalties: int = 50,
    smallest: float = 1e-7,
    rule: Rule = "best",
    per_target: bool = False,
) -> Prediction:
    """Predict each unit of one layer by all units of another: ridge regression (Hoerl & Kennard 1970).

    min over w of (1/2n)‖y − Xw − b‖² + (λ/2)‖w‖², so W = (G + λI)⁻¹C, from one eigendecomposition for all λ.
    scikit-learn's `Ridge` has alpha = nλ.

    Args:
        moments: As for `sparse_prediction`.
        predictors: Layer that predicts.
        targets: Layer whose units are predicted.
        penalty: λ, as for `sparse_prediction`; 0 is least squares of smallest norm.
        held_out: Moments of other data to score on.
        standardise: Penalise standardised coefficients.
        penalties: How many penalties, from ten times the largest eigenvalue of the predictors down, in equal ratios.
        smallest: Ratio of the last of these to the first.
        rule: "best" or "one_se".
        per_target: Choose a penalty for each target.

    Returns:
        As `sparse_prediction`; all predictors that vary have coefficients.

    Raises:
        DataError: As for `sparse_prediction`.
        LayerNotFoundError: A layer or a pair was not kept.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments()
    >>> moments.update({"a": x, "b": x[:, :1] - x[:, 2:]})
    >>> round(float(ridge_prediction(moments, "a", "b", penalty=0.1).r2_train), 2)
    0.99
    """
    data, other = parts(moments, held_out, predictors, targets)
    if rule not in ("best", "one_se"):
        raise DataError(f"rule is {rule!r}; expected 'best' or 'one_se'")
    given = as_penalties(penalty, len(data))
    regression = whole(data, standardise)
    if given is None:
        largest = float(torch.linalg.eigvalsh(regression.penalised[0])[-1])
        given = falling(10 * largest, penalties, smallest)

    def solve(problem: Regression) -> Iterator[Step]:
        return _ridge_steps(problem, given)

    return fitted(Method("ridge", "penalty", given, solve), regression, data, other, rule=rule, per_target=per_target)


def _ridge_steps(problem: Regression, values: Sequence[float]) -> Iterator[Step]:
    gram, cross = problem.penalised
    eigenvalues, vectors = torch.linalg.eigh(gram)
    rotated = vectors.T @ cross
    for value in values:
        if value:
            coefficients = vectors @ (rotated / (eigenvalues.clamp_min(0) + value)[:, None])
            # A predictor that does not vary has a coefficient of rounding errors, which is counted.
            coefficients = coefficients.masked_fill(problem.data.variance_x[:, None] == 0, 0)
        else:
            coefficients = least_squares(gram, cross)
        yield Step(problem.standardised(coefficients))


def omp_prediction(
    moments: Moments | Sequence[Moments],
    predictors: str,
    targets: str,
    number: int,
    *,
    held_out: Moments | None = None,
    standardise: bool = True,
) -> Prediction:
    """Predict each unit of one layer by a given number of units of another: orthogonal matching pursuit.

    Pati, Rezaiifar & Krishnaprasad (1993); in Gram form Rubinstein, Zibulevsky & Elad (2008). Predictors are added
    one at a time, the one that correlates most with what is left of the target, and all coefficients are refitted by
    least squares, for all targets at once with a Cholesky factor that grows by a row.

    Args:
        moments: As for `sparse_prediction`; with parts, every number is cross-validated.
        predictors: Layer that predicts.
        targets: Layer whose units are predicted.
        number: Predictors for each target; fewer where what is left of it, or of all other predictors, is nothing.
        held_out: Moments of other data to score on.
        standardise: Give standardised coefficients; predictors are chosen by correlation either way.

    Returns:
        As `sparse_prediction`, with a path over 1 … `number` predictors.

    Raises:
        DataError: `number` is out of range, or as for `sparse_prediction`.
        LayerNotFoundError: A layer or a pair was not kept.

    >>> x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments()
    >>> moments.update({"a": x, "b": x[:, :1] - 2 * x[:, 5:]})
    >>> found = omp_prediction(moments, "a", "b", 2, standardise=False)
    >>> found.predictors(0)[0].tolist(), [round(value, 4) for value in found.predictors(0)[1].tolist()]
    ([5, 0], [-2.0, 1.0])
    """
    data, other = parts(moments, held_out, predictors, targets)
    units = data[0].shape[0]
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= units:
        raise DataError(f"number is {number!r}; layer {predictors!r} has {units} units, expected 1 to {units} of them")
    regression = whole(data, standardise)

    def solve(problem: Regression) -> Iterator[Step]:
        return _pursuit(problem.gram, problem.cross, number)

    method = Method("orthogonal matching pursuit", "number of predictors", range(1, number + 1), solve)
    return fitted(method, regression, data, other, rule=None)


def _pursuit(gram: Tensor, cross: Tensor, number: int) -> Iterator[Step]:
    targets = cross.shape[1]
    rows = torch.arange(targets, device=gram.device)
    factor = torch.eye(number, dtype=gram.dtype, device=gram.device).repeat(targets, 1, 1)
    units = torch.zeros(targets, number, dtype=torch.int64, device=gram.device)
    right = cross.new_zeros(targets, number)
    gradient, coefficients, free = cross, torch.zeros_like(cross), gram.diagonal()[:, None].expand_as(cross) > 0
    for step in range(number):
        unit = gradient.abs().masked_fill(~free, -1).argmax(0)
        shared = gram[units[:, :step], unit[:, None]]
        row = torch.linalg.solve_triangular(factor[:, :step, :step], shared[:, :, None], upper=False)[:, :, 0]
        left = gram[unit, unit] - row.square().sum(1)
        # Without an independent predictor, or anything left to predict, a row of the identity changes nothing.
        useful = (left > _DEPENDENT) & (gradient[unit, rows].abs() > _DEPENDENT) & free[unit, rows]
        units[:, step] = unit
        factor[:, step, :step] = row * useful[:, None]
        factor[:, step, step] = torch.where(useful, left.clamp_min(0).sqrt(), 1.0)
        right[:, step] = torch.where(useful, cross[unit, rows], 0.0)
        free = free.scatter(0, unit[None], False)
        lower = factor[:, : step + 1, : step + 1]
        half = torch.linalg.solve_triangular(lower, right[:, : step + 1, None], upper=False)
        values = torch.linalg.solve_triangular(lower.mT, half, upper=True)[:, :, 0]
        coefficients = torch.zeros_like(cross).scatter_add_(0, units[:, : step + 1].T, values.T)
        gradient = torch.addmm(cross, gram, coefficients, alpha=-1)
        yield Step(coefficients)


def one_to_one_prediction(
    moments: Moments | Sequence[Moments],
    predictors: str,
    targets: str,
    matching: Tensor | None = None,
    *,
    held_out: Moments | None = None,
    standardise: bool = True,
) -> Prediction:
    """Predict each unit of one layer by one unit of another: the baseline of sparse prediction (Li et al. 2015).

    The slope between standardised units is their correlation, and R² on the training data its square.

    Args:
        moments: As for `sparse_prediction`; the pair (predictors, predictors) is not needed.
        predictors: Layer that predicts.
        targets: Layer whose units are predicted.
        matching: For each target the unit that predicts it, int64, −1 for none, (targets,). Default: the unit with
            the largest correlation in magnitude, chosen anew without each part that is left out.
        held_out: Moments of other data to score on.
        standardise: Give standardised coefficients.

    Returns:
        As `sparse_prediction`, without a path.

    Raises:
        DataError: `matching` does not fit the layers, or as for `sparse_prediction`.
        LayerNotFoundError: A layer or a pair was not kept.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments()
    >>> moments.update({"a": x, "b": x[:, [2, 0]]})
    >>> found = one_to_one_prediction(moments, "a", "b")
    >>> found.coefficients.col_indices().tolist(), [round(r, 4) for r in found.r2_train.tolist()]
    ([2, 0], [1.0, 1.0])
    """
    data, other = parts(moments, held_out, predictors, targets, diagonal=True)
    if matching is not None:
        matching = _checked_matching(matching, data[0].names, data[0].shape).to(data[0].gram.device)
    regression = whole(data, standardise, warn=False)

    def solve(problem: Regression) -> Iterator[Step]:
        partner = problem.cross.abs().argmax(0) if matching is None else matching
        place = partner.clamp_min(0)[None]
        slope = problem.cross.gather(0, place) * (partner >= 0)
        yield Step(torch.zeros_like(problem.cross).scatter_(0, place, slope))

    return fitted(Method("one to one", "", [0.0], solve), regression, data, other, rule=None)


def _checked_matching(matching: Tensor, names: tuple[str, str], shape: tuple[int, int]) -> Tensor:
    predictors, targets = shape
    if not isinstance(matching, Tensor) or matching.dtype != torch.int64 or tuple(matching.shape) != (targets,):
        found = f"{tuple(matching.shape)} {matching.dtype}" if isinstance(matching, Tensor) else type(matching).__name__
        raise DataError(f"matching is {found}; expected int64 of shape ({targets},), a unit of {names[0]!r} for each")
    if int(matching.min()) < -1 or int(matching.max()) >= predictors:
        raise DataError(
            f"matching names units from {int(matching.min())} to {int(matching.max())}; layer {names[0]!r} has units "
            f"0 to {predictors - 1}, and -1 stands for none"
        )
    return matching
