"""The geometry of class means and of classifier rows: equal norms, equal angles, distance from a simplex."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.errors import DataError


@dataclass(frozen=True)
class Frame:
    """How far some vectors, one for each class, are from the vertices of a regular simplex.

    Attributes:
        equinorm: Standard deviation of their norms over the mean of these; 0 for equal norms (Papyan et al. 2020,
            Figure 2).
        cosine_spread: Standard deviation of the cosines of all pairs; 0 for equal angles (Figure 3). This is the test:
            it is 0 for nothing but an equiangular frame.
        cosine_mean: Mean cosine of all pairs. Centred vectors of about equal norms have a mean near -1/(K-1) whatever
            their angles, so it tells little.
        equiangularity: Mean of |cosine + 1/(K-1)| over all pairs; 0 for the largest equal angles (Figure 4).
        simplex_distance: ‖G/‖G‖_F - E/‖E‖_F‖_F, G the Gram matrix of the vectors and E = I - 11ᵀ/K that of a simplex
            (Zhu et al. 2021); 0 for a simplex, whatever its scale and rotation.
    """

    equinorm: float
    cosine_spread: float
    cosine_mean: float
    equiangularity: float
    simplex_distance: float


def frame(vectors: Tensor) -> Frame:
    """Measure how far vectors are from the vertices of a regular simplex around the origin.

    Standard deviations divide by the number of values. NaN marks what is undefined: cosines of a vector of length zero.

    Args:
        vectors: (K x units), one for each class, K ≥ 2; class means minus their mean, or the rows of a classifier.

    >>> corners = torch.eye(4, dtype=torch.float64) - 1 / 4
    >>> found = frame(3 * corners)
    >>> round(found.cosine_spread, 12), round(found.cosine_mean, 12), round(found.simplex_distance, 12)
    (0.0, -0.333333333333, 0.0)
    """
    gram = vectors.to(torch.float64) @ vectors.to(torch.float64).T
    norms = gram.diagonal().sqrt()
    cosines = _pairs(gram / norms / norms[:, None])
    count = len(gram)
    return Frame(
        equinorm=float(norms.std(correction=0) / norms.mean()),
        cosine_spread=float(cosines.std(correction=0)),
        cosine_mean=float(cosines.mean()),
        equiangularity=float((cosines + 1 / (count - 1)).abs().mean()),
        simplex_distance=_distance(gram, torch.eye(count, dtype=gram.dtype, device=gram.device) - 1 / count),
    )


def orthogonal_distance(vectors: Tensor) -> float:
    """Give ‖G/‖G‖_F - I/√K‖_F: 0 for vectors of one length that are orthogonal to each other.

    That is what the class means become, not centred, of a classifier without bias that is trained by squared error
    (Tirer & Bruna 2022).

    Args:
        vectors: (K x units), the class means themselves.

    >>> orthogonal_distance(5 * torch.eye(3, 7)) < 1e-12
    True
    """
    gram = vectors.to(torch.float64) @ vectors.to(torch.float64).T
    return _distance(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def duality(weight: Tensor, means: Tensor) -> float:
    """Give ‖W/‖W‖_F - M/‖M‖_F‖_F, NC3: 0 where classifier and class means are one up to scale (Papyan et al. 2020).

    Args:
        weight: (K x units), rows of the classifier.
        means: (K x units).

    >>> means = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    >>> duality(2 * means, means), duality(-means, means)
    (0.0, 2.0)
    """
    return _distance(weight.to(torch.float64), means.to(torch.float64))


def _distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.norm(a / torch.linalg.norm(a) - b / torch.linalg.norm(b)))


def _pairs(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    return matrix[rows, columns]


def squared_distances(vectors: Tensor) -> Tensor:
    """Give ‖v_i - v_j‖² of each pair i < j, (pairs,)."""
    vectors = vectors.to(torch.float64)
    # Centred first: what all have in common would take digits from the differences.
    vectors = vectors - vectors.mean(0)
    gram = vectors @ vectors.T
    squares = gram.diagonal()
    return _pairs(squares + squares[:, None] - 2 * gram).clamp(min=0)


def class_distance_variance(means: Tensor, variances: Tensor) -> float:
    """Give the class-distance normalised variance (CDNV), averaged over all pairs of classes.

    For a pair it is (v_i + v_j) / (2 ‖μ_i - μ_j‖²), v the mean squared distance of a class's samples from their mean:
    0 under collapse, and, unlike NC1, it asks for no inverse (Galanti, György & Hutter 2022).

    Args:
        means: (K x units).
        variances: (K,).

    Returns:
        The mean; infinite where two means coincide.

    >>> class_distance_variance(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([1.0, 3.0]))
    0.5
    """
    rows, columns = torch.triu_indices(len(means), len(means), 1, device=means.device)
    variances = variances.to(torch.float64)
    return float(((variances[rows] + variances[columns]) / (2 * squared_distances(means))).mean())


def uniformity(vectors: Tensor) -> tuple[float, float]:
    """Measure how evenly directions fill the sphere, whatever their number: mean and spread of log(1 / distance).

    Where there are more than units + 1 classes, no simplex has room, and means that are spread evenly have the least
    mean of log(1/‖u_i - u_j‖) over all pairs of unit vectors (Liu et al. 2023); its standard deviation is 0 where all
    distances are equal (Wu & Papyan 2024, who divide it by the mean, which may be 0).

    Args:
        vectors: (K x units), K ≥ 2; lengths do not count.

    Returns:
        Mean and standard deviation. For a regular simplex -½ log(2 K / (K-1)), and 0.

    >>> mean, spread = uniformity(torch.eye(3, dtype=torch.float64) - 1 / 3)
    >>> round(mean, 6), round(spread, 6)
    (-0.549306, 0.0)
    """
    vectors = vectors.to(torch.float64)
    units = vectors / torch.linalg.norm(vectors, dim=1, keepdim=True)
    values = -0.5 * squared_distances(units).log()
    return float(values.mean()), float(values.std(correction=0))


def minority_cosine(vectors: Tensor, counts: Tensor) -> float | None:
    """Give the mean cosine of all pairs of classes that have fewer samples than the average class.

    Under strong imbalance the rows of a classifier for the small classes become parallel, and so do their means: the
    cosine goes to 1, minority collapse (Fang et al. 2021).

    Args:
        vectors: (K x units), rows of the classifier, or class means.
        counts: (K,), samples of each class.

    Returns:
        The mean; None where fewer than two classes are below the average.

    >>> minority_cosine(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([100, 3, 3]))
    1.0
    """
    if len(vectors) != len(counts):
        raise DataError(f"{len(vectors)} vectors beside counts of {len(counts)} classes; expected one for each class")
    minor = vectors.to(torch.float64)[counts.to(vectors.device) < counts.to(torch.float64).mean().item()]
    if len(minor) < 2:
        return None
    units = minor / torch.linalg.norm(minor, dim=1, keepdim=True)
    return float(_pairs(units @ units.T).mean())
