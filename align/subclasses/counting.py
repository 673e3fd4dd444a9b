"""How many clusters a class has: silhouette, gap statistic, Bayesian information criterion, eigengap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from ...base.errors import DataError
from .clustering import Method, Points

Criterion = Literal["silhouette", "gap", "bic", "eigengap"]

OWN: dict[str, Criterion] = {"kmeans": "eigengap", "mixture": "bic", "spectral": "eigengap"}
"""The criterion of each method unless told otherwise; hdbscan needs none."""

_REFERENCES = 10
_TINY = float(np.finfo(np.float64).tiny)
_SAMPLES = 2000  # that a silhouette is averaged over


def estimate_count(points: Points, criterion: Criterion, largest: int) -> tuple[int, dict[int, float]]:
    """Choose the number of clusters of one class.

    * "eigengap": λ_(k+1) - λ_k of the normalised Laplacian of the graph of nearest neighbours is largest (von Luxburg
      2007, section 8.3); at least 2, as the gap above λ_1 depends on the number of samples. The least inclined of the
      four to see clusters of a shape that is not round as several.
    * "bic": the Bayesian information criterion of a mixture of k Gaussians, negated here, is largest (Schwarz 1978); it
      can say 1, and says more than there are where clusters are not Gaussian.
    * "silhouette": the mean of (b - a)/max(a, b) over up to 2000 samples, a and b the mean distances to the own and to
      the nearest other cluster of the method, is largest (Rousseeuw 1987); at least 2.
    * "gap": Gap(k) is the mean log inertia of ten uniform samples in the box of the principal axes, less that of the
      points (Tibshirani, Walther & Hastie 2001); the smallest k within a standard error of the largest one, as clusters
      of clusters have several maxima (Dudoit & Fridlyand 2002). It can say 1, and does so too often of whitened
      components, where one direction of many tells clusters apart.

    Args:
        points: The samples.
        criterion: Which one.
        largest: The largest number to try, fewer where there are fewer samples.

    Returns:
        The number, and the criterion of each number that was tried.
    """
    largest = min(largest, len(points) - 1)
    if criterion == "gap":
        return _gap(points, largest)
    rules: dict[str, Callable[[Points, int], dict[int, float]]] = {
        "silhouette": _silhouette, "bic": _bic, "eigengap": _eigengap
    }  # fmt: skip
    values = rules[criterion](points, largest)
    return max(values, key=values.__getitem__), values


def check_criterion(method: Method, criterion: str) -> None:
    """Refuse a criterion that is unknown, or that nobody asks.

    Raises:
        DataError: It is unknown, or the method chooses by itself.
    """
    if method == "hdbscan":
        raise DataError("method 'hdbscan' chooses the number of clusters by itself; leave count out")
    if criterion not in get_args(Criterion):
        known = ", ".join(get_args(Criterion))
        raise DataError(f"count is {criterion!r}; expected a number, one for each class, or one of {known}")


def _silhouette(points: Points, largest: int) -> dict[int, float]:
    from sklearn.metrics import silhouette_score

    chosen = np.random.default_rng(points.seed).permutation(len(points))[:_SAMPLES]
    values: dict[int, float] = {}
    for count in range(2, max(largest, 2) + 1):
        labels = points.labels(count)[chosen]
        # A cluster may have none of the samples drawn.
        if 1 < len(np.unique(labels)) < len(labels):
            values[count] = float(silhouette_score(points.x[chosen], labels))
    return values or {1: 0.0}


def _bic(points: Points, largest: int) -> dict[int, float]:
    return {count: -float(points.mixture(count).bic(points.x)) for count in range(1, largest + 1)}


def _eigengap(points: Points, largest: int) -> dict[int, float]:
    values = points.spectrum[0]
    return {count: float(values[count] - values[count - 1]) for count in range(2, max(2, largest) + 1)}


def _gap(points: Points, largest: int) -> tuple[int, dict[int, float]]:
    generator = np.random.default_rng(points.seed)
    # The axes of the box; its volume is what the reference is uniform in.
    axes = np.linalg.svd(points.x - points.x.mean(0), full_matrices=False)[2]
    turned = points.x @ axes.T
    low, high = turned.min(0), turned.max(0)
    references = [Points(generator.uniform(low, high, turned.shape), "kmeans", points.seed) for _ in range(_REFERENCES)]
    gaps: dict[int, float] = {}
    errors: dict[int, float] = {}
    for count in range(1, largest + 1):
        logs = np.log([max(one.inertia(count), _TINY) for one in references])
        gaps[count] = float(logs.mean() - np.log(max(points.inertia(count), _TINY)))
        errors[count] = float(logs.std() * np.sqrt(1 + 1 / _REFERENCES))
    best = max(gaps, key=gaps.__getitem__)
    return min(count for count in gaps if gaps[count] >= gaps[best] - errors[best]), gaps
