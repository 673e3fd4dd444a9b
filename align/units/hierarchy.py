"""Clusters of the units of two layers by joining the closest, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.moments import Moments
from .clusters import Clusters, numbered, search_range
from .joint import JointAffinity, Kind, check_choice, read_affinity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

Linkage = Literal["single", "complete", "average", "weighted"]

_ROUNDING = 1e-9


def hierarchical_clusters(
    affinity: Moments | JointAffinity | Tensor | ArrayLike,
    a: str | None = None,
    b: str | None = None,
    *,
    clusters: int | None = None,
    minimum: int = 2,
    largest: int | None = None,
    linkage: Linkage = "average",
    kind: Kind = "absolute",
    sizes: tuple[int, int] | None = None,
) -> Clusters:
    """Find clusters of units across two networks by agglomeration (many-to-many, as in Li et al. 2015).

    Two units are 1 - s apart, s their affinity. The two closest clusters are joined until one is left; k clusters are
    what the last k - 1 joins would join. How far clusters are apart is up to `linkage`: the closest pair of their units
    ("single"), the farthest ("complete"), the mean ("average"), or the mean of the two parts ("weighted"), as in
    `scipy.cluster.hierarchy.linkage`; with each of them, heights never fall.

    Args:
        affinity: `Moments` with the pairs (a, a), (b, b) and (a, b); or affinities, none above 1: a `JointAffinity`, or
            a square matrix, symmetric and not negative, with `sizes`. Its diagonal does not count.
        a: Name of the first layer in the moments; None for a matrix.
        b: Name of the second layer in the moments; None for a matrix.
        clusters: How many. Default: where the heights of two successive joins differ most, from `minimum` to `largest`.
        minimum: Smallest number that is searched.
        largest: Largest number that is searched. Default: 50, and in any case fewer than units.
        linkage: Which distance of clusters.
        kind: "absolute" or "positive" correlation, of moments.
        sizes: Numbers of units of a and of b, for a matrix.

    Returns:
        The clusters, with their `linkage`. A unit without any affinity is clustered like any other, at distance 1.

    Raises:
        DataError: A choice or number cannot be used: fewer than one cluster, more clusters than units, fewer than two
            units, an affinity above 1; or see `read_affinity`.
        LayerNotFoundError: The moments lack a layer, or a pair was not kept.
        NotFiniteError: A matrix holds NaN or infinity.

    >>> found = hierarchical_clusters(
    ...     [[0, 0, 0.9, 0], [0, 0, 0, 0.8], [0.9, 0, 0, 0.1], [0, 0.8, 0.1, 0.0]], sizes=(2, 2)
    ... )
    >>> found.labels_a.tolist(), found.labels_b.tolist(), found.linkage[:, 2].round(3).tolist()
    ([0, 1], [0, 1], [0.1, 0.2, 0.975])
    """
    from scipy.cluster.hierarchy import linkage as joined
    from scipy.spatial.distance import squareform

    check_choice("linkage", linkage, Linkage)
    joint = read_affinity(affinity, a, b, kind, sizes)
    units = len(joint.values)
    distances = (1 - joint.values.cpu()).fill_diagonal_(0)
    if units < 2 or float(distances.min()) < -_ROUNDING:
        raise DataError(
            f"{units} units with affinities up to {1 - float(distances.min()):g}; expected two units or more, and "
            "affinities of at most 1: divide them by the largest"
        )
    low, high = search_range(units, clusters, minimum, largest)
    tree = joined(squareform(distances.clamp_(min=0).numpy(), checks=False), linkage)
    heights = torch.from_numpy(tree[:, 2])
    if low < high:
        counts = torch.arange(low, high + 1)
        # k clusters stand between the join that leaves k and the next one.
        below = torch.cat([heights.new_zeros(1), heights])
        low += int((below[units - counts + 1] - below[units - counts]).argmax())
    return numbered(joint, _cut(tree, low), f"hierarchical, {linkage} linkage", linkage=tree)


def _cut(tree: np.ndarray, count: int) -> Tensor:
    # scipy cuts at a height, and finds fewer clusters where heights are equal.
    units = len(tree) + 1
    clusters = {unit: [unit] for unit in range(units)}
    for step, (left, right) in enumerate(tree[: units - count, :2].astype(int).tolist()):
        clusters[units + step] = clusters.pop(left) + clusters.pop(right)
    labels = torch.empty(units, dtype=torch.int64)
    for label, members in enumerate(clusters.values()):
        labels[members] = label
    return labels
