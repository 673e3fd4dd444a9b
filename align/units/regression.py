"""Linear regression of the units of one layer on those of another: what is read off moments, and R² of any data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.moments import Moments


@dataclass(frozen=True, eq=False)
class Statistics:
    """First and second moments of predictors x and targets y over some samples, float64 on one device.

    Attributes:
        names: Layers of the predictors and of the targets.
        count: Number of samples.
        mean_x: (predictors,).
        mean_y: (targets,).
        gram: Covariance of the predictors over `count`, (predictors x predictors).
        cross: Covariance of predictors and targets, (predictors x targets).
        variance_x: (predictors,), exactly 0 for units that do not vary.
        variance_y: (targets,).
    """

    names: tuple[str, str]
    count: int
    mean_x: Tensor
    mean_y: Tensor
    gram: Tensor
    cross: Tensor
    variance_x: Tensor
    variance_y: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of predictors and of targets."""
        return len(self.mean_x), len(self.mean_y)


def statistics(moments: Moments, predictors: str, targets: str, *, diagonal: bool = False) -> Statistics:
    """Read off moments what a regression needs.

    Args:
        moments: Moments that keep the pairs (predictors, predictors) and (predictors, targets).
        predictors: A layer.
        targets: Another layer.
        diagonal: Read only the diagonal of the Gram matrix, all that a single predictor needs.

    Raises:
        DataError: The layers are the same.
        LayerNotFoundError: A layer or a pair was not kept.
    """
    if predictors == targets:
        raise DataError(
            f"predictors and targets are both {predictors!r}: each unit would be predicted by itself; name two layers, "
            "or give parts of one layer names of their own in Moments.update"
        )
    variance_x, variance_y = moments.variance(predictors), moments.variance(targets)
    return Statistics(
        (predictors, targets),
        moments.count(predictors),
        moments.mean(predictors),
        moments.mean(targets),
        variance_x.diag() if diagonal else moments.covariance(predictors, predictors),
        moments.covariance(predictors, targets),
        variance_x,
        variance_y,
    )


def parts(
    moments: Moments | Sequence[Moments],
    held_out: Moments | None,
    predictors: str,
    targets: str,
    *,
    diagonal: bool = False,
) -> tuple[list[Statistics], Statistics | None]:
    """Read the parts of the training data and the data held out.

    Raises:
        DataError: There is no part, one is given twice or is also held out, or their unit counts differ.
        LayerNotFoundError: A layer or a pair was not kept.
    """
    given = [moments] if isinstance(moments, Moments) else list(moments)
    every = [*given, *([] if held_out is None else [held_out])]
    if not given or not all(isinstance(part, Moments) for part in every):
        kinds = ", ".join(type(part).__name__ for part in every) or "nothing"
        raise DataError(
            f"moments are {kinds}; expected Moments, or a sequence of Moments of disjoint parts of the data"
        )
    if len({id(part) for part in every}) < len(every):
        raise DataError("the same Moments are given twice; parts and held-out data must be of different samples")
    read = [statistics(part, predictors, targets, diagonal=diagonal) for part in every]
    device = read[0].gram.device
    for part in read:
        if part.shape != read[0].shape:
            raise DataError(
                f"layers {predictors!r} and {targets!r} have {read[0].shape} units in the first moments, {part.shape} "
                "in others; take all parts from the same layers of the same networks"
            )
    read = [_to(part, device) for part in read]
    return (read, None) if held_out is None else (read[:-1], read[-1])


def _to(part: Statistics, device: torch.device) -> Statistics:
    if part.gram.device == device:
        return part
    values = {name: value.to(device) for name, value in vars(part).items() if isinstance(value, Tensor)}
    return Statistics(part.names, part.count, **values)


