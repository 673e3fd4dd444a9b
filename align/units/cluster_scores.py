"""What the clusters of two layers share: units, correlations, and the subspace that the units span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from ...metrics.moments import Moments
from .between import warn_few_samples
from .clusters import Clusters

_ROUNDING = 1e-12  # of the largest variance: more than float32 leaves of units that depend on each other

_COLUMNS = (
    "units_a", "units_b", "evenness", "within", "within_a", "within_b", "between", "outside",
    "dimensions_a", "dimensions_b", "subspace", "chance", "explained", "one_to_one", "basis_gap",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ClusterScores:
    """What two networks share in each cluster; every tensor is (clusters,), float64 unless said otherwise.

    Correlations are means of |r|, no unit with itself. NaN where there is no pair of such units.

    Attributes:
        units_a: Number of units of a, int64.
        units_b: Number of units of b, int64.
        evenness: 1 - |f_a - f_b| / (f_a + f_b), f the share of each network's clustered units that is in the cluster: 1
            where both contribute alike, 0 where one contributes nothing.
        within: Correlation inside the cluster.
        within_a: Of units of a with each other.
        within_b: Of units of b with each other.
        between: Of units of a with units of b.
        outside: Of units of the cluster with units of other clusters or of none.
        dimensions_a: Dimension of the subspace that units of a span over the samples, int64.
        dimensions_b: The same for b, int64.
        subspace: Mean squared cosine of the canonical angles between these subspaces: 1 where one contains the other.
        chance: Expected `subspace` of unrelated units, max(dimensions) / (samples - 1), at most 1.
        explained: Mean over all units of the cluster of R², each from the units of the other network, by least squares;
            by chance about dimensions / (samples - 1).
        one_to_one: Mean r² of the best one-to-one matching inside the cluster.
        cosines: Cosines of the canonical angles, largest first, for each cluster (smaller dimension,).
        samples: How many samples all this was measured on.
        constant_a: Units of a that are in a cluster but do not vary on these samples; they count as units only.
        constant_b: The same for b.
    """

    units_a: Tensor
    units_b: Tensor
    evenness: Tensor
    within: Tensor
    within_a: Tensor
    within_b: Tensor
    between: Tensor
    outside: Tensor
    dimensions_a: Tensor
    dimensions_b: Tensor
    subspace: Tensor
    chance: Tensor
    explained: Tensor
    one_to_one: Tensor
    cosines: tuple[Tensor, ...]
    samples: int
    constant_a: tuple[int, ...]
    constant_b: tuple[int, ...]

    @property
    def basis_gap(self) -> Tensor:
        """`subspace` - `one_to_one`: high where both networks span one subspace with different units.

        It can be negative: units that share one strong direction match well, whatever their other directions do.
        """
        return self.subspace - self.one_to_one

    @property
    def corrected(self) -> Tensor:
        """`subspace` with chance taken away, (subspace - chance) / (1 - chance): 0 by chance, 1 for equal subspaces."""
        corrected = (self.subspace - self.chance) / (1 - self.chance)
        return corrected.where(self.chance < 1, torch.nan)

    def rows(self) -> list[dict[str, Any]]:
        """Give a table with a row for each cluster."""
        columns = [getattr(self, name).tolist() for name in _COLUMNS]
        table = enumerate(zip(*columns, strict=True))
        return [{"cluster": cluster, **dict(zip(_COLUMNS, row, strict=True))} for cluster, row in table]

    def to_dict(self) -> dict[str, Any]:
        """Give the table and the cosines as plain lists and numbers for JSON; NaN becomes None."""
        content = {"clusters": self.rows(), "cosines": self.cosines, "samples": self.samples}
        return plain(content | {"constant_a": self.constant_a, "constant_b": self.constant_b})


@dataclass(frozen=True, eq=False)
class _Joint:
    """Correlations of all units of both layers that vary, those of a first, and to which cluster each belongs."""

    correlation: Tensor
    labels: Tensor
    from_b: Tensor
    samples: int
    rounding: float


def cluster_scores(clusters: Clusters, moments: Moments, a: str, b: str) -> ClusterScores:
    """Measure how evenly two networks share clusters of units, and whether their units span the same subspaces.

    Canonical angles (Hotelling 1936) are those between the spans of the units of a and of b over the samples, after
    centring, read off moments: with the correlation matrices R_a = V_a diag(λ_a) V_aᵀ and R_b of the cluster, the
    cosines are the singular values of λ_a^(-1/2) V_aᵀ R_ab V_b λ_b^(-1/2). Directions with less than max(units · ε,
    1e-12) of the largest λ count as rounding. "Same subspace, different basis" (Li et al. 2015) is a high `subspace`
    with a low `one_to_one`.

    Chance does not count that the clusters were chosen by these correlations: find clusters on some samples and score
    them on others.

    Args:
        clusters: Of the units of both layers.
        moments: With the pairs (a, a), (b, b) and (a, b); of any samples, the same units.
        a: Name of the first layer.
        b: Name of the second layer.

    Returns:
        The scores, with a warning where a cluster has no fewer units than there are samples: it then spans everything.

    Raises:
        DataError: The layers have other numbers of units than the clusters.
        LayerNotFoundError: The moments lack a layer, or a pair was not kept.

    >>> from .clusters import spectral_clusters
    >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments()
    >>> moments.update({"a": x, "b": x @ torch.tensor([[1.0, 1.0], [-1.0, 1.0]])})
    >>> found = cluster_scores(spectral_clusters(moments, "a", "b", clusters=1), moments, "a", "b")
    >>> [round(float(score), 2) for score in (found.subspace, found.one_to_one, found.basis_gap)]
    [1.0, 0.5, 0.5]
    """
    joint, constant = _joint(clusters, moments, a, b)
    for layer, side in ((a, False), (b, True)):
        sizes = torch.bincount(joint.labels[(joint.labels >= 0) & (joint.from_b == side)], minlength=1)
        warn_few_samples(
            joint.samples,
            int(sizes.max()),
            layer,
            "in one cluster; they span everything, and share it with any other unit",
        )
    found = [_scored(joint, cluster) for cluster in range(clusters.count)]
    columns = {name: _column([row[name] for row, _ in found]) for name in found[0][0]}
    units_a, units_b = clusters.sizes.T
    share_a, share_b = (units.double() / units.sum().clamp(min=1) for units in (units_a, units_b))
    return ClusterScores(
        units_a=units_a,
        units_b=units_b,
        evenness=1 - (share_a - share_b).abs() / (share_a + share_b),
        cosines=tuple(cosines for _, cosines in found),
        samples=joint.samples,
        constant_a=constant[0],
        constant_b=constant[1],
        **columns,
    )


def _joint(clusters: Clusters, moments: Moments, a: str, b: str) -> tuple[_Joint, list[tuple[int, ...]]]:
    varying, labels, constant = [], [], []
    for layer, label in ((a, clusters.labels_a), (b, clusters.labels_b)):
        varies = (moments.variance(layer) > 0).cpu()
        if len(varies) != len(label):
            raise DataError(
                f"layer {layer!r} has {len(varies)} units, but {len(label)} were clustered; pass moments of the same "
                "layers"
            )
        varying.append(varies.nonzero().flatten())
        labels.append(label[varies])
        constant.append(tuple(((label >= 0) & ~varies).nonzero().flatten().tolist()))
    rows = [
        torch.cat([moments.correlation(x, y).cpu()[varying[i]][:, varying[j]] for j, y in enumerate((a, b))], 1)
        for i, x in enumerate((a, b))
    ]
    from_b = torch.arange(len(varying[0]) + len(varying[1])) >= len(varying[0])
    rounding = torch.finfo(moments.product_dtype).eps
    return _Joint(torch.cat(rows), torch.cat(labels), from_b, moments.count(a), rounding), constant


def _scored(joint: _Joint, cluster: int) -> tuple[dict[str, float | int], Tensor]:
    inside = joint.labels == cluster
    of_a, of_b = inside & ~joint.from_b, inside & joint.from_b
    between = joint.correlation[of_a][:, of_b]
    row: dict[str, float | int] = {
        "within": _mean_pairs(joint.correlation[inside][:, inside]),
        "within_a": _mean_pairs(joint.correlation[of_a][:, of_a]),
        "within_b": _mean_pairs(joint.correlation[of_b][:, of_b]),
        "between": float(between.abs().mean()),
        "outside": float(joint.correlation[inside][:, ~inside].abs().mean()),
    }
    (axes_a, scale_a), (axes_b, scale_b) = (_subspace(joint, units) for units in (of_a, of_b))
    dimensions = len(scale_a), len(scale_b)
    predicted_b = (axes_a.T @ between) / scale_a[:, None]  # correlations of units of b with orthonormal axes of a
    predicted_a = (between @ axes_b) / scale_b
    # Rounding can leave more than 1.
    cosines = torch.linalg.svdvals((predicted_b @ axes_b) / scale_b).clamp(max=1)
    row |= {
        "dimensions_a": dimensions[0],
        "dimensions_b": dimensions[1],
        "subspace": float(cosines.square().mean()),
        "chance": min(1.0, max(dimensions) / (joint.samples - 1)) if min(dimensions) else torch.nan,
        "explained": torch.nan,
        "one_to_one": torch.nan,
    }
    if min(dimensions):
        explained = torch.cat([predicted_b.square().sum(0), predicted_a.square().sum(1)])
        row["explained"] = float(explained.clamp(max=1).mean())
        row["one_to_one"] = _matched(between)
    return row, cosines


def _column(values: list[float | int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64 if isinstance(values[0], int) else torch.float64)


def _subspace(joint: _Joint, units: Tensor) -> tuple[Tensor, Tensor]:
    inside = joint.correlation[units][:, units]
    if not len(inside):
        return inside.new_zeros(0, 0), inside.new_zeros(0)
    values, axes = torch.linalg.eigh((inside + inside.T) / 2)
    rank = int((values > max(len(values) * joint.rounding, _ROUNDING) * values[-1]).sum())
    rank = min(rank, joint.samples - 1)
    return axes[:, -rank:], values[-rank:].sqrt()


def _mean_pairs(correlation: Tensor) -> float:
    pairs = len(correlation) * (len(correlation) - 1)
    return float(correlation.abs().fill_diagonal_(0).sum()) / pairs if pairs else torch.nan


def _matched(correlation: Tensor) -> float:
    from scipy.optimize import linear_sum_assignment

    squares = correlation.square().clamp_(max=1)
    return float(squares[linear_sum_assignment(squares.numpy(), maximize=True)].mean())
