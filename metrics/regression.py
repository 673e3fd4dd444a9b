"""Linear regression of one layer on another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .index import Invariances
from .spectrum import Cross, SpectralIndex

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class LinearRegression(SpectralIndex):
    """R²: the share of the variance of y that a linear map of x explains (Kornblith et al. 2019, section 4).

    ‖Q_xᵀ Yc‖²_F/‖Yc‖²_F with an orthonormal basis Q_x of the centred columns of x: the best fit to these samples, not
    to new ones. Directions of x of less than 1e-6 of the largest standard deviation, which are rounding, predict
    nothing. Not symmetric: units of y count by their variance, those of x do not. With as many independent units of
    x as there are samples, less one, it is 1.

    >>> import torch
    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> index = LinearRegression()
    >>> round(index(x, x[:, :2]), 3), round(index(x[:, :2], x), 3)
    (1.0, 0.362)
    """

    name: ClassVar[str] = "linear_regression"
    symmetric: ClassVar[bool] = False
    invariances: ClassVar[Invariances] = Invariances(
        orthogonal=True, scaling=True, linear=True, permutation=True, translation=True
    )
    invariances_y: ClassVar[Invariances | None] = Invariances(
        orthogonal=True, scaling=True, linear=False, permutation=True, translation=True
    )

    @property
    def estimator(self) -> str:
        """Say what is predicted from what."""
        return "R² of y predicted from x by least squares, in sample"

    def of(self, cross: Cross) -> Tensor | float:
        """Compare the variance of the prediction with that of y."""
        return 1.0 if cross.a.whole else cross.projected.square().sum() / cross.b.energy


def linear_regression(x: Tensor | ArrayLike, y: Tensor | ArrayLike) -> float:
    """Compute R² of y predicted from x by least squares, over all units of y; see `LinearRegression`.

    Args:
        x: Samples x units: the predictors.
        y: Samples x units: what is predicted; the same samples, any number of units.

    Returns:
        Between 0 and 1; NaN, with a warning, where a representation does not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least two, on one device.
        NotFiniteError: One holds NaN or infinity.

    >>> import torch
    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(linear_regression(x, x.relu()), 3)
    0.807
    """
    return LinearRegression()(x, y, stacklevel=3)
