"""Canonical correlation analysis (CCA) between layers, and its weighted and truncated forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..base.errors import DataError
from .index import Invariances, check_choice
from .spectrum import Cross, SpectralIndex, Spectrum

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Weights = Literal["x", "y", "mean"]

_ALL = Invariances(orthogonal=True, scaling=True, linear=True, permutation=True, translation=True)
_ALL_BUT_LINEAR = Invariances(orthogonal=True, scaling=True, linear=False, permutation=True, translation=True)
_WITHIN_UNITS = Invariances(orthogonal=False, scaling=True, linear=False, permutation=True, translation=True)

_TIE = 1e-10


def _mean(cross: Cross, squared: bool) -> Tensor:
    # The squares sum to a Frobenius norm: no singular values are needed, unless they are known to be ones.
    if squared and not (cross.a.whole or cross.b.whole):
        return cross.c.square().sum() / min(cross.c.shape)
    correlations = cross.correlations()
    return correlations.square().mean() if squared else correlations.mean()


def _weights(loadings: Tensor, correlations: Tensor) -> Tensor:
    """Σ_j |⟨h_i, x_j⟩| of loadings (variates x units), with tied variates turned to their principal axes."""
    ends = (correlations[:-1] - correlations[1:] > _TIE).nonzero().flatten() + 1
    parts = loadings.tensor_split(ends.cpu())
    turned = [part if len(part) == 1 else torch.linalg.svd(part, full_matrices=False)[0].T @ part for part in parts]
    return torch.cat(turned).abs().sum(1)


@dataclass(frozen=True)
class CCA(SpectralIndex):
    """Mean of the canonical correlations ρ of two representations, squared or not (Kornblith et al. 2019, section 4).

    The mean is over as many correlations as the layer of lower rank has dimensions: dead and duplicate units do not
    count, nor do directions of less than 1e-6 of the largest standard deviation, which are rounding. It does not
    compare what units do, only what can be read out of them; where one layer has as many independent units as there are
    samples, less one, every ρ is 1. For independent data it is not 0, see a permutation null.

    Args:
        squared: R²_CCA = Σ ρ²/d, or ρ̄ = Σ ρ/d.

    >>> x, y = torch.randn(2, 100, 5, generator=torch.Generator().manual_seed(0))
    >>> round(CCA()(x, y), 3), round(CCA()(x, x + y), 3)
    (0.035, 0.519)
    """

    squared: bool = True

    name: ClassVar[str] = "cca"
    invariances: ClassVar[Invariances] = _ALL

    @property
    def estimator(self) -> str:
        """Say what the mean is of."""
        return f"mean {'squared ' if self.squared else ''}canonical correlation"

    def of(self, cross: Cross) -> Tensor:
        """Average over the canonical correlations."""
        return _mean(cross, self.squared)


@dataclass(frozen=True)
class SVCCA(SpectralIndex):
    """Mean canonical correlation of the principal components of two layers (Raghu et al. 2017).

    Of each layer the fewest first components are kept whose variances sum to at least the threshold's share of all.

    Args:
        threshold: Share of the variance, in (0, 1].
        squared: Average ρ² instead of ρ.

    Raises:
        DataError: The threshold is no share.

    >>> x, y = torch.randn(2, 100, 5, generator=torch.Generator().manual_seed(0))
    >>> x[:, 2:] *= 0.01  # of so little variance that it is left out
    >>> round(SVCCA()(x, x[:, :2]), 3)
    1.0
    """

    threshold: float = 0.99
    squared: bool = False

    name: ClassVar[str] = "svcca"
    invariances: ClassVar[Invariances] = _ALL_BUT_LINEAR

    def __post_init__(self) -> None:
        if not (0 < self.threshold <= 1):
            raise DataError(f"threshold is {self.threshold}; expected a share of the variance in (0, 1], such as 0.99")

    @property
    def estimator(self) -> str:
        """Say what the mean is of."""
        kind = "squared canonical correlation" if self.squared else "canonical correlation"
        return f"mean {kind} of the components with {self.threshold:g} of the variance"

    def reduced(self, layer: Spectrum) -> Spectrum:
        """Keep the fewest components with the threshold's share of the variance."""
        variance = layer.s.square().cumsum(0)
        enough = int((variance < self.threshold * variance[-1]).sum()) + 1
        return layer.first(min(enough, layer.significant))

    def of(self, cross: Cross) -> Tensor:
        """Average over the canonical correlations of what was kept."""
        return _mean(cross, self.squared)


