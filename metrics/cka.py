"""Centred kernel alignment (CKA) between layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .hsic import HSIC, CentredKernel, KernelIndex, KernelName
from .index import Invariances

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .moments import Moments

__all__ = ["CKA", "HSIC", "cka", "cka_from_moments"]


@dataclass(frozen=True)
class CKA(KernelIndex):
    """Centred kernel alignment of two representations (Kornblith et al. 2019, equation 4).

    HSIC(K, L)/√(HSIC(K, K) HSIC(L, L)), all in float64. With the linear kernel and the biased estimator it is
    ‖Ycᵀ Xc‖²_F/(‖Xcᵀ Xc‖_F ‖Ycᵀ Yc‖_F) with centred columns. Values are not clamped: the debiased ones can be negative.

    Args:
        kernel: "linear", x·y, or "rbf", exp(−d²/(2σ²)).
        debiased: From the U-statistic of Song et al. (2012), which does not grow with units / samples. It needs four
            samples.
        bandwidth: σ in units of the median distance. The median is that of all n² entries of the matrix of squared
            distances, its zero diagonal included, as in the code of Kornblith et al. (2019).

    Raises:
        DataError: There is no such kernel; the bandwidth is not positive, or given for a linear kernel.

    >>> x, y = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0))
    >>> round(CKA()(x, y), 3), round(CKA(debiased=True)(x, y), 3)  # independent
    (0.461, 0.027)
    """

    name: ClassVar[str] = "cka"
    invariances: ClassVar[Invariances] = Invariances(
        orthogonal=True, scaling=True, linear=False, permutation=True, translation=True
    )
    scale_free: ClassVar[bool] = True

    def normalised(
        self, products: Tensor, states_a: Sequence[CentredKernel], states_b: Sequence[CentredKernel]
    ) -> Tensor:
        """Divide by the norms; NaN where one vanishes."""
        norms = [torch.stack([state.norm for state in states]) for states in (states_a, states_b)]
        return products / norms[0][:, None] / norms[1]

    def scores_from_moments(self, moments: Moments, layers_a: Sequence[str], layers_b: Sequence[str]) -> Tensor:
        """Read the biased linear CKA off moments, see `cka_from_moments`."""
        self._check_from_moments(moments, (*layers_a, *layers_b))
        norms = {
            name: torch.where((norm := moments.covariance(name, name).norm()) > 0, norm, torch.nan)
            for name in dict.fromkeys((*layers_a, *layers_b))
        }
        rows = [
            torch.stack([moments.covariance(a, b).square().sum() / (norms[a] * norms[b]) for b in layers_b])
            for a in layers_a
        ]
        return torch.stack(rows)


def cka(
    x: Tensor | ArrayLike,
    y: Tensor | ArrayLike,
    *,
    kernel: KernelName = "linear",
    debiased: bool = False,
    bandwidth: float = 1.0,
) -> float:
    """Compute the CKA of two representations of the same samples (Kornblith et al. 2019); see `CKA`.

    In float64; the linear kernel goes through samples x samples or units x units products, whichever are cheaper.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        kernel: "linear" or "rbf".
        debiased: From the U-statistic of Song et al. (2012) instead of the biased estimator.
        bandwidth: σ of the RBF kernel in units of the median distance, the zero diagonal included.

    Returns:
        Unclamped: the biased one lies between 0 and 1; NaN, with a warning, where a representation does not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples on one device, or too few (two; four
            where debiased); a parameter is wrong.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(cka(x, 3 * x + 1), 6)
    1.0
    """
    return CKA(kernel, debiased, bandwidth)(x, y, stacklevel=3)


def cka_from_moments(moments: Moments, layers_a: Iterable[str], layers_b: Iterable[str]) -> Tensor:
    """Read the linear CKA of each layer with each other off their moments, without running a network again.

    ‖Σ_ab‖²_F / (‖Σ_aa‖_F ‖Σ_bb‖_F), the biased estimator in feature space (Kornblith et al. 2019, section 3).

    Args:
        moments: With all pairs (a, a), (b, b) and (a, b).
        layers_a: Layers of the rows.
        layers_b: Layers of the columns.

    Returns:
        (layers of a x layers of b) in float64; NaN, with a warning, for a layer that does not vary.

    Raises:
        LayerNotFoundError: A layer or a pair was not kept.
        DataError: There is only one sample.

    >>> from isthmus.metrics import Moments
    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments()
    >>> moments.update({"x": x, "relu": x.relu()})
    >>> cka_from_moments(moments, ["x"], ["x", "relu"])
    tensor([[1.0000, 0.7955]], dtype=torch.float64)
    """
    return CKA().scores_from_moments(moments, list(layers_a), list(layers_b))
