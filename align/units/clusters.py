"""Many units to many: clusters of the units of two layers, found together in one graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from ...metrics.moments import Moments
from .joint import JointAffinity, Kind, check_choice, read_affinity
from .pictures import new_axes

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

Laplacian = Literal["normalised", "random_walk", "unnormalised"]
Assign = Literal["kmeans", "cluster_qr"]

_DENSE = 1024  # units up to which a dense solver is the faster one
_LARGEST = 50
_RESTARTS = 10


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of the units of two layers, the largest first.

    Attributes:
        labels_a: (units of a,) int64, the cluster of each unit; -1 for none: constant or isolated.
        labels_b: (units of b,) int64, the same.
        count: How many clusters.
        affinity: What they were found in.
        method: How they were found, in a few words.
        eigenvalues: Smallest ones of the Laplacian, rising; None for a hierarchy.
        linkage: The hierarchy over the rows of the affinity, (m - 1, 4) as scipy writes it; None for spectral clusters.
    """

    labels_a: Tensor
    labels_b: Tensor
    count: int
    affinity: JointAffinity
    method: str
    eigenvalues: Tensor | None = None
    linkage: np.ndarray | None = None

    @property
    def sizes(self) -> Tensor:
        """Numbers of units of a and of b in each cluster, (count, 2) int64."""
        counts = [
            torch.bincount(labels[labels >= 0], minlength=self.count) for labels in (self.labels_a, self.labels_b)
        ]
        return torch.stack(counts, 1)

    @property
    def constant_a(self) -> tuple[int, ...]:
        """Units of a that do not vary, in no cluster."""
        return self.affinity.constant_a

    @property
    def constant_b(self) -> tuple[int, ...]:
        """Units of b that do not vary, in no cluster."""
        return self.affinity.constant_b

    @property
    def isolated_a(self) -> tuple[int, ...]:
        """Units of a that vary, but have no affinity to any other unit, in no cluster."""
        return _places(self.labels_a < 0, self.constant_a)

    @property
    def isolated_b(self) -> tuple[int, ...]:
        """Units of b that vary, but have no affinity to any other unit, in no cluster."""
        return _places(self.labels_b < 0, self.constant_b)

    def members(self, cluster: int) -> tuple[Tensor, Tensor]:
        """Give the units of one cluster: those of a, and those of b.

        Raises:
            DataError: There is no such cluster.
        """
        if not 0 <= cluster < self.count:
            raise DataError(f"there is no cluster {cluster}; there are {self.count}, from 0")
        return (self.labels_a == cluster).nonzero().flatten(), (self.labels_b == cluster).nonzero().flatten()

    @cached_property
    def order(self) -> Tensor:
        """An order of the units that shows the blocks, int64: places as in `JointAffinity.joint`.

        By cluster; in a cluster those of a before those of b, and the closest to the cluster first. Units of no cluster
        are left out.
        """
        return self.affinity.joint[self._rows()]

    def _rows(self) -> Tensor:
        joint = self.affinity.joint
        labels = torch.cat([self.labels_a, self.labels_b])[joint]
        same = labels[:, None] == labels
        closeness = (self.affinity.values.cpu() * same).fill_diagonal_(0).sum(1)
        rows = closeness.argsort(descending=True, stable=True)
        for key in ((joint >= self.affinity.shape[0]).long(), labels):
            rows = rows[key[rows].argsort(stable=True)]
        return rows[labels[rows] >= 0]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the affinities in the order of the clusters, with a line around each.

        Args:
            ax: Where to draw. Default: a new figure.

        Returns:
            The axes.
        """
        from matplotlib.patches import Rectangle

        ax = new_axes(ax)
        rows = self._rows()
        values = self.affinity.values.cpu()[rows][:, rows].numpy()
        image = ax.imshow(values, cmap="viridis", vmin=0)
        ax.grid(False)
        start = -0.5
        for size in self.sizes.sum(1).tolist():
            ax.add_patch(Rectangle((start, start), size, size, fill=False, edgecolor="red", linewidth=1))
            start += size
        ax.set_xlabel("units of a and b, by cluster")
        ax.set_ylabel("units of a and b, by cluster")
        label = "affinity" if self.affinity.kind == "given" else f"correlation ({self.affinity.kind})"
        ax.figure.colorbar(image, ax=ax, label=label)
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give all but the affinities as plain lists and strings for JSON."""
        names = ("labels_a", "labels_b", "count", "method", "sizes", "order", "eigenvalues", "linkage")
        names += ("constant_a", "constant_b", "isolated_a", "isolated_b")
        return plain({name: getattr(self, name) for name in names})


