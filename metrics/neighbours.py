"""Mutual nearest neighbours: do two representations agree on which samples are close?"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..base.errors import DataError
from .arrays import centred, rescaled
from .index import Index, Invariances

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Metric = Literal["cosine", "euclidean"]

# Similarities that agree within this share of the squared norms are equal but for rounding.
_ROUNDING = 16 * torch.finfo(torch.float64).eps
_BLOCK = 1 << 22


@dataclass(frozen=True)
class _Neighbours:
    """Who is a neighbour of whom: `pairs` holds i * samples + j in rising order, `shares` the share of j in N_k(i)."""

    points: Tensor
    pairs: Tensor
    shares: Tensor
    defined: bool


@dataclass(frozen=True)
class MutualKNN(Index):
    """Mutual nearest neighbours (Huh, Cheung, Wang & Isola 2024, "The Platonic Representation Hypothesis").

    The mean over the samples of |N_k(x_i) ∩ N_k(y_i)| / k, with the k nearest other samples N_k. Unrelated
    representations share k / (n - 1) of them. Neighbours are found in float64 by blocks of rows, in a few dozen MiB
    besides the samples.

    Where samples tie for the last places (within rounding, 4e-15 of the squared norms), they share them: each counts as
    much as it would on average if ties were broken at random, in x and in y independently. So no order of the samples
    adds agreement; n samples that all tie need n² entries.

    NaN where all samples agree; with "cosine" also where a sample is zero in every unit, as after a dead ReLU.

    Attributes:
        k: Neighbours of a sample, itself excluded; less than the number of samples.
        metric: "cosine" or "euclidean".

    Raises:
        DataError: `k` is no positive number, or `metric` is none of these.

    >>> x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> MutualKNN(5)(x, 2 * x), MutualKNN(39)(x, x.square())
    (1.0, 1.0)
    """

    name: ClassVar[str] = "mutual_knn"

    k: int = 10
    metric: Metric = "cosine"

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise DataError(f"k is {self.k!r}; expected a number of neighbours, at least 1")
        if self.metric not in ("cosine", "euclidean"):
            raise DataError(f"metric is {self.metric!r}; expected 'cosine' or 'euclidean'")

    @property
    def invariances(self) -> Invariances:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Changes of a representation that leave the index as it is; with "cosine" the origin matters."""
        return Invariances(
            orthogonal=True, scaling=True, linear=False, permutation=True, translation=self.metric == "euclidean"
        )

    @property
    def estimator(self) -> str:
        """Say in a few words what the values are."""
        return f"share of {self.k} nearest neighbours in common, {self.metric}"

    @property
    def least(self) -> int:
        """One sample more than neighbours."""
        return self.k + 1

    def prepare(self, x: Tensor) -> _Neighbours:
        """Find the neighbours of each sample; warns, naming the samples that have none.

        Raises:
            DataError: There are no k other samples.
        """
        if len(x) < self.least:
            raise DataError(f"x of shape {tuple(x.shape)} has {len(x)} samples; {self.k} neighbours need {self.least}")
        _warn_undefined(x, self.metric)
        return self._found(x)

    def _found(self, x: Tensor) -> _Neighbours:
        points = _embedded(x, self.metric)
        if points.isnan().any() or (x == x[0]).all():
            nothing = torch.empty(0, dtype=torch.int64, device=x.device)
            return _Neighbours(x, nothing, nothing.to(torch.float64), False)
        return _Neighbours(x, *_nearest(points, self.k), True)

    def score(self, a: _Neighbours, b: _Neighbours) -> float:
        """Count the neighbours in common."""
        if not (a.defined and b.defined):
            return math.nan
        place = torch.searchsorted(b.pairs, a.pairs).clamp_(max=len(b.pairs) - 1)
        common = b.pairs[place] == a.pairs
        return float((a.shares * b.shares[place])[common].sum()) / (len(a.points) * self.k)

    def taken(self, state: _Neighbours, rows: Tensor) -> _Neighbours:
        """Give the state of x[rows]: a permutation renames the neighbours, a subset has others."""
        n, rows = len(state.points), rows.to(state.points.device)
        if len(rows) != n or len(rows.unique()) != n:
            return self._found(state.points[rows])
        renamed = torch.empty_like(rows)
        renamed[rows] = torch.arange(n, device=rows.device)
        pairs, order = (renamed[state.pairs // n] * n + renamed[state.pairs % n]).sort()
        return _Neighbours(state.points[rows], pairs, state.shares[order], state.defined)


def mutual_knn(x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, k: int = 10, metric: Metric = "cosine") -> float:
    """Compute the share of nearest neighbours that two representations have in common (Huh et al. 2024).

    See `MutualKNN`, also for ties. Unrelated representations share k / (n - 1).

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        k: Neighbours of a sample, itself excluded.
        metric: "cosine" or "euclidean".

    Returns:
        Between 0 and 1; NaN, with a warning, where a representation has no neighbours.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, more than k; or a wrong choice.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> round(mutual_knn(x, x.relu(), k=5), 3)
    0.45
    """
    return MutualKNN(k, metric)(x, y, stacklevel=3)


def _embedded(x: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return rescaled(centred(x))
    x = x.to(torch.float64)
    x = x / x.abs().amax(1, keepdim=True)  # its squares then stay within float64
    return x / x.norm(dim=1, keepdim=True)


def _warn_undefined(x: Tensor, metric: str) -> None:
    zero = (x == 0).all(1).nonzero()[:, 0]
    if metric == "cosine" and len(zero):
        shown = ", ".join(map(str, zero[:8].tolist())) + (", …" if len(zero) > 8 else "")
        warnings.warn(
            f"mutual_knn is NaN: {len(zero)} of {len(x)} samples are zero in every unit ({shown}), which leaves their "
            "cosines undefined; leave them out, or choose metric='euclidean'",
            stacklevel=4,
        )


def _nearest(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n = len(points)
    norms = points.norm(dim=1)
    found = []
    for rows in torch.arange(n, device=points.device).split(max(1, _BLOCK // n)):
        # -‖a - b‖² but for ‖a‖², the same for all neighbours of a; between unit vectors it orders as the cosine does.
        closeness = torch.addmm(norms.square(), points[rows], points.T, beta=-1, alpha=2)
        closeness[torch.arange(len(rows), device=rows.device), rows] = -math.inf
        best = closeness.topk(min(k + 1, n - 1))
        last = best.values[:, k - 1]
        rounding = _ROUNDING * (norms[rows] + norms[best.indices[:, k - 1]]) ** 2
        tied = best.values[:, -1] >= last - rounding if k < n - 1 else torch.zeros_like(last, dtype=torch.bool)
        pairs = (rows[~tied, None] * n + best.indices[~tied, :k]).flatten()
        found += [(pairs, torch.ones_like(pairs, dtype=torch.float64))]
        if tied.any():
            found += [_shared(closeness[tied], rows[tied], last[tied], rounding[tied], k)]
    pairs, order = torch.cat([pairs for pairs, _ in found]).sort()
    return pairs, torch.cat([shares for _, shares in found])[order]


def _shared(closeness: Tensor, rows: Tensor, last: Tensor, rounding: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Give the samples that are surely among the k nearest one place each, those that tie for the rest a share."""
    sure = closeness > (last + rounding)[:, None]
    tie = (closeness >= (last - rounding)[:, None]) & ~sure
    share = (k - sure.sum(1)).to(torch.float64) / tie.sum(1)
    row, column = (sure | tie).nonzero().T
    return rows[row] * closeness.shape[1] + column, torch.where(sure[row, column], 1.0, share[row])
