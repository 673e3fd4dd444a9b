"""Singular value decompositions of layers, one each, and what a pair of them has in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .arrays import centred
from .hsic import is_permutation
from .index import Index, check_moments

if TYPE_CHECKING:
    from .moments import Moments

# Of the largest singular value: more than dependent units leave when they are computed in float32.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular value decomposition of the centred activations of one layer, `scale` · u diag(s) vt.

    Attributes:
        samples: Their number n.
        s: Singular values that are not zero, largest first, (rank,).
        vt: Directions in the space of units, (rank x units).
        energy: Σ s², that is ‖X/scale‖²_F.
        u: Orthonormal coordinates of the samples, (samples x rank); None where only moments are known.
        scale: Largest magnitude of the centred activations; it is kept apart, so that no square leaves float64.
    """

    samples: int
    s: Tensor
    vt: Tensor
    energy: Tensor
    u: Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of dimensions that the layer varies in."""
        return len(self.s)

    @property
    def whole(self) -> bool:
        """Whether it spans all centred functions of the samples, so that it contains any other layer."""
        return self.rank == self.samples - 1

    @property
    def significant(self) -> int:
        """Number of dimensions that are more than the rounding of activations: s above 1e-6 of the largest."""
        return int((self.s > _ROUNDING * self.s[0]).sum())

    def first(self, components: int) -> Spectrum:
        """Keep the components of the largest variance."""
        u = None if self.u is None else self.u[:, :components]
        return replace(self, s=self.s[:components], vt=self.vt[:components], u=u)

    def taken(self, rows: Tensor) -> Spectrum:
        """Give the spectrum of some of the samples, or of all in another order."""
        assert self.u is not None
        if is_permutation(rows, self.samples):
            return replace(self, u=self.u[rows])
        # In the coordinates of this spectrum the samples have no more than `rank` units.
        part = spectrum(self.u[rows] * self.s)
        return replace(part, vt=part.vt @ self.vt, scale=part.scale * self.scale)


def spectrum(x: Tensor) -> Spectrum:
    """Factorise the activations of one layer.

    Singular values up to max(samples, units) · 2.2e-16 of the largest count as zero, as in numpy's `matrix_rank`. Units
    that depend on each other but for the rounding of float32 leave larger ones, see `Spectrum.significant`.

    Args:
        x: Samples x units, floating-point, not centred.

    >>> spectrum(torch.tensor([[1.0, 2.0, 1.0], [3.0, 4.0, 1.0], [5.0, 6.0, 1.0]])).rank
    1
    """
    x = centred(x)
    scale = float(x.abs().amax())
    if scale > 0:
        x = x / scale
    n, units = x.shape
    # A triangular factor first: several times faster for long and for wide matrices, and as accurate.
    if n >= units:
        q, r = torch.linalg.qr(x)
        u, s, vt = torch.linalg.svd(r)
        u = q @ u
    else:
        q, r = torch.linalg.qr(x.T)
        u, s, vt = torch.linalg.svd(r.T)
        vt = vt @ q.T
    rank = min(int((s > max(n, units) * torch.finfo(s.dtype).eps * s[0]).sum()), n - 1)
    return Spectrum(n, s[:rank], vt[:rank], s.square().sum(), u[:, :rank], scale)


def spectrum_from_moments(moments: Moments, name: str) -> Spectrum:
    """Factorise the covariance of one layer.

    Squares are what moments hold, so only singular values above √(units · ε) of the largest are told from zero, ε being
    the rounding of `moments.product_dtype`: 1e-7 for float64 products.

    Args:
        moments: With the pair (name, name).
        name: The layer.

    Raises:
        LayerNotFoundError: The layer or the pair was not kept.
    """
    n = moments.count(name)
    values, vectors = torch.linalg.eigh(moments.covariance(name, name) * n)
    values, vectors = values.flip(0), vectors.flip(1)
    tolerance = len(values) * torch.finfo(moments.product_dtype).eps * values[0]
    rank = min(int((values > tolerance.clamp(min=0)).sum()), n - 1)
    return Spectrum(n, values[:rank].sqrt(), vectors[:, :rank].T, moments.variance(name).sum() * n)


@dataclass(frozen=True, eq=False)
class Cross:
    """What two layers of the same samples have in common.

    Attributes:
        a: Spectrum of the one, X.
        b: Spectrum of the other, Y.
        product: Xᵀ Y of centred activations, (units x units), where only moments are known.
    """

    a: Spectrum
    b: Spectrum
    product: Tensor | None = None

    @cached_property
    def c(self) -> Tensor:
        """U_xᵀ U_y, (rank of x, rank of y): its singular values are the canonical correlations."""
        if self.product is not None:
            return self.a.vt @ self.product @ self.b.vt.T / self.a.s[:, None] / self.b.s
        assert self.a.u is not None
        assert self.b.u is not None
        return self.a.u.T @ self.b.u

    @property
    def projected(self) -> Tensor:
        """U_xᵀ Y, but for a rotation of the units of y: y as far as it is linear in x."""
        if self.product is not None:
            return self.a.vt @ self.product / self.a.s[:, None]
        return self.c * self.b.s

    @property
    def weighted(self) -> Tensor:
        """Xᵀ Y, but for rotations of the units of both."""
        return self.product if self.product is not None else self.a.s[:, None] * self.c * self.b.s

    def correlations(self) -> Tensor:
        """Give the canonical correlations, largest first, (smaller rank,)."""
        if self.a.whole or self.b.whole:
            return self.a.s.new_ones(min(self.a.rank, self.b.rank))
        return torch.linalg.svdvals(self.c)


class SpectralIndex(Index):
    """An index that is read off the singular value decompositions of two layers.

    Where directions count alike, whatever their variance, those of rounding alone must not count: unless a subclass
    chooses otherwise, directions of less than 1e-6 of the largest standard deviation are left out. This holds for
    activations computed in float32 whose means are not much larger than their standard deviations.
    """

    from_moments: ClassVar[bool] = True

    @abstractmethod
    def of(self, cross: Cross) -> Tensor | float:
        """Compute the index of two layers, each of which varies."""

    def reduced(self, layer: Spectrum) -> Spectrum:
        """Choose what part of a layer is compared: all but rounding."""
        return layer.first(layer.significant)

    def prepare(self, x: Tensor) -> Spectrum:
        """Factorise the activations."""
        return spectrum(x)

    def score(self, a: Spectrum, b: Spectrum) -> Tensor | float:
        """Compare two factorised layers; NaN where one does not vary."""
        return self._score(Cross(a, b))

    def _score(self, cross: Cross) -> Tensor | float:
        if not (cross.a.rank and cross.b.rank):
            return math.nan
        return self.of(replace(cross, a=self.reduced(cross.a), b=self.reduced(cross.b)))

    def taken(self, state: Spectrum, rows: Tensor) -> Spectrum:
        """Give the spectrum of x[rows]."""
        return state.taken(rows)

    def scores_from_moments(self, moments: Moments, layers_a: Sequence[str], layers_b: Sequence[str]) -> Tensor:
        """Factorise the covariances instead; directions of little variance are less certain.

        Raises:
            LayerNotFoundError: A layer or a pair was not kept.
            DataError: A layer has fewer than two samples.
        """
        names = dict.fromkeys((*layers_a, *layers_b))
        check_moments(moments, names, self.name)
        spectra = {name: spectrum_from_moments(moments, name) for name in names}
        rows = [
            [
                float(self._score(Cross(spectra[a], spectra[b], moments.covariance(a, b) * moments.count(a))))
                for b in layers_b
            ]
            for a in layers_a
        ]
        return torch.tensor(rows, dtype=torch.float64)