@dataclass(frozen=True)
class PWCCA(SpectralIndex):
    """Projection-weighted mean of the canonical correlations (Morcos, Raghu & Bengio 2018).

    Σ α_i ρ_i/Σ α_i with α_i = Σ_j |⟨h_i, x_j⟩|: h_i are the canonical variates, orthonormal over the samples, and x_j
    the centred units. Where several ρ_i are equal, their h_i are not unique: two layers with more dimensions
    together than samples have many ρ = 1. The principal axes of the weighing layer within the tied space are taken
    then. The sum of magnitudes depends on the basis of the units: of all rotations of the weighing layer only
    permutations and sign flips leave the index as it is.

    Args:
        weights: Which layer gives the weights: "x", "y", or the "mean" of both results, which is symmetric.

    Raises:
        DataError: The weights are of no such layer.

    >>> x, y = torch.randn(2, 100, 5, generator=torch.Generator().manual_seed(0))
    >>> round(PWCCA()(x, x + y), 3), round(PWCCA(weights="y")(x, x + y), 3)
    (0.717, 0.714)
    """

    weights: Weights = "x"

    name: ClassVar[str] = "pwcca"

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, get_args(Weights))

    @property
    def estimator(self) -> str:
        """Say where the weights come from."""
        source = "the mean over both layers'" if self.weights == "mean" else f"{self.weights}'s"
        return f"canonical correlations weighted by {source} projections"

    @property
    def symmetric(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  it depends on the weights
        """Only where both layers give weights."""
        return self.weights == "mean"

    @property
    def invariances(self) -> Invariances:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All linear maps of x, unless x gives the weights."""
        return _ALL if self.weights == "y" else _WITHIN_UNITS

    @property
    def invariances_y(self) -> Invariances:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All linear maps of y, unless y gives the weights."""
        return _ALL if self.weights == "x" else _WITHIN_UNITS

    def of(self, cross: Cross) -> Tensor | float:
        """Weigh the canonical correlations."""
        if cross.a.whole or cross.b.whole:
            return 1.0
        left, correlations, right = torch.linalg.svd(cross.c, full_matrices=False)
        sides = {"x": (left.T, cross.a), "y": (right, cross.b)}
        chosen = sides.values() if self.weights == "mean" else [sides[self.weights]]
        # ⟨h_i, x_j⟩ = (left_iᵀ U)(U diag(s) V ᵀ)_j; a common scale falls out.
        alphas = [_weights((variates * layer.s) @ layer.vt, correlations) for variates, layer in chosen]
        return torch.stack([(alpha @ correlations) / alpha.sum() for alpha in alphas]).mean()


def cca(x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, squared: bool = True) -> float:
    """Compute the mean canonical correlation of two representations of the same samples; see `CCA`.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        squared: Average ρ², which is R²_CCA (Kornblith et al. 2019), or ρ.

    Returns:
        Between 0 and 1; NaN, with a warning, where a representation does not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least two, on one device.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(cca(x, x @ torch.diag(torch.arange(1.0, 9.0))), 6)
    1.0
    """
    return CCA(squared)(x, y, stacklevel=3)


def svcca(x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, threshold: float = 0.99, squared: bool = False) -> float:
    """Compute the mean canonical correlation of the principal components of two representations; see `SVCCA`.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        threshold: Share of the variance that the kept components have at least, in (0, 1].
        squared: Average ρ² instead of ρ.

    Returns:
        Between 0 and 1; NaN, with a warning, where a representation does not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least two, on one device; the
            threshold is no share.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(svcca(x, x.relu(), threshold=0.9), 3)
    0.868
    """
    return SVCCA(threshold, squared)(x, y, stacklevel=3)


def pwcca(x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, weights: Weights = "x") -> float:
    """Compute the projection-weighted canonical correlation of two representations; see `PWCCA`.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        weights: Which gives the weights: "x", "y", or the "mean" of both results.

    Returns:
        Between 0 and 1; NaN, with a warning, where a representation does not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least two, on one device; there
            are no such weights.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(pwcca(x, x.relu()), 3)
    0.88
    """
    return PWCCA(weights)(x, y, stacklevel=3)
