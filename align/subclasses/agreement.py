"""How well clusters inside classes agree with finer labels that they were found without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from .finding import Subclasses, subclasses
from .labelled import as_labels
from .tables import adjusted_rand, contingency, matched, normalised_information

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Agreement:
    """Clusters beside fine labels. Samples in no cluster count as wrong, and as one more cluster of their class.

    Attributes:
        purity: Share of the samples whose fine label is the most frequent one of their cluster. More clusters make it
            larger, whatever they are.
        matched_accuracy: Share of the samples whose fine label is the one that their cluster is matched with: one to
            one inside each class, so that it is largest.
        chance: Purity of one cluster for each class.
        ari: Adjusted Rand index over all samples; as the classes are given, it is far above 0 by chance.
        nmi: Normalised mutual information (arithmetic mean) over all samples; likewise.
        within_ari: Mean over the samples of `class_ari`: 0 by chance.
        class_purity: (classes,) float64, purity inside each class.
        class_ari: (classes,) float64, adjusted Rand index inside each class.
        class_nmi: (classes,) float64, normalised mutual information inside each class.
        table: (clusters x fine labels) int64, the number of samples of each.
        classes: (clusters,) int64, the class of each cluster.
        matching: (clusters,) int64, the fine label that each cluster is matched with; -1 for none.
        majority: (clusters,) int64, the most frequent fine label of each cluster.
        fine_names: Name of each fine label.
        samples: How many samples all this was counted on.
    """

    purity: float
    matched_accuracy: float
    chance: float
    ari: float
    nmi: float
    within_ari: float
    class_purity: Tensor
    class_ari: Tensor
    class_nmi: Tensor
    table: Tensor
    classes: Tensor
    matching: Tensor
    majority: Tensor
    fine_names: tuple[str, ...]
    samples: int

    def __repr__(self) -> str:
        return (
            f"Agreement(purity {self.purity:.3f}, matched accuracy {self.matched_accuracy:.3f}, chance "
            f"{self.chance:.3f}, ARI inside classes {self.within_ari:.3f}; {self.samples} samples)"
        )

    def named(self) -> Tensor:
        """Give the fine label that each cluster stands for: its match, or the most frequent one, (clusters,) int64."""
        return torch.where(self.matching >= 0, self.matching, self.majority)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the table of clusters and fine labels, each row coloured by its shares.

        Args:
            ax: Where to draw. Default: a new figure.

        Returns:
            The axes.
        """
        from .pictures import matrix

        shown = self.table.any(0).nonzero().flatten()
        rows = [f"class {name}, cluster {place}" for place, name in enumerate(self.classes.tolist())]
        columns = [self.fine_names[label] for label in shown.tolist()]
        return matrix(ax, self.table[:, shown], rows, columns, ("cluster", "fine label"), self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain lists and numbers for JSON."""
        return plain(dict(vars(self)))


def agreement(
    found: Subclasses | Tensor,
    fine: Tensor | ArrayLike,
    *,
    coarse: Tensor | ArrayLike | None = None,
    fine_names: Sequence[str] | None = None,
) -> Agreement:
    """Compare clusters with fine labels (Yang, Steinhardt & Hu 2023, section 4).

    Args:
        found: From `subclasses`; or (samples,) cluster numbers, -1 for none, no cluster in two classes.
        fine: (samples,) fine labels, from 0.
        coarse: (samples,) the class of each sample, with cluster numbers only. Default: one class.
        fine_names: Name of each fine label. Default: its number.

    Raises:
        DataError: Lengths differ, a label is out of range, or a cluster has samples of two classes.

    >>> found = agreement(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([7, 7, 3, 3, 3, 3]))
    >>> round(found.purity, 3), round(found.matched_accuracy, 3), found.matching.tolist()
    (0.833, 0.833, [7, 3])
    """
    labels, groups, classes = _read(found, coarse)
    fine = as_labels(fine, len(labels), "fine")
    names = _names(fine, fine_names)
    table = contingency(labels, fine, len(classes), len(names))
    matching = torch.full((len(classes),), -1)
    whole: list[Tensor] = []
    for name in groups.unique().tolist():
        rows = (classes == name).nonzero().flatten()
        taken, columns = matched(table[rows])
        # A match without a sample is none.
        matching[rows[taken]] = torch.where(table[rows[taken], columns] > 0, columns, -1)
        without = fine[(groups == name) & (labels < 0)]
        whole.append(torch.cat([table[rows], torch.bincount(without, minlength=len(names))[None]]))
    return _scored(table, whole, classes, matching, names)


def agreements(
    features: Mapping[str, Tensor | ArrayLike],
    labels: Tensor | ArrayLike,
    fine: Tensor | ArrayLike,
    *,
    fine_names: Sequence[str] | None = None,
    **how: Any,
) -> dict[str, Agreement]:
    """Cluster several features of the same samples in one and the same way, and compare each with fine labels.

    Clusters inside a collapsed class say something of the network only where they beat those of the raw inputs.

    Args:
        features: By name, each samples x units, or images; say of a network, and the inputs themselves.
        labels: (samples,) the class of each sample.
        fine: (samples,) fine labels, from 0.
        fine_names: Name of each fine label. Default: its number.
        how: Other arguments of `subclasses`.

    Raises:
        DataError: There are no features, or see `subclasses`.
        NotFiniteError: See `subclasses`.

    >>> generator = torch.Generator().manual_seed(0)
    >>> fine = torch.arange(60) % 2
    >>> noise = torch.randn(60, 3, generator=generator)
    >>> features = {"signal": noise + 9 * fine[:, None], "noise": noise}
    >>> found = agreements(features, 0 * fine, fine, count=2, project="pca")
    >>> {name: round(one.purity, 2) for name, one in found.items()}
    {'signal': 1.0, 'noise': 0.5}
    """
    if not features:
        raise DataError("there are no features to cluster; give some by name")
    return {
        name: agreement(subclasses(values, labels, **how), fine, fine_names=fine_names)
        for name, values in features.items()
    }


def _read(found: Subclasses | Tensor, coarse: Tensor | ArrayLike | None) -> tuple[Tensor, Tensor, Tensor]:
    """Give the cluster and the class of each sample, and the class of each cluster."""
    if isinstance(found, Subclasses):
        if coarse is not None:
            raise DataError("coarse was given beside Subclasses, which know the classes; leave it out")
        return found.labels, found.coarse, found.classes
    samples = len(found) if isinstance(found, Tensor) and found.ndim else 0
    labels = as_labels(found, samples, "found", least=-1)
    if not (labels >= 0).any():
        raise DataError(f"found has {samples} entries, none of them a cluster; expected cluster numbers from 0")
    groups = torch.zeros_like(labels) if coarse is None else as_labels(coarse, samples, "coarse")
    classes = torch.zeros(int(labels.max()) + 1, dtype=torch.int64)
    known = labels >= 0
    classes[labels[known]] = groups[known]
    if not bool((classes[labels[known]] == groups[known]).all()):
        wrong = int(labels[known][classes[labels[known]] != groups[known]][0])
        raise DataError(f"cluster {wrong} has samples of several classes; number the clusters of each class apart")
    return labels, groups, classes


def _names(fine: Tensor, names: Sequence[str] | None) -> tuple[str, ...]:
    needed = int(fine.max()) + 1
    if names is None:
        return tuple(map(str, range(needed)))
    if len(names) < needed:
        raise DataError(f"fine_names has {len(names)} names, but fine labels go up to {needed - 1}")
    return tuple(names)


def _scored(
    table: Tensor, whole: Sequence[Tensor], classes: Tensor, matching: Tensor, names: tuple[str, ...]
) -> Agreement:
    """Read the scores off the tables of the classes, whose last rows are the samples in no cluster."""
    samples = int(sum(part.sum() for part in whole))
    sizes = torch.stack([part.sum() for part in whole]).double()
    pure = torch.stack([part[:-1].amax(1).sum() for part in whole])
    rows = (matching >= 0).nonzero().flatten()
    class_ari = torch.tensor([adjusted_rand(part) for part in whole], dtype=torch.float64)
    everything = torch.cat(list(whole))
    return Agreement(
        purity=int(pure.sum()) / samples,
        matched_accuracy=int(table[rows, matching[rows]].sum()) / samples,
        chance=int(sum(part.sum(0).max() for part in whole)) / samples,
        ari=adjusted_rand(everything),
        nmi=normalised_information(everything),
        within_ari=float((class_ari * sizes).sum() / samples),
        class_purity=pure.double() / sizes,
        class_ari=class_ari,
        class_nmi=torch.tensor([normalised_information(part) for part in whole], dtype=torch.float64),
        table=table,
        classes=classes,
        matching=matching,
        majority=table.argmax(1),
        fine_names=names,
        samples=samples,
    )
