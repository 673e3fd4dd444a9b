"""Representational similarity analysis: representations compared by their distances between samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..base.errors import DataError, nearest
from .arrays import as_matrix, centred
from .index import Index, Invariances
from .shifts import shifted_products

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Dissimilarity = Literal["correlation", "euclidean", "cosine"]
Comparison = Literal["spearman", "pearson", "kendall", "cosine"]

_INVARIANCES = {
    "correlation": Invariances(orthogonal=False, scaling=True, linear=False, permutation=True, translation=False),
    "cosine": Invariances(orthogonal=True, scaling=True, linear=False, permutation=True, translation=False),
    "euclidean": Invariances(orthogonal=True, scaling=True, linear=False, permutation=True, translation=True),
}
_COMPARISONS = ("spearman", "pearson", "kendall", "cosine")
_UNDEFINED = {"correlation": "have the same value in every unit", "cosine": "are zero in every unit"}

# Below this share of ‖a‖² + ‖b‖² a squared distance from inner products loses more than three of its digits.
_CLOSE = 1e-3
# Distances that differ by less than this share of them differ by rounding alone: they tie.
_TIE = 1e-12
# So do samples whose difference is below this share of their norm: their distance is zero.
_EQUAL = 64 * torch.finfo(torch.float64).eps
_BLOCK = 1 << 22


@dataclass(frozen=True)
class _Distances:
    """Distances between samples, each pair once in the order of the upper triangle, and what is compared of them."""

    samples: int
    distances: Tensor
    profile: Tensor

    def square(self) -> Tensor:
        """Give the profile as a symmetric matrix with zeros along the diagonal."""
        return _square(self.profile, self.samples)


@dataclass(frozen=True)
class RSA(Index):
    """Representational similarity analysis (Kriegeskorte, Mur & Bandettini 2008).

    Each representation becomes its distances between all pairs of samples, its representational dissimilarity matrix
    (RDM); two are compared over the upper triangle. A layer is ranked and normalised once, so that all pairs of layers
    are one matrix product (but for Kendall). A layer takes 8 n² bytes for n samples.

    Distances within 1e-12 of each other tie. NaN where all do (equidistant samples), or one is undefined, see `rdm`.

    Attributes:
        dissimilarity: Between samples: "correlation" (1 - Pearson's r over the units), "euclidean" or "cosine".
        comparison: Of the distances: "spearman" (ties share their mean rank), "pearson", "kendall" (tau-b) or "cosine".

    Raises:
        DataError: `dissimilarity` or `comparison` is none of these.

    >>> x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> round(RSA("euclidean")(x, 2 * x.flip(1) + 1), 6)
    1.0
    """

    name: ClassVar[str] = "rsa"

    dissimilarity: Dissimilarity = "correlation"
    comparison: Comparison = "spearman"

    def __post_init__(self) -> None:
        _check_choice("dissimilarity", self.dissimilarity, _INVARIANCES)
        _check_choice("comparison", self.comparison, _COMPARISONS)

    @property
    def invariances(self) -> Invariances:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Changes of a representation that leave the index as it is: those of the dissimilarity, and scaling."""
        return _INVARIANCES[self.dissimilarity]

    @property
    def estimator(self) -> str:
        """Say in a few words what the values are."""
        comparison = "Kendall's tau-b" if self.comparison == "kendall" else self.comparison
        return f"RSA, {self.dissimilarity} distance, {comparison} over the upper triangle"

    @property
    def least(self) -> int:
        """Three samples: with two there is one distance."""
        return 3

    def nbytes(self, samples: int, units: int) -> int:
        """Bytes of the distances and of their profile, each pair once."""
        del units
        return 8 * samples**2

    def prepare(self, x: Tensor) -> _Distances:
        """Compute the distances between samples, their ranks and norm; warns, naming the samples that have none."""
        points = _embedded(x, self.dissimilarity)
        _warn_undefined(points, self.dissimilarity, "rsa is NaN", 4)
        scale = points.abs().amax()
        distances = _squared_distances(points / scale if scale > 0 else points)
        if self.dissimilarity == "euclidean":
            distances.sqrt_()
        return _Distances(len(x), distances, self._profile(distances))

    def _profile(self, distances: Tensor) -> Tensor:
        low, high = distances.aminmax()
        if self.comparison != "cosine" and not high - low > _TIE * high:
            return torch.full_like(distances, math.nan)
        if self.comparison in ("spearman", "kendall"):
            distances = _ranks(distances)
        if self.comparison == "kendall":
            return distances
        if self.comparison != "cosine":
            distances = distances - distances.mean()
        return distances / distances.norm()

    def score(self, a: _Distances, b: _Distances) -> float:
        """Compare two vectors of distances."""
        return float(self.scores([a], [b]))

    def scores(self, states_a: Sequence[_Distances], states_b: Sequence[_Distances]) -> Tensor:
        """Compare each of one list with each of another: (len(a) x len(b)) in float64."""
        if self.comparison != "kendall":
            return torch.stack([a.profile for a in states_a]) @ torch.stack([b.profile for b in states_b]).T
        values = [[_kendall(a.profile, b.profile) for b in states_b] for a in states_a]
        return torch.tensor(values, dtype=torch.float64)

    def shifted(self, states_a: Sequence[_Distances], states_b: Sequence[_Distances], order: Tensor) -> Tensor | None:
        """Compare under every cyclic shift; Kendall's tau is no product of matrices."""
        if self.comparison == "kendall":
            return None
        a, b = ([state.square() for state in states] for states in (states_a, states_b))
        return shifted_products(a, b, order) / 2  # both triangles

    def taken(self, state: _Distances, rows: Tensor) -> _Distances:
        """Give the state of x[rows]: the distances between these samples, ranked anew if they are not all, once."""
        n, rows = state.samples, rows.to(state.distances.device)
        first, second = rows[torch.triu_indices(len(rows), len(rows), 1, device=rows.device)]
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        place = low * (2 * n - low - 1) // 2 + high - low - 1
        if len(rows) == n == len(rows.unique()):
            return _Distances(n, state.distances[place], state.profile[place])
        distances = state.distances[place.clamp_(0, len(state.distances) - 1)]
        distances[low == high] = 0.0  # a sample drawn twice
        return _Distances(len(rows), distances, self._profile(distances))


def rsa(
    x: Tensor | ArrayLike,
    y: Tensor | ArrayLike,
    *,
    dissimilarity: Dissimilarity = "correlation",
    comparison: Comparison = "spearman",
) -> float:
    """Compare two representations by their distances between samples (Kriegeskorte et al. 2008), see `RSA`.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        dissimilarity: Between samples: "correlation", "euclidean" or "cosine".
        comparison: Of the distances: "spearman", "pearson", "kendall" (tau-b) or "cosine".

    Returns:
        Between -1 and 1; NaN, with a warning, where distances do not vary or are undefined.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least three; or an unknown
            choice.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> round(rsa(x, 3 * x), 6), round(rsa(x, x.relu(), comparison="kendall"), 4)
    (1.0, 0.5537)
    """
    return RSA(dissimilarity, comparison)(x, y, stacklevel=3)


def rdm(x: Tensor | ArrayLike, dissimilarity: Dissimilarity = "correlation") -> Tensor:
    """Compute a representational dissimilarity matrix: the distance of each sample from each other.

    Distances of samples that almost agree are taken from their difference, so none is lost to rounding.

    Args:
        x: Samples x units, at least two samples.
        dissimilarity: "correlation" (1 - Pearson's r over the units), "euclidean" or "cosine" (1 - cosine).

    Returns:
        (samples x samples) in float64, symmetric, zero on the diagonal. NaN, with a warning, in the row and column of a
        sample that has the same value in every unit (correlation) or is zero (cosine).

    Raises:
        DataError: No floating-point matrix of at least two samples, or an unknown dissimilarity.
        NotFiniteError: It holds NaN or infinity.

    >>> rdm([[1.0, 0.0], [0.0, 2.0], [2.0, 0.0]], "cosine")
    tensor([[0., 1., 0.],
            [1., 0., 1.],
            [0., 1., 0.]], dtype=torch.float64)
    """
    _check_choice("dissimilarity", dissimilarity, _INVARIANCES)
    x = as_matrix(x)
    n = len(x)
    if n < 2:
        raise DataError(f"x of shape {tuple(x.shape)} has 1 sample; distances need at least 2")
    with torch.no_grad():
        points = _embedded(x, dissimilarity)
        undefined = _warn_undefined(points, dissimilarity, "rows of the RDM are NaN", 3)
        scale = points.abs().amax()
        scale = scale if scale > 0 else 1.0
        squares = _squared_distances(points / scale)
        distances = squares.sqrt_() * scale if dissimilarity == "euclidean" else squares * (scale * scale / 2)
        square = _square(distances, n)
        square[undefined] = math.nan
    return square


def _check_choice(what: str, value: str, known: Sequence[str] | dict[str, Invariances]) -> None:
    if value not in known:
        raise DataError(f"{what} is {value!r}; expected one of {', '.join(known)}{nearest(str(value), known)}")


def _square(pairs: Tensor, n: int) -> Tensor:
    """Lay out what is known of each pair of n samples as a symmetric matrix with zeros along the diagonal."""
    square = pairs.new_zeros(n, n)
    first, second = torch.triu_indices(n, n, 1, device=pairs.device)
    square[first, second] = square[second, first] = pairs
    return square


def _embedded(x: Tensor, dissimilarity: str) -> Tensor:
    # In these coordinates every dissimilarity is a Euclidean distance (euclidean) or half its square (the others).
    if dissimilarity == "euclidean":
        return centred(x)
    x = centred(x.T).T if dissimilarity == "correlation" else x.to(torch.float64)
    x = x / x.abs().amax(1, keepdim=True)  # its squares then stay within float64
    return x / x.norm(dim=1, keepdim=True)


def _warn_undefined(points: Tensor, dissimilarity: str, effect: str, stacklevel: int) -> Tensor:
    undefined = points.isnan().any(1).nonzero()[:, 0]
    if len(undefined):
        shown = ", ".join(map(str, undefined[:8].tolist())) + (", …" if len(undefined) > 8 else "")
        warnings.warn(
            f"{effect}: {len(undefined)} of {len(points)} samples {_UNDEFINED[dissimilarity]} ({shown}), which leaves "
            f"their {dissimilarity} distance undefined; leave them out, or choose dissimilarity='euclidean'",
            stacklevel=stacklevel,
        )
    return undefined


def _squared_distances(points: Tensor) -> Tensor:
    n = len(points)
    norms = points.square().sum(1)
    found = points.new_empty(n * (n - 1) // 2)
    filled = 0
    for rows in torch.arange(n - 1, device=points.device).split(max(1, _BLOCK // n)):
        others = slice(int(rows[0]) + 1, n)
        sizes = norms[rows, None] + norms[others]
        squares = torch.addmm(sizes, points[rows], points[others].T, alpha=-2)
        upper = torch.ones_like(squares, dtype=torch.bool).triu_()
        for pairs in ((squares < _CLOSE * sizes) & upper).nonzero().split(max(1, _BLOCK // points.shape[1])):
            first, second = pairs.T
            differences = points[rows[first]] - points[others][second]
            exact, size = differences.square_().sum(1), sizes[first, second]
            squares[first, second] = exact.masked_fill_(exact < _EQUAL**2 * size, 0.0)
        values = squares[upper]
        found[filled : filled + len(values)] = values
        filled += len(values)
    return found


def _ranks(values: Tensor) -> Tensor:
    """Rank from 1; ties, within rounding of their neighbour in order, share their mean rank."""
    ordered, order = values.sort()
    rises = ordered.diff() > _TIE * ordered[1:]
    group = torch.nn.functional.pad(rises.cumsum(0), (1, 0))
    sizes = group.bincount().to(torch.float64)
    ranks = torch.empty_like(values)
    ranks[order] = (sizes.cumsum(0) - (sizes - 1) / 2)[group]
    return ranks


def _kendall(x: Tensor, y: Tensor) -> float:
    from scipy.stats import kendalltau

    if x.isnan().any() or y.isnan().any():
        return math.nan
    result = kendalltau(x.cpu().numpy(), y.cpu().numpy(), variant="b")
    return float(result.statistic)  # pyright: ignore[reportAttributeAccessIssue]