def spectral_clusters(
    affinity: Moments | JointAffinity | Tensor | ArrayLike,
    a: str | None = None,
    b: str | None = None,
    *,
    clusters: int | None = None,
    minimum: int = 2,
    largest: int | None = None,
    laplacian: Laplacian = "normalised",
    kind: Kind = "absolute",
    assign: Assign = "kmeans",
    seed: int = 0,
    sizes: tuple[int, int] | None = None,
) -> Clusters:
    """Find clusters of units across two networks by spectral clustering (Li et al. 2015, many-to-many mappings).

    The units of both layers are the nodes of one graph with weights S, without loops, and degrees D = diag(S 1). The
    eigenvectors of the k smallest eigenvalues of a Laplacian place each unit in k dimensions, where clusters are found:

    * "normalised": I - D^(-1/2) S D^(-1/2), for k-means each row scaled to norm 1 (Ng, Jordan & Weiss 2001);
    * "random_walk": I - D^(-1) S (Shi & Malik 2000), which is what scikit-learn's `SpectralClustering` uses;
    * "unnormalised": D - S (von Luxburg 2007).

    A unit without any affinity to others has degree 0 and belongs to no cluster, see `Clusters.isolated_a`. Up to 1024
    units are solved densely, more by Lanczos iterations on the CPU, on a GPU all densely.

    Args:
        affinity: `Moments` with the pairs (a, a), (b, b) and (a, b); or affinities: a `JointAffinity`, or a square
            matrix, symmetric and not negative, with `sizes`. Its diagonal does not count.
        a: Name of the first layer in the moments; None for a matrix.
        b: Name of the second layer in the moments; None for a matrix.
        clusters: How many. Default: the k with the largest gap λ_(k+1) - λ_k, searched from `minimum` to `largest`.
        minimum: Smallest number that is searched.
        largest: Largest number that is searched. Default: 50, and in any case fewer than units.
        laplacian: Which one.
        kind: "absolute" or "positive" correlation, of moments.
        assign: "kmeans", the best of ten runs; or "cluster_qr" (Damle, Minden & Ying 2019), which has no randomness.
        seed: Of k-means.
        sizes: Numbers of units of a and of b, for a matrix.

    Returns:
        The clusters. k-means may find fewer than asked for where units have the same place, and warns.

    Raises:
        DataError: A choice or number cannot be used: fewer than one cluster, more clusters than units; no unit has any
            affinity; or see `read_affinity`.
        LayerNotFoundError: The moments lack a layer, or a pair was not kept.
        NotFiniteError: A matrix holds NaN or infinity.

    >>> found = spectral_clusters([[0, 0, 0.9, 0], [0, 0, 0, 0.8], [0.9, 0, 0, 0.1], [0, 0.8, 0.1, 0.0]], sizes=(2, 2))
    >>> found.labels_a.tolist(), found.labels_b.tolist()
    ([0, 1], [0, 1])
    """
    for name, choice, known in (("laplacian", laplacian, Laplacian), ("assign", assign, Assign)):
        check_choice(name, choice, known)
    joint = read_affinity(affinity, a, b, kind, sizes)
    values = joint.values.clone().fill_diagonal_(0)
    linked = values.any(1).nonzero().flatten()
    if not len(linked):
        raise DataError(f"none of the {len(values)} units has an affinity to another one: there is nothing to cluster")
    low, high = search_range(len(linked), clusters, minimum, largest)
    eigenvalues, vectors = _smallest(values[linked][:, linked], laplacian, min(high + 1, len(linked)))
    count = low if low == high else _widest_gap(eigenvalues, low, high)
    places = vectors[:, :count]
    # Rows of equal norm would leave the first pivot of cluster_qr to rounding.
    if laplacian == "normalised" and assign == "kmeans":
        norm = places.norm(dim=1, keepdim=True)
        places = places / norm.where(norm > 0, 1.0)
    found = _assigned(places, assign, seed)
    labels = torch.full((len(values),), -1).index_copy_(0, linked.cpu(), found)
    method = f"spectral, {laplacian} Laplacian, {assign}"
    return numbered(joint, labels, method, eigenvalues=eigenvalues.cpu())


