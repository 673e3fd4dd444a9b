"""Features in the directions in which the means of their classes are farthest apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.base.errors import DataError
from isthmus.metrics.collapse import ClassMoments
from isthmus.metrics.collapse.span import span


@dataclass(frozen=True, eq=False)
class MeansPlane:
    """Samples and class means in the directions in which the means are farthest apart.

    Attributes:
        points: (samples x dims), of the samples of the chosen classes.
        means: (classes x dims), of their means.
        rows: (classes x dims), of the rows of the classifier, scaled to the size of the means; None without any.
        samples: (samples,) int64, which samples these are.
        classes: (classes,) int64, the chosen classes.
        share: Share of the variance of the class means that these directions hold; 1 for three classes in a plane.
        inside: Share of the variance inside classes that they hold.
    """

    points: Tensor
    means: Tensor
    rows: Tensor | None
    samples: Tensor
    classes: Tensor
    share: float
    inside: float


def on_means(
    features: Tensor,
    labels: Tensor,
    *,
    classes: Sequence[int] | None = None,
    weight: Tensor | None = None,
    dims: int = 2,
) -> MeansPlane:
    """Project features on the principal directions of their class means (Papyan, Han & Donoho 2020, Figure 1).

    The means of three classes span a plane: there nothing of them is lost, and collapsed ones form an equilateral
    triangle. Of more classes the first directions hold a part, of a simplex of K classes dims/(K - 1).

    Args:
        features: Samples x units, floating-point.
        labels: (samples,), integers from 0.
        classes: The classes to show, two or more. Default: all that occur.
        weight: (classes x units), rows of the classifier on these features.
        dims: Directions, 2 or 3; fewer than two classes more give rise to are filled with zeros.

    Raises:
        DataError: There are not two classes to show, one of them has no sample, or a tensor does not fit.
        NotFiniteError: A feature is not finite.

    >>> corners = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2]])
    >>> found = on_means(corners.repeat(4, 1), torch.arange(12) % 3)
    >>> round(found.share, 6), [round(distance, 3) for distance in torch.pdist(found.means).tolist()]
    (1.0, [2.828, 2.828, 2.828])
    """
    if dims not in (2, 3):
        raise DataError(f"dims is {dims}; pictures have 2 or 3")
    if labels.ndim != 1 or len(labels) != len(features):
        raise DataError(f"labels of shape {tuple(labels.shape)} for features of shape {tuple(features.shape)}")
    features, labels = features.detach().cpu(), labels.cpu()
    shown = labels.unique() if classes is None else torch.tensor(list(classes))
    if len(shown) < 2 or len(shown.unique()) < len(shown):
        raise DataError(f"classes {shown.tolist()}: a plane of means needs two different classes or more")
    missing = [name for name in shown.tolist() if not bool((labels == name).any())]
    if missing:
        raise DataError(f"class {missing[0]} has no sample among the {len(labels)}; choose classes that have")
    chosen = torch.isin(labels, shown).nonzero().flatten()
    place = torch.full((int(labels.max()) + 1,), -1)
    place[shown] = torch.arange(len(shown))
    moments = ClassMoments(len(shown), covariance=False)
    moments.update(features[chosen], place[labels[chosen]])
    found = span(moments)
    directions = found.directions[:dims]
    directions = directions * torch.where(directions.sum(1, keepdim=True) < 0, -1.0, 1.0)
    points = (features[chosen].double() - moments.mean()) @ directions.T
    means = moments.centred_means() @ directions.T
    inside = float((points - means[place[labels[chosen]]]).square().sum()) / len(chosen)
    total, within = float(found.variances.sum()), moments.within_trace()
    return MeansPlane(
        points=_filled(points, dims),
        means=_filled(means, dims),
        rows=None if weight is None else _filled(_rows(weight, shown, directions, moments), dims),
        samples=chosen,
        classes=shown,
        share=float(found.variances[:dims].sum()) / total if total else float("nan"),
        inside=inside / within if within else float("nan"),
    )


def _rows(weight: Tensor, shown: Tensor, directions: Tensor, moments: ClassMoments) -> Tensor:
    if weight.ndim != 2 or weight.shape[1] != moments.units or len(weight) <= int(shown.max()):
        raise DataError(
            f"weight has shape {tuple(weight.shape)}; expected a row for each class up to {int(shown.max())}, of "
            f"{moments.units} units"
        )
    chosen = weight.detach().cpu().double()[shown]
    chosen = chosen - chosen.mean(0)
    return chosen @ directions.T * (moments.centred_means().norm() / chosen.norm())


def _filled(points: Tensor, dims: int) -> Tensor:
    return torch.nn.functional.pad(points, (0, dims - points.shape[1])).float()
