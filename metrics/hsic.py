"""Hilbert-Schmidt independence criterion (HSIC): kernels over the samples, centred, and their inner products."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..base.errors import DataError, NotFiniteError
from .arrays import centred, rescaled
from .index import Index, Invariances, check_choice, check_moments
from .shifts import shifted_products
from .ustatistic import LEAST, centre_off_diagonal, rbf_from_products

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .moments import Moments

KernelName = Literal["linear", "rbf"]

# What U-centring leaves of a kernel, relative to plain centring, when it should leave nothing.
_ROUNDING = 1e-13
_BLOCK_ENTRIES = 1 << 23


class CentredKernel:
    """The kernel of one layer: centred, or U-centred, which sets its diagonal to zero.

    Args:
        x: Centred activations, samples x units, whose linear kernel is meant; it is formed when it is first needed.
        debiased: Whether it is U-centred.
    """

    def __init__(self, x: Tensor | None, debiased: bool) -> None:
        self.x = x
        self.debiased = debiased

    @classmethod
    def rbf(cls, x: Tensor, bandwidth: float, debiased: bool) -> CentredKernel:
        """Form the RBF kernel of centred activations."""
        kernel = x @ x.T
        rbf_from_products(kernel, bandwidth, x.shape[1])
        return cls(None, debiased)._set(kernel)

    def _set(self, kernel: Tensor) -> CentredKernel:
        means = kernel.mean(0)
        kernel = kernel.sub_(means).sub_((means - means.mean())[:, None])
        self.size = kernel.square().sum()
        if self.debiased:
            n, lost = len(kernel), kernel.diagonal().clone()
            centre_off_diagonal(kernel)
            # What U-centring would have left on the diagonal: with it a sample can be taken twice.
            self.diagonal = lost * (n / (n - 2)) - lost.sum() / ((n - 1) * (n - 2))
        self.matrix = kernel
        return self

    @property
    def formed(self) -> bool:
        """Whether the matrix is there."""
        return "matrix" in self.__dict__

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.matrix if self.x is None else self.x)

    @cached_property
    def matrix(self) -> Tensor:
        """The kernel, samples x samples."""
        assert self.x is not None
        return self._set(self.x @ self.x.T).matrix

    @cached_property
    def size(self) -> Tensor:
        """Squared norm after plain centring."""
        assert self.x is not None
        return _inner_by_features(self.x, self.x, debiased=False)

    @cached_property
    def squares(self) -> Tensor:
        """Inner product with itself."""
        if self.formed or self.x is None:
            return self.matrix.square().sum()
        return _inner_by_features(self.x, self.x, self.debiased)

    @property
    def norm(self) -> Tensor:
        """Square root of the inner product with itself; NaN where that is zero, but for rounding."""
        least = _ROUNDING * self.size if self.debiased else 0
        return torch.where(self.squares > least, self.squares, math.nan).sqrt()

    def taken(self, rows: Tensor) -> CentredKernel:
        """Give the kernel of some of the samples, or of all in another order."""
        if is_permutation(rows, self.samples):
            return self._permuted(rows)
        taken = CentredKernel(None if self.x is None else centred(self.x[rows]), self.debiased)
        if self.formed:
            # Centring anew is right also for what was centred: it removes any a_i + a_j.
            whole = self.matrix + self.diagonal.diag() if self.debiased else self.matrix
            taken._set(whole[rows][:, rows])
        return taken

    def _permuted(self, rows: Tensor) -> CentredKernel:
        taken = CentredKernel(None if self.x is None else self.x[rows], self.debiased)
        if self.formed:
            taken.matrix = self.matrix[rows][:, rows]
            if self.debiased:
                taken.diagonal = self.diagonal[rows]
        taken.size, taken.squares = self.size, self.squares
        return taken


def is_permutation(rows: Tensor, samples: int) -> bool:
    """Tell whether rows, indices of samples, are all of them, each once."""
    return len(rows) == samples and bool((torch.bincount(rows, minlength=samples) == 1).all())


def _inner_by_features(x: Tensor, y: Tensor, debiased: bool) -> Tensor:
    products = (y.T @ x).square().sum()
    if not debiased:
        return products
    # Row sums of a centred linear kernel vanish, so U-centring it takes no more than its diagonal.
    n, k, l = len(x), x.square().sum(1), y.square().sum(1)  # noqa: E741
    return products - (k @ l) * (n / (n - 2)) + k.sum() * l.sum() / ((n - 1) * (n - 2))


def inner_products(a: Sequence[CentredKernel], b: Sequence[CentredKernel]) -> Tensor:
    """Compute the inner product of each kernel of one list with each of another: (len(a) x len(b)) in float64.

    Linear kernels take the cheaper way: units x units products, or one product of all kernels flattened.
    """
    x, y = ([kernel.x for kernel in side if kernel.x is not None] for side in (a, b))
    if len(x) == len(a) and len(y) == len(b) and _features_are_cheaper(a, b):
        return torch.stack([torch.stack([_inner_by_features(k, l, a[0].debiased) for l in y]) for k in x])  # noqa: E741
    n = a[0].samples
    total = a[0].matrix.new_zeros(len(a), len(b))
    rows_at_once = max(1, _BLOCK_ENTRIES // (n * (len(a) + len(b))))
    for start in range(0, n, rows_at_once):
        left, right = (torch.stack([k.matrix[start : start + rows_at_once].flatten() for k in side]) for side in (a, b))
        total.addmm_(left, right.T)
    return total


def _features_are_cheaper(a: Sequence[CentredKernel], b: Sequence[CentredKernel]) -> bool:
    units = {id(kernel): kernel.x.shape[1] for kernel in (*a, *b) if kernel.x is not None}
    unformed = [units[id(kernel)] for kernel in (*a, *b) if not kernel.formed]
    n, pairs = a[0].samples, sum(units[id(k)] for k in a) * sum(units[id(k)] for k in b)
    return n * (pairs + sum(p * p for p in unformed)) < n * n * (sum(unformed) + len(a) * len(b))


@dataclass(frozen=True)
class KernelIndex(Index):
    """What CKA and HSIC share: the kernels and their inner products.

    Args:
        kernel: "linear", x·y, or "rbf", exp(−d²/(2σ²)).
        debiased: The U-statistic of Song et al. (2012), which is 0 on average for independent data, instead of the
            biased estimator of Gretton et al. (2005). It needs four samples.
        bandwidth: σ of the RBF kernel in units of the median distance. The median is that of all n² entries of the
            matrix of squared distances, its zero diagonal included, as in the code of Kornblith et al. (2019).

    Raises:
        DataError: There is no such kernel; the bandwidth is not positive, or given for a linear kernel.
    """

    kernel: KernelName = "linear"
    debiased: bool = False
    bandwidth: float = 1.0

    scale_free: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, get_args(KernelName))
        if not (0 < self.bandwidth < math.inf):
            raise DataError(f"bandwidth is {self.bandwidth}; expected a positive multiple of the median distance")
        if self.kernel == "linear" and self.bandwidth != 1:
            raise DataError(f"bandwidth={self.bandwidth} is for kernel='rbf'; a linear kernel has none")

    @property
    def estimator(self) -> str:
        """Say which estimator, kernel and bandwidth."""
        kernel = "linear" if self.kernel == "linear" else f"RBF (σ = {self.bandwidth:g} × median distance)"
        return f"{'debiased' if self.debiased else 'biased'}, {kernel} kernel"

    @property
    def least(self) -> int:
        """Four samples where debiased, else two."""
        return LEAST if self.debiased else 2

    @property
    def from_moments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  it depends on the parameters
        """Whether moments are enough: for the biased estimator with the linear kernel."""
        return self.kernel == "linear" and not self.debiased

    def nbytes(self, samples: int, units: int) -> int:
        """Bytes of a kernel of samples x samples."""
        del units
        return 8 * samples**2

    def prepare(self, x: Tensor) -> CentredKernel:
        """Centre the activations, or form their RBF kernel.

        Raises:
            NotFiniteError: Products of the activations overflow.
        """
        x = centred(x)
        # Neither CKA nor the RBF kernel depends on scale.
        if self.scale_free or self.kernel == "rbf":
            x = rescaled(x)
        elif not x.square().sum().square().isfinite():
            raise NotFiniteError(f"HSIC of activations of shape {tuple(x.shape)} overflows float64; rescale them")
        return (
            CentredKernel.rbf(x, self.bandwidth, self.debiased)
            if self.kernel == "rbf"
            else CentredKernel(x, self.debiased)
        )

    def score(self, a: CentredKernel, b: CentredKernel) -> Tensor:
        """Compare two kernels of the same samples."""
        return self.scores([a], [b])[0, 0]

    def taken(self, state: CentredKernel, rows: Tensor) -> CentredKernel:
        """Give the kernel of x[rows]; an RBF kernel keeps the bandwidth that all samples gave it."""
        return state.taken(rows)

    def shifted(self, states_a: Sequence[CentredKernel], states_b: Sequence[CentredKernel], order: Tensor) -> Tensor:
        """Compare under every cyclic shift; what depends on one layer alone does not notice."""
        products = shifted_products([a.matrix for a in states_a], [b.matrix for b in states_b], order)
        return self.normalised(products, states_a, states_b)

    def scores(self, states_a: Sequence[CentredKernel], states_b: Sequence[CentredKernel]) -> Tensor:
        """Compare each kernel of one list with each of another."""
        return self.normalised(inner_products(states_a, states_b), states_a, states_b)

    @abstractmethod
    def normalised(
        self, products: Tensor, states_a: Sequence[CentredKernel], states_b: Sequence[CentredKernel]
    ) -> Tensor:
        """Turn inner products, (… x len(a) x len(b)), into the index."""

    def _check_from_moments(self, moments: Moments, layers: Sequence[str]) -> None:
        if not self.from_moments:
            raise DataError(
                f"{self.name} ({self.estimator}) needs the samples themselves; moments give the biased, linear"
            )
        check_moments(moments, layers, self.name)


@dataclass(frozen=True)
class HSIC(KernelIndex):
    """Hilbert-Schmidt independence criterion of two representations (Gretton et al. 2005; Song et al. 2012).

    Biased: tr(K H L H)/(n−1)². Debiased: [tr(K̃L̃) + 1ᵀK̃1 1ᵀL̃1/((n−1)(n−2)) − 2/(n−2) 1ᵀK̃L̃1]/(n(n−3)), K̃ being K
    with a zero diagonal. With the linear kernel it has the units of the activations to the fourth power.

    Args:
        kernel: "linear", x·y, or "rbf", exp(−d²/(2σ²)).
        debiased: The U-statistic, which is 0 on average for independent data. It needs four samples.
        bandwidth: σ in units of the median distance over all n² entries, the zero diagonal included.

    Raises:
        DataError: There is no such kernel; the bandwidth is not positive, or given for a linear kernel.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(HSIC()(x, 2 * x) / HSIC()(x, x), 6)
    4.0
    """

    name: ClassVar[str] = "hsic"

    @property
    def invariances(self) -> Invariances:  # pyright: ignore[reportIncompatibleVariableOverride]  it depends on the kernel
        """All but linear maps; scaling only where the bandwidth follows it."""
        return Invariances(
            orthogonal=True, scaling=self.kernel == "rbf", linear=False, permutation=True, translation=True
        )

    def normalised(
        self, products: Tensor, states_a: Sequence[CentredKernel], states_b: Sequence[CentredKernel]
    ) -> Tensor:
        """Divide by what the samples contribute."""
        n = states_a[0].samples
        return products / (n * (n - 3) if self.debiased else (n - 1) ** 2)

    def scores_from_moments(self, moments: Moments, layers_a: Sequence[str], layers_b: Sequence[str]) -> Tensor:
        """Read ‖Σ_ab‖²_F of the unbiased covariances off moments."""
        self._check_from_moments(moments, (*layers_a, *layers_b))
        rows = [[moments.covariance(a, b, correction=1).square().sum() for b in layers_b] for a in layers_a]
        return torch.stack([torch.stack(row) for row in rows])


def hsic(
    x: Tensor | ArrayLike,
    y: Tensor | ArrayLike,
    *,
    kernel: KernelName = "linear",
    debiased: bool = False,
    bandwidth: float = 1.0,
) -> float:
    """Compute the Hilbert-Schmidt independence criterion of two representations of the same samples; see `HSIC`.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        kernel: "linear" or "rbf".
        debiased: The U-statistic of Song et al. (2012) instead of the biased estimator.
        bandwidth: σ of the RBF kernel in units of the median distance, the zero diagonal included.

    Returns:
        At least 0 where biased; NaN, with a warning, for an RBF kernel whose median distance is zero.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples on one device, or too few; a
            parameter is wrong.
        NotFiniteError: One holds NaN or infinity, or products overflow.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(hsic(x, x.relu(), kernel="rbf"), 6)
    0.012636
    """
    return HSIC(kernel, debiased, bandwidth)(x, y, stacklevel=3)
