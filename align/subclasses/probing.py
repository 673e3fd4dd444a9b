"""Cluster-and-linear-probe: how far clusters can stand in for the fine labels that a network never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from .agreement import Agreement, agreement
from .finding import Subclasses, subclasses
from .labelled import as_features, as_labels
from .linear_probe import LinearProbe, Scale, linear_probe
from .tables import contingency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class ClusterProbe:
    """A linear probe that was trained on clusters, beside one that was trained on fine labels.

    Attributes:
        accuracy: Share of the test samples whose fine label the probe of clusters predicts; its clusters are named on
            the training data.
        oracle: The same of the probe that was trained on the fine labels.
        table: (fine labels x fine labels) int64, test samples by their label and by the probe of clusters.
        agreement: Clusters and fine labels on the training data.
        found: The clusters.
        probe: The probe of clusters; a label is a cluster.
        oracle_probe: The probe of fine labels.
    """

    accuracy: float
    oracle: float
    table: Tensor
    agreement: Agreement
    found: Subclasses
    probe: LinearProbe
    oracle_probe: LinearProbe

    def __repr__(self) -> str:
        return (
            f"ClusterProbe(accuracy {self.accuracy:.3f}, oracle {self.oracle:.3f}, purity {self.agreement.purity:.3f})"
        )

    @property
    def gap(self) -> float:
        """How far the clusters fall short of the fine labels: `oracle` - `accuracy`."""
        return self.oracle - self.accuracy

    def predict(self, features: Tensor | ArrayLike) -> Tensor:
        """Give the fine label of each sample, (samples,) int64: the most probable, clusters of one label added up.

        Raises:
            DataError: The features have another number of units.
            NotFiniteError: They hold NaN or infinity.
        """
        return _predicted(self.probe, self.agreement, features)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the test samples by fine label and by the probe of clusters, each row coloured by its shares.

        Args:
            ax: Where to draw. Default: a new figure.

        Returns:
            The axes.
        """
        from .pictures import matrix

        names, same = self.agreement.fine_names, torch.zeros(len(self.table))
        return matrix(ax, self.table, names, names, ("fine label", "predicted by the probe of clusters"), same)

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as plain lists and numbers for JSON."""
        own = {name: getattr(self, name) for name in ("accuracy", "oracle", "gap", "table")}
        fits = {
            name: {"loss": probe.loss, "steps": probe.steps, "converged": probe.converged}
            for name, probe in (("probe", self.probe), ("oracle_probe", self.oracle_probe))
        }
        clusters = {"method": self.found.method, "counts": self.found.counts}
        return plain({**own, "agreement": self.agreement.to_dict(), "found": clusters, **fits})


def cluster_and_probe(
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    fine: Tensor | ArrayLike,
    test_features: Tensor | ArrayLike,
    test_fine: Tensor | ArrayLike,
    *,
    found: Subclasses | None = None,
    fine_names: Sequence[str] | None = None,
    scale: Scale = "whiten",
    penalty: float = 1e-2,
    **how: Any,
) -> ClusterProbe:
    """Train a linear probe on clusters instead of labels (Yang, Steinhardt & Hu 2023, section 4.2).

    Each class is clustered; a linear probe learns from the training features which cluster a sample is in; each cluster
    is named after the fine label that it is matched with on the training data; the names are tested against the true
    fine labels of other samples. The fine labels serve to name clusters, and to train the oracle beside it.

    Args:
        features: Training samples x units, frozen.
        labels: (training samples,) the class of each, from 0; what the network was trained on.
        fine: (training samples,) its fine label, from 0.
        test_features: Test samples x units.
        test_fine: (test samples,) the fine label of each.
        found: Clusters of the training features, from `subclasses`. Default: found here.
        fine_names: Name of each fine label. Default: its number.
        scale: How both probes scale the features, see `linear_probe`.
        penalty: Of both probes.
        how: Other arguments of `subclasses`, where `found` is not given.

    Raises:
        DataError: Lengths or numbers of units differ; a test label has no name; or see `subclasses`, `linear_probe`.
        NotFiniteError: Features hold NaN or infinity.

    >>> generator = torch.Generator().manual_seed(0)
    >>> fine = torch.arange(120) % 4
    >>> x = 10 * torch.eye(4)[fine] + torch.randn(120, 4, generator=generator)
    >>> found = cluster_and_probe(x, fine // 2, fine, x, fine, count=2, project="pca")
    >>> found.accuracy, found.oracle
    (1.0, 1.0)
    """
    x, y = as_features(features), as_features(test_features, "test_features")
    fine, test_fine = as_labels(fine, len(x), "fine"), as_labels(test_fine, len(y), "test_fine")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"features have shape {tuple(x.shape)}, test_features {tuple(y.shape)}: other units")
    coarse = as_labels(labels, len(x))
    found = _given(found, coarse, how) if found is not None else subclasses(x, coarse, **how)
    agreed = agreement(found, fine, fine_names=fine_names)
    count = len(agreed.fine_names)
    if int(test_fine.max()) >= count:
        raise DataError(f"test_fine goes up to {int(test_fine.max())}, the fine labels of training to {count - 1}")
    known = found.labels >= 0
    probe = linear_probe(x[known.to(x.device)], found.labels[known], scale=scale, penalty=penalty)
    oracle = linear_probe(x, fine, scale=scale, penalty=penalty)
    table = contingency(test_fine, _predicted(probe, agreed, y), count, count)
    accuracy = int(table.diagonal().sum()) / len(y)
    return ClusterProbe(accuracy, oracle.accuracy(y, test_fine), table, agreed, found, probe, oracle)


def _given(found: Subclasses, coarse: Tensor, how: dict[str, Any]) -> Subclasses:
    if how:
        raise DataError(f"{', '.join(how)} was given beside `found`, whose clusters are there already; leave it out")
    if not torch.equal(found.coarse, coarse):
        raise DataError(f"found is of {len(found.coarse)} samples with other classes than the {len(coarse)} labels")
    return found


def _predicted(probe: LinearProbe, agreed: Agreement, features: Tensor | ArrayLike) -> Tensor:
    shares = probe.logits(features).softmax(1).cpu()
    labels = agreed.named()[probe.names]
    return shares.new_zeros(len(shares), len(agreed.fine_names)).index_add_(1, labels, shares).argmax(1)
