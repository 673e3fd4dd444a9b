"""Units of one layer predicted from those of another: what every method of prediction gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from ...metrics.arrays import as_matrix
from .pictures import SMALL, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

Method = Literal["lasso", "ridge", "omp", "one-to-one"]


@dataclass(frozen=True, eq=False)
class PredictionPath:
    """How well each target was predicted at each penalty; every tensor but the first is (targets x penalties).

    Attributes:
        penalties: (penalties,), falling; of OMP the numbers of predictors, rising.
        r2_train: Share of the variance explained on the training samples.
        r2: The same on held-out samples, else the mean over the parts left out in turn; None without either.
        count: Number of predictors, int64; -1 for targets that do not vary.
        kkt_violation: Largest violation of a condition of optimality.
    """

    penalties: Tensor
    r2_train: Tensor
    r2: Tensor | None
    count: Tensor
    kkt_violation: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Linear predictions of the units of one layer, the targets, from those of another, the predictors.

    Units that do not vary predict nothing and are not predicted: their coefficients are zero, their R² is NaN.

    Attributes:
        method: "lasso", "ridge", "omp" or "one-to-one".
        predictors: Name of the layer of the predictors.
        targets: Name of the layer of the targets.
        penalty: The penalty in use; of OMP the number of predictors; None of one-to-one predictions. Where it was
            chosen for each target, (targets,).
        coefficients: (targets x predictors), sparse COO in float64, between standardised units: a standard deviation of
            the predictor moves the target by so many of its own.
        raw_coefficients: (targets x predictors), dense, between units as they are.
        intercept: (targets,), what goes with the raw ones.
        r2_train: (targets,), share of the variance explained on the training samples.
        r2: (targets,), the same on held-out samples, which may be negative; without such samples the mean over the
            parts that cross-validation left out in turn; None without either.
        loss: (targets,), half the mean squared error in squared standard deviations, on held-out samples where there
            are any, else on those of training (Li et al. 2015: 0.5 = nothing predicted).
        count: (targets,), number of predictors with a coefficient, int64.
        kkt_violation: (targets,), largest violation of a condition of optimality, in correlations.
        iterations: Of the solver at the penalty in use.
        constant_predictors: Predictors that do not vary.
        constant_targets: Targets that do not vary.
        path: The same at all penalties that were tried.
    """

    method: Method
    predictors: str
    targets: str
    penalty: float | Tensor | None
    coefficients: Tensor
    raw_coefficients: Tensor
    intercept: Tensor
    r2_train: Tensor
    r2: Tensor | None
    loss: Tensor
    count: Tensor
    kkt_violation: Tensor
    iterations: int
    constant_predictors: tuple[int, ...]
    constant_targets: tuple[int, ...]
    path: PredictionPath

    def __repr__(self) -> str:
        targets, predictors = self.coefficients.shape
        judged, where = (self.r2_train, "training") if self.r2 is None else (self.r2, "held-out")
        return (
            f"Prediction({targets} units of {self.targets!r} from {predictors} of {self.predictors!r} by "
            f"{self.method}: mean {where} R² {float(judged.nanmean()):.3g})"
        )

    def predict(self, x: Tensor | ArrayLike) -> Tensor:
        """Predict the targets.

        Args:
            x: Samples x predictors, as the network gives them.

        Returns:
            Samples x targets in float64; targets that do not vary get their mean.

        Raises:
            DataError: Another number of predictors.
            NotFiniteError: It holds NaN or infinity.
        """
        x = as_matrix(x).to(self.intercept)
        if x.shape[1] != self.raw_coefficients.shape[1]:
            raise DataError(
                f"x has shape {tuple(x.shape)}; expected samples x {self.raw_coefficients.shape[1]} predictors"
            )
        return x @ self.raw_coefficients.T + self.intercept

    def plot(self, ax: Axes | None = None, *, one_to_one: Prediction | None = None) -> Axes:
        """Draw R² against the number of predictors, means over the targets along the path of penalties.

        Args:
            ax: Where to draw. Default: a new figure.
            one_to_one: From `one_to_one_prediction`, drawn at one predictor.

        Returns:
            The axes.
        """
        ax = new_axes(ax, SMALL)
        kept = self.path.count[:, 0] >= 0
        count = self.path.count[kept].to(torch.float64).mean(0).cpu().numpy()
        train = self.path.r2_train.nanmean(0).cpu().numpy()
        ax.plot(count, train, color="#5d646e", linestyle=":", label="on training samples")
        if self.path.r2 is not None:
            ax.plot(count, self.path.r2.nanmean(0).cpu().numpy(), color="#0072B2", label="on held-out samples")
        judged = self.r2_train if self.r2 is None else self.r2
        used = float(self.count[kept].to(torch.float64).mean())
        ax.plot([used], [float(judged.nanmean())], "o", color="#0072B2", label=f"{used:.3g} predictors, in use")
        if one_to_one is not None:
            single = one_to_one.r2_train if one_to_one.r2 is None else one_to_one.r2
            ax.plot([1], [float(single.nanmean())], "D", color="#D55E00", label="one-to-one partner")
        ax.set_xscale("symlog", linthresh=1)
        ticks = [tick for tick in (0, 1, 3, 10, 30, 100, 300, 1000, 3000) if tick <= max(1.0, float(np.max(count)))]
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.set_xlabel("predictors for a unit (mean)")
        ax.set_ylabel("R² (mean over units)")
        ax.legend()
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give the figures of each target and the path as plain lists and numbers for JSON; NaN becomes None."""
        names = ("method", "predictors", "targets", "penalty", "r2_train", "r2", "loss", "count", "kkt_violation",
                 "iterations", "constant_predictors", "constant_targets")  # fmt: skip
        path = {name: getattr(self.path, name) for name in PredictionPath.__dataclass_fields__}
        return plain({name: getattr(self, name) for name in names} | {"path": path})
