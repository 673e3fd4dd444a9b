"""What is known only once the class means are: the nearest mean of each sample, and its deviation along their span."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.errors import DataError
from .class_moments import ClassMoments, check_labels
from .span import Span

_PIECE = 1 << 22
"""Entries of features that are held in float64 at a time."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear classifier in float64.

    Attributes:
        weight: (classes x units).
        bias: (classes,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def decide(self, features: Tensor) -> Tensor:
        """Give the class of the largest logit of each sample, (samples,)."""
        return torch.nn.functional.linear(features, self.weight, self.bias).argmax(1)


@dataclass(frozen=True, eq=False)
class Decisions:
    """Counts of a second reading of the features.

    Attributes:
        samples: Number of samples.
        within: Mean squared deviation from the mean of the class along each direction of the span, (directions,).
        nearest_right: Samples that are nearest to the mean of their class.
        agreeing: Samples whose nearest class mean is the classifier's decision; None without a classifier.
        right: Samples that the classifier puts into their class; None without one.
    """

    samples: int
    within: Tensor
    nearest_right: int
    agreeing: int | None
    right: int | None

    def shares(self) -> dict[str, Any]:
        """Give NC4 and the two accuracies by name."""
        counts = {"nc4": self.agreeing, "ncm_accuracy": self.nearest_right, "accuracy": self.right}
        return {name: None if count is None else count / self.samples for name, count in counts.items()}


def decide(
    rows: Iterable[tuple[Tensor, Tensor]], moments: ClassMoments, found: Span, classifier: Classifier | None = None
) -> Decisions:
    """Read features a second time, with the class means known.

    Which mean is nearest shows in the span of the means alone, so both the distances and the deviations that NC1 needs
    come from one product of samples x units x (K - 1). Ties go to the class of the smaller number.

    Args:
        rows: Blocks of features with their labels, those that the moments are of.
        moments: Of every class.
        found: The span of their means.
        classifier: Whose decisions to compare with the nearest means.

    Raises:
        DataError: The rows are not the samples of the moments.
    """
    centre, means = moments.mean(), moments.centred_means() @ found.directions.T
    counts = torch.zeros(moments.classes, dtype=torch.int64, device=moments.device)
    within = means.new_zeros(len(found.directions))
    nearest_right = agreeing = right = 0
    for features, labels in _pieces(rows, moments):
        wide = features.to(torch.float64)
        inside = (wide - centre) @ found.directions.T
        nearest = (means.square().sum(1) - 2 * (inside @ means.T)).argmin(1)
        nearest_right += int((nearest == labels).sum())
        within += (inside - means[labels]).square_().sum(0)
        counts += labels.bincount(minlength=moments.classes)
        if classifier is not None:
            chosen = classifier.decide(wide)
            agreeing += int((chosen == nearest).sum())
            right += int((chosen == labels).sum())
    if not torch.equal(counts, moments.counts):
        raise DataError(
            f"rows hold {int(counts.sum())} samples, or other labels than the {moments.samples} samples of the "
            "moments; pass the same features and labels again"
        )
    both = (None, None) if classifier is None else (agreeing, right)
    return Decisions(moments.samples, within / moments.samples, nearest_right, *both)


def _pieces(rows: Iterable[tuple[Tensor, Tensor]], moments: ClassMoments) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(_PIECE // moments.units, 1)
    for features, labels in rows:
        if features.ndim != 2 or features.shape[1] != moments.units:
            raise DataError(
                f"rows have shape {tuple(features.shape)}; expected samples x {moments.units} units, as in the moments"
            )
        check_labels(labels, len(features), moments.classes)
        labels = labels.to(moments.device, torch.int64)
        for start in range(0, len(features), step):
            yield features[start : start + step].to(moments.device), labels[start : start + step]