def joined(some: Sequence[Statistics]) -> Statistics:
    """Join statistics of disjoint samples; nothing large is subtracted, and what does not vary stays exactly so."""
    first, count = some[0], sum(part.count for part in some)
    if len(some) == 1:
        return first
    shares = [part.count / count for part in some]

    def off_mean(name: str) -> tuple[Tensor, list[Tensor]]:
        # From the mean of the first part: zero for constants, which their own mean over parts would round.
        start = getattr(first, name)
        ahead = [getattr(part, name) - start for part in some]
        middle = torch.stack([share * one for share, one in zip(shares, ahead, strict=True)]).sum(0)
        return start + middle, [one - middle for one in ahead]

    mean_x, off_x = off_mean("mean_x")
    mean_y, off_y = off_mean("mean_y")
    sums = {name: torch.zeros_like(getattr(first, name)) for name in ("gram", "cross", "variance_x", "variance_y")}
    for part, share, x, y in zip(some, shares, off_x, off_y, strict=True):
        sums["gram"] += share * part.gram
        sums["cross"] += share * part.cross
        sums["gram"].addr_(x, x, alpha=share)
        sums["cross"].addr_(x, y, alpha=share)
        sums["variance_x"] += share * (part.variance_x + x * x)
        sums["variance_y"] += share * (part.variance_y + y * y)
    return Statistics(first.names, count, mean_x, mean_y, **sums)


@dataclass(frozen=True, eq=False)
class Regression:
    """A regression problem in standardised units: every unit has mean 0 and, unless it does not vary, variance 1.

    Attributes:
        data: Statistics of the training data.
        standardise: Whether penalties are of standardised coefficients, or of those of the activations as they are.
    """

    data: Statistics
    standardise: bool

    @cached_property
    def scale_x(self) -> Tensor:
        """Standard deviation of each predictor; 1 where it does not vary."""
        return _deviation(self.data.variance_x)

    @cached_property
    def scale_y(self) -> Tensor:
        """Standard deviation of each target; 1 where it does not vary."""
        return _deviation(self.data.variance_y)

    @cached_property
    def gram(self) -> Tensor:
        """Correlations of the predictors; rows and columns of zeros where they do not vary."""
        return self.data.gram / self.scale_x[:, None] / self.scale_x

    @cached_property
    def cross(self) -> Tensor:
        """Correlations of predictors and targets."""
        return self.data.cross / self.scale_x[:, None] / self.scale_y

    @cached_property
    def penalised(self) -> tuple[Tensor, Tensor]:
        """Gram and cross matrix in the units whose coefficients are penalised."""
        return (self.gram, self.cross) if self.standardise else (self.data.gram, self.data.cross)

    def raw(self, coefficients: Tensor) -> Tensor:
        """Turn standardised coefficients (predictors x targets) into those of activations as they are."""
        return coefficients / self.scale_x[:, None] * self.scale_y

    def standardised(self, coefficients: Tensor) -> Tensor:
        """Turn coefficients in penalised units (predictors x targets) into standardised ones."""
        return coefficients if self.standardise else coefficients * self.scale_x[:, None] / self.scale_y

    def intercept(self, raw: Tensor) -> Tensor:
        """Give what a prediction with raw coefficients adds, (targets,)."""
        return self.data.mean_y - self.data.mean_x @ raw


class Scorer:
    """R² of predictions on data of which only moments are known, with the intercept of the training data.

    With coefficients W and both kinds of moments in the training data's standardised units, R² = 1 − E / v,
    E = v − 2 Σ W c + Wᵀ G W + (mean of y − Wᵀ mean of x)², as scikit-learn's `r2_score` on the samples themselves.

    Args:
        data: Statistics of the data to score on.
        regression: Where the coefficients are from.
    """

    def __init__(self, data: Statistics, regression: Regression) -> None:
        x, y = regression.scale_x, regression.scale_y
        self._gram = data.gram / x[:, None] / x
        self._cross = data.cross / x[:, None] / y
        self._variance = data.variance_y / y**2
        self._shift_x = (data.mean_x - regression.data.mean_x) / x
        self._shift_y = (data.mean_y - regression.data.mean_y) / y
        self._constant = (data.variance_y == 0) | (regression.data.variance_y == 0)

    def r2(self, coefficients: Tensor) -> Tensor:
        """Score standardised coefficients (predictors x targets): (targets,), NaN for targets that do not vary."""
        explained = (coefficients * (2 * self._cross - self._gram @ coefficients)).sum(0)
        bias = self._shift_y - self._shift_x @ coefficients
        r2 = (explained - bias**2) / self._variance
        return r2.masked_fill(self._constant, torch.nan)


def _deviation(variance: Tensor) -> Tensor:
    return torch.where(variance > 0, variance, 1.0).sqrt()