def search_range(units: int, clusters: int | None, minimum: int, largest: int | None) -> tuple[int, int]:
    """Give the smallest and the largest number of clusters to consider, equal where the number is given.

    Raises:
        DataError: There are fewer than one, or more than units, or none between.
    """
    for name, number in (("clusters", clusters), ("minimum", minimum), ("largest", largest)):
        if number is not None and number < 1:
            raise DataError(f"{name} is {number}; expected at least 1")
    if clusters is not None:
        if clusters > units:
            raise DataError(f"clusters is {clusters}, but {units} units can be clustered; ask for at most {units}")
        return clusters, clusters
    if largest is not None and largest < minimum:
        raise DataError(f"there is no number of clusters from minimum={minimum} to largest={largest}")
    high = min(_LARGEST if largest is None else largest, units - 1)
    # The gap above the last eigenvalue is not defined.
    return (minimum, max(high, minimum)) if minimum < units else (units, units)


def numbered(joint: JointAffinity, found: Tensor, method: str, **more: Any) -> Clusters:
    """Number clusters by falling size, the one with the first unit first where sizes are equal.

    Args:
        joint: The affinities.
        found: (m,) int64, a label for each row; -1 for none.
        method: How they were found.
        more: Other attributes of `Clusters`.
    """
    known = found[found >= 0]
    names, counts = known.unique(return_counts=True)
    first = torch.stack([(found == name).nonzero()[0, 0] for name in names])
    ranked = sorted(range(len(names)), key=lambda i: (-int(counts[i]), int(first[i])))
    labels = torch.full((sum(joint.shape),), -1)
    for new, old in enumerate(ranked):
        labels[joint.joint[found == names[old]]] = new
    labels_a, labels_b = labels.split(list(joint.shape))
    return Clusters(labels_a, labels_b, len(names), joint, method, **more)


def _smallest(affinity: Tensor, laplacian: Laplacian, count: int) -> tuple[Tensor, Tensor]:
    # The smallest eigenvalues of the Laplacian are the largest of its negative, shifted: quicker for Lanczos.
    degree = affinity.sum(1)
    if laplacian == "unnormalised":
        values, vectors = _largest(affinity - degree.diag(), count)
        return -values, vectors
    scale = degree.sqrt()
    values, vectors = _largest(affinity / scale[:, None] / scale, count)
    return 1 - values, vectors / scale[:, None] if laplacian == "random_walk" else vectors


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if matrix.is_cuda:
        values, vectors = torch.linalg.eigh(matrix)
        return values[-count:].flip(0), vectors[:, -count:].flip(1)
    import numpy as np
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    units = len(matrix)
    if units <= _DENSE or 4 * count > units:
        values, vectors = eigh(matrix.numpy(), subset_by_index=[units - count, units - 1], check_finite=False)
    else:
        start = np.random.default_rng(0).standard_normal(units)
        values, vectors = eigsh(matrix.numpy(), count, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order])


def _widest_gap(eigenvalues: Tensor, low: int, high: int) -> int:
    gaps = eigenvalues[low : high + 1] - eigenvalues[low - 1 : high]
    return low + int(gaps.argmax())


def _assigned(places: Tensor, assign: Assign, seed: int) -> Tensor:
    rows = places.cpu().numpy()
    if assign == "kmeans":
        from sklearn.cluster import KMeans

        # scikit-learn's annotation knows n_init="auto" only.
        means = KMeans(rows.shape[1], n_init=_RESTARTS, random_state=seed)  # pyright: ignore[reportArgumentType]
        return torch.from_numpy(means.fit(rows).labels_).long()
    from scipy.linalg import qr, svd

    # The pivots are units that stand for one cluster each; the polar factor turns the axes towards them.
    pivots = qr(rows.T, pivoting=True, mode="r")[-1][: rows.shape[1]]
    u, _, vt = svd(rows[pivots].T)
    return torch.from_numpy(abs(rows @ u @ vt).argmax(1))


def _places(chosen: Tensor, without: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(chosen.nonzero().flatten().tolist()) - set(without)))
