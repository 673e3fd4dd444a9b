"""What every prediction of the units of one layer by those of another gives: coefficients, R², and its path."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.arrays import as_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class PredictionPath:
    """Predictions for a sequence of penalties, or of numbers of predictors, from the simplest on.

    Attributes:
        parameter: "penalty" or "number of predictors".
        values: Of the parameter, (values,).
        r2_train: R² on the training data, (targets x values); NaN for targets that do not vary.
        r2_held_out: R² on other data, if there were any, (targets x values).
        r2_cross_validated: Mean over the parts of R² on the part left out, if there were parts, (targets x values).
        count: Number of predictors with a coefficient that is not zero, (targets x values).
        kkt_violation: LASSO: largest violation of a condition of optimality, (targets x values); else None.
        iterations: LASSO: iterations for each value, (values,); else None.
    """

    parameter: str
    values: Tensor
    r2_train: Tensor
    r2_held_out: Tensor | None
    r2_cross_validated: Tensor | None
    count: Tensor
    kkt_violation: Tensor | None = None
    iterations: Tensor | None = None

    @property
    def r2(self) -> Tensor | None:
        """R² on data not trained on: held out, else cross-validated, else None."""
        return self.r2_cross_validated if self.r2_held_out is None else self.r2_held_out

    @property
    def loss(self) -> Tensor:
        """Half the mean squared error of standardised targets in training, (targets x values); 0.5: nothing."""
        return (1 - self.r2_train) / 2


@dataclass(frozen=True, eq=False)
class Prediction:
    """Each unit of one layer predicted by units of another.

    Attributes:
        method: "LASSO", "ridge", "orthogonal matching pursuit" or "one to one".
        names: Layers of the predictors and of the targets.
        chosen: Penalty or number of predictors that these coefficients are for: one, or one per target, (targets,);
            None for one-to-one.
        coefficients: Sparse CSR, (targets x predictors) in float64, in the order of all units: of standardised units
            (mean 0, variance 1) where `standardised`, else of the activations as they are.
        raw_coefficients: The same for activations as they are: prediction = raw_coefficients x + intercept.
        intercept: (targets,).
        standardised: Which units the method worked in.
        samples: Number of samples trained on.
        r2_train: R² on the training data, (targets,); NaN for targets that do not vary. Optimistic.
        r2_held_out: R² on the data held out, if any, (targets,).
        r2_cross_validated: Mean over the parts of R² on the part left out, if there were parts, (targets,). Where a
            penalty was chosen by it, it is slightly optimistic.
        count: Number of predictors whose coefficient is not zero, (targets,).
        kkt_violation: LASSO: largest violation of a condition of optimality, in units of correlation, (targets,).
        iterations: LASSO: iterations of the final path, in all.
        constant_predictors: Units that do not vary in the training data and predict nothing.
        constant_targets: Units that do not vary in the training data: their R² is NaN.
        path: For other penalties or numbers; None for one-to-one.
    """

    method: str
    names: tuple[str, str]
    chosen: float | Tensor | None
    coefficients: Tensor
    raw_coefficients: Tensor
    intercept: Tensor
    standardised: bool
    samples: int
    r2_train: Tensor
    r2_held_out: Tensor | None
    r2_cross_validated: Tensor | None
    count: Tensor
    kkt_violation: Tensor | None
    iterations: int
    constant_predictors: tuple[int, ...]
    constant_targets: tuple[int, ...]
    path: PredictionPath | None

    def __repr__(self) -> str:
        parts = [f"{name} {value:.4g}" for name, value in self.summary().items() if isinstance(value, float)]
        return f"Prediction({self.method}, {self.names[0]} → {self.names[1]}: {', '.join(parts)})"

    @property
    def penalty(self) -> float | Tensor | None:
        """α of the LASSO or λ of ridge regression: one, or one per target; None for other methods."""
        return self.chosen if self.path is not None and self.path.parameter == "penalty" else None

    @property
    def r2(self) -> Tensor | None:
        """R² on data not trained on, (targets,): held out, else cross-validated, else None."""
        return self.r2_cross_validated if self.r2_held_out is None else self.r2_held_out

    @property
    def loss(self) -> Tensor:
        """Half the mean squared error of standardised targets in training (Li et al. 2015, table 1); 0.5: nothing."""
        return (1 - self.r2_train) / 2

    def summary(self) -> dict[str, float | str]:
        """Give one line of a table: means over the targets that vary; what is not known is left out."""
        line: dict[str, float | str] = {"method": self.method}
        if isinstance(self.chosen, float) and self.path is not None:
            line[self.path.parameter] = self.chosen
        for name in ("count", "r2_train", "r2_held_out", "r2_cross_validated", "loss"):
            values = getattr(self, name)
            if values is not None:
                line[name] = float(values.double()[~self.r2_train.isnan()].nanmean())
        return line

    def predict(self, x: Tensor | ArrayLike) -> Tensor:
        """Predict the targets.

        Args:
            x: Activations of the predictors, (samples x predictors).

        Returns:
            (samples x targets) in float64, on the device of the coefficients.

        Raises:
            DataError: x is no matrix of that many predictors.
            NotFiniteError: x holds NaN or infinity.
        """
        x = as_matrix(x, "x")
        targets, predictors = self.raw_coefficients.shape
        if x.shape[1] != predictors:
            raise DataError(
                f"x has shape {tuple(x.shape)}; layer {self.names[0]!r} has {predictors} units, expected "
                f"(samples x {predictors}) to predict {targets} units of {self.names[1]!r}"
            )
        raw = self.raw_coefficients.to_dense()
        return torch.addmm(self.intercept, x.to(raw), raw.T)

    def predictors(self, target: int) -> tuple[Tensor, Tensor]:
        """Give the predictors of one target, the largest coefficient first.

        Args:
            target: A unit of the targets.

        Returns:
            Units (int64) and their coefficients (float64).

        Raises:
            DataError: There is no such target.
        """
        if not 0 <= target < len(self.count):
            raise DataError(f"target {target} of {len(self.count)} units of layer {self.names[1]!r}")
        start, end = self.coefficients.crow_indices()[target : target + 2].tolist()
        values, units = self.coefficients.values()[start:end], self.coefficients.col_indices()[start:end]
        order = values.abs().argsort(descending=True, stable=True)
        return units[order], values[order]

    def plot(self, ax: Axes | None = None, others: Prediction | Sequence[Prediction] = ()) -> Axes:
        """Draw mean R² against the mean number of predictors along the path; the choice is marked.

        Args:
            ax: Where to draw; a new figure by default.
            others: Predictions of other methods beside it; one without a path is one mark.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        for prediction in (self, *([others] if isinstance(others, Prediction) else others)):
            _draw(ax, prediction)
        ax.set_xlabel(f"predictors in {self.names[0]} per unit of {self.names[1]}, mean")
        ax.set_ylabel("R², mean over units")
        ax.legend()
        return ax


def _draw(ax: Axes, prediction: Prediction) -> None:
    known = {
        "held out": prediction.r2_held_out,
        "cross-validated": prediction.r2_cross_validated,
        "training": prediction.r2_train,
    }
    where, r2 = next((name, values) for name, values in known.items() if values is not None)
    label, mark = f"{prediction.method}, {where}", {"linestyle": "none", "marker": "o"}
    count = float(prediction.count.double().mean())
    path = prediction.path
    if path is not None and len(path.values) > 1:
        values = path.r2_train if path.r2 is None else path.r2
        line = ax.plot(path.count.double().mean(0).tolist(), values.nanmean(0).tolist(), label=label)
        mark["color"], label = line[0].get_color(), None
    ax.plot([count], [float(r2.nanmean())], label=label, **mark)


def sparse(matrix: Tensor) -> Tensor:
    """Turn a dense matrix into a sparse one of compressed rows."""
    with warnings.catch_warnings():
        # torch calls every CSR tensor a beta feature, once per process.
        warnings.filterwarnings("ignore", message="Sparse CSR", category=UserWarning)
        return matrix.to_sparse_csr()
