"""Clusters of points: k-means, Gaussian mixtures, spectral clustering, HDBSCAN."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...base.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from sklearn.mixture import GaussianMixture

Method = Literal["kmeans", "mixture", "spectral", "hdbscan"]

_RESTARTS = 10
_NEIGHBOURS = 15
_DENSITY = 10  # points whose distance tells the density around a point
_DENSE = 512  # points up to which a dense solver is the faster one
_TAU = 1e-3  # what joins parts of a graph, as a share of the mean degree


class Points:
    """The samples of one class as points, clustered into any number of clusters.

    Args:
        x: (n x dims), mean variance 1.
        method: "kmeans" (best of ten runs), "mixture" (of Gaussians with any covariance, best of three runs),
            "spectral" (normalised Laplacian of the graph of 15 nearest neighbours, Ng, Jordan & Weiss 2001; regularised
            as by Amini et al. 2013) or "hdbscan" (Campello et al. 2013), which chooses the number by itself.
        seed: Of starts.
        most: The largest number of clusters that will be asked for.
    """

    def __init__(self, x: np.ndarray, method: Method, seed: int, most: int = 1) -> None:
        self.x, self.method, self.seed, self.most = np.ascontiguousarray(x), method, seed, most

    def __len__(self) -> int:
        return len(self.x)

    def labels(self, count: int) -> np.ndarray:
        """Cluster into so many clusters: (n,) int64; fewer where points coincide."""
        if count == 1:
            return np.zeros(len(self.x), dtype=np.int64)
        if self.method == "spectral":
            places = self.spectrum[1][:, :count]
            norms = np.linalg.norm(places, axis=1, keepdims=True)
            return self._kmeans(places / np.where(norms > 0, norms, 1), count)[0]
        if self.method == "mixture":
            return self.mixture(count).predict(self.x)
        return self._kmeans(self.x, count)[0]

    def inertia(self, count: int) -> float:
        """Give the least Σ of squared distances from the centres of so many clusters, by k-means."""
        return self._kmeans(self.x, count)[1]

    def mixture(self, count: int) -> GaussianMixture:
        """Fit a mixture of so many Gaussians."""
        from sklearn.mixture import GaussianMixture

        return GaussianMixture(count, n_init=3, random_state=self.seed, max_iter=500, reg_covar=1e-4).fit(self.x)

    def dense_regions(self, least: int) -> np.ndarray:
        """Cluster by density: (n,) int64, -1 for points in no cluster; a cluster has `least` points or more."""
        from sklearn.cluster import HDBSCAN

        regions = HDBSCAN(min_cluster_size=least, min_samples=min(_DENSITY, least), copy=True)
        found: np.ndarray = regions.fit_predict(self.x)  # pyright: ignore[reportAssignmentType]
        # Where no split is stable, all are one cluster.
        return found.astype(np.int64) if (found >= 0).any() else np.zeros(len(self.x), dtype=np.int64)

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Smallest eigenvalues of the Laplacian, rising, and their vectors: one more than clusters asked for."""
        return graph_spectrum(self.x, self.most + 1)

    def _kmeans(self, x: np.ndarray, count: int) -> tuple[np.ndarray, float]:
        from sklearn.cluster import KMeans

        # scikit-learn's annotation knows n_init="auto" only.
        means = KMeans(count, n_init=_RESTARTS, random_state=self.seed)  # pyright: ignore[reportArgumentType]
        labels = means.fit_predict(x)
        assert means.inertia_ is not None
        return np.asarray(labels, dtype=np.int64), float(means.inertia_)


def graph_spectrum(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the smallest eigenvalues of the normalised Laplacian of the graph of nearest neighbours.

    W is the mean of the graph and its transpose, with self-tuning weights exp(-d_ij²/(s_i s_j)), s_i the distance of
    the last neighbour (Zelnik-Manor & Perona 2004); τ/n joins all points weakly (Amini et al. 2013, section 2).

    Args:
        x: (n x dims).
        count: How many, at most n.

    Returns:
        Eigenvalues (count,), rising, and vectors (n x count).
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import LinearOperator, eigsh

    n, count = len(x), min(count, len(x))
    weights = _weights(x)
    degree = np.asarray(weights.sum(1)).ravel()
    tau = _TAU * degree.mean()
    scale = 1 / np.sqrt(degree + tau)
    if n <= max(_DENSE, count):
        matrix = (weights.toarray() + tau / n) * scale[:, None] * scale
        values, vectors = eigh(matrix, subset_by_index=[n - count, n - 1])
    else:

        def product(v: np.ndarray) -> np.ndarray:
            scaled = scale * v.ravel()
            return scale * (weights @ scaled + tau / n * scaled.sum())

        operator = LinearOperator((n, n), matvec=product, dtype=np.float64)  # pyright: ignore[reportCallIssue]
        values, vectors = eigsh(operator, count, which="LA", v0=np.random.default_rng(0).standard_normal(n))
    order = np.argsort(-values, kind="stable")
    return 1 - values[order], vectors[:, order]


def _weights(x: np.ndarray) -> csr_matrix:
    from scipy.sparse import csr_matrix
    from sklearn.neighbors import NearestNeighbors

    n, near = len(x), min(_NEIGHBOURS, len(x) - 1)
    distances, indices = NearestNeighbors(n_neighbors=near).fit(x).kneighbors()
    widths = np.maximum(distances[:, -1], np.finfo(np.float64).tiny ** 0.25)
    values = np.exp(-np.square(distances) / (widths[:, None] * widths[indices]))
    graph = csr_matrix((values.ravel(), (np.repeat(np.arange(n), near), indices.ravel())), shape=(n, n))
    return (graph + graph.T) / 2


def check_count(count: int, samples: int, name: int) -> None:
    """Refuse a number of clusters that a class cannot have.

    Raises:
        DataError: It is no whole number above 0, or the class has fewer samples.
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise DataError(f"class {name}: count is {count!r}; expected a whole number of clusters, at least 1")
    if samples < count:
        raise DataError(
            f"class {name} has {samples} sample{'s' * (samples != 1)}, fewer than the {count} clusters asked for"
        )
