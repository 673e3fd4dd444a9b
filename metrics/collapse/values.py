"""Every number of neural collapse, read off class moments and, for NC4, the features themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.errors import ArchitectureError, DataError, NotFiniteError
from ...base.finite import all_finite
from .class_moments import ClassMoments
from .decisions import Classifier, Decisions, decide
from .geometry import class_distance_variance, duality, frame, minority_cosine, orthogonal_distance, uniformity
from .margins import one_vs_rest_margin
from .span import Span, span

Rows = Iterable[tuple[Tensor, Tensor]]
"""Blocks of features (samples x units) with their labels (samples,)."""


@dataclass(frozen=True)
class CollapseValues:
    """How far the features of one layer, and its classifier, have collapsed.

    A value is None where it was not measured, and NaN or infinite where it is undefined, as where all class means
    coincide. K is the number of classes, M holds the class means minus their mean, W the rows of the classifier.

    Attributes:
        classes: K.
        samples: Number of samples of all classes.
        features: Number of units.
        smallest_class: Samples of the smallest class.
        weighted: Whether classes count by their share of the samples in Σ_B and in the mean of M.
        rank: Dimensions that the class means span, at most K - 1.
        nc1: tr(Σ_W Σ_B⁺) / K (Papyan, Han & Donoho 2020, Figure 6).
        nc1_cheap: tr Σ_W / tr Σ_B: without an inverse, ruled by the directions in which the means are far apart.
        cdnv: Class-distance normalised variance, see `class_distance_variance` (Galanti et al. 2022).
        equinorm: Spread of the norms of M over their mean, NC2, see `Frame`.
        cosine_spread: Standard deviation of the cosines of M, NC2: the test of equal angles.
        cosine_mean: Mean cosine of M; close to -1/(K-1) almost by construction.
        equiangularity: Mean |cosine + 1/(K-1)| of M, NC2.
        simplex_distance: Distance of MᵀM from a simplex, both of norm 1, NC2.
        orthogonal_distance: The same of the means, not centred, from an orthogonal frame.
        uniformity: Mean of log(1 / distance) of the directions of M, see `uniformity`; means more than units + 1.
        uniformity_spread: Its standard deviation.
        margin: One-vs-rest margin of the directions of M, see `one_vs_rest_margin`.
        minority_cosine: Mean cosine of the small classes in M, see `minority_cosine`; None where classes are of a size.
        weight_equinorm: As `equinorm`, of W.
        weight_cosine_spread: As `cosine_spread`, of W.
        weight_simplex_distance: As `simplex_distance`, of W.
        weight_minority_cosine: As `minority_cosine`, of W: minority collapse.
        nc3: ‖W/‖W‖_F - M/‖M‖_F‖_F, self-duality.
        nc3_squared: Its square, as Papyan et al. draw it (Figure 5).
        nc3_uncentred: The same with the means as they are: what a classifier without bias may turn to.
        nc4: Share of the samples for which the classifier decides as the nearest class mean.
        ncm_accuracy: Share of the samples that are nearest to the mean of their class.
        accuracy: Share of the samples that the classifier puts into their class.
    """

    classes: int
    samples: int
    features: int
    smallest_class: int
    weighted: bool
    rank: int
    nc1: float | None
    nc1_cheap: float
    cdnv: float
    equinorm: float
    cosine_spread: float
    cosine_mean: float
    equiangularity: float
    simplex_distance: float
    orthogonal_distance: float
    uniformity: float
    uniformity_spread: float
    margin: float | None
    minority_cosine: float | None
    weight_equinorm: float | None = None
    weight_cosine_spread: float | None = None
    weight_simplex_distance: float | None = None
    weight_minority_cosine: float | None = None
    nc3: float | None = None
    nc3_squared: float | None = None
    nc3_uncentred: float | None = None
    nc4: float | None = None
    ncm_accuracy: float | None = None
    accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give the values by name for JSON; what is not finite, which JSON lacks, becomes None."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: float | int | bool | None) -> float | int | bool | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def collapse_of(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rows: Rows | None = None,
    weighted: bool = False,
    margin: bool | None = None,
    rtol: float = 1e-6,
) -> CollapseValues:
    """Measure neural collapse on class moments.

    Σ_W is pooled over all samples. Σ_B and the centre of the means count all classes alike, or each by its share of the
    samples if `weighted`; for classes of one size that is the same. Σ_B⁺ inverts Σ_B on the directions that the class
    means span, at most K - 1: those whose singular value, of the centred means, is more than `rtol` of the largest.

    Args:
        moments: Of the features, each class with two samples or more.
        weight: (K x units), rows of the classifier on these features: for NC3 and NC4.
        bias: (K,), its bias; None for none. It matters to NC4 alone.
        rows: The features that the moments are of, block by block, read a second time now that the means are known: for
            NC4 and the accuracies, and for NC1 where the moments hold no covariance. Without, these are None.
        weighted: Let classes count by their size.
        margin: Compute the one-vs-rest margin, which takes a while for many classes. Default: where there are more
            classes than units + 1, so that they cannot form a simplex.
        rtol: Singular values of the means up to this share of the largest are rounding.

    Raises:
        ArchitectureError: Weight or bias does not fit classes and units.
        DataError: A class has fewer than two samples; `rows` are not those of the moments.
        NotFiniteError: Weight or bias holds NaN or infinity.

    >>> corners = torch.eye(3, dtype=torch.float64) - 1 / 3
    >>> moments = ClassMoments(3)
    >>> moments.update(torch.cat([corners, corners]), torch.tensor([0, 1, 2, 0, 1, 2]))
    >>> values = collapse_of(moments, weight=7 * corners)
    >>> values.nc1 < 1e-12, values.cosine_spread < 1e-12, values.simplex_distance < 1e-12, values.nc3 < 1e-12
    (True, True, True, True)
    """
    classifier = None if weight is None else check_classifier(weight, bias, moments)
    moments.check_classes(2)
    with torch.no_grad():
        found = span(moments, weighted, rtol)
        read = None if rows is None else decide(rows, moments, found, classifier)
        # Means that coincide have no directions; those of their rounding would look like some.
        centred = moments.centred_means(weighted) * (1.0 if found.rank else 0.0)
        counts = moments.counts
        wanted = moments.classes > moments.units + 1 if margin is None else margin
        evenness = uniformity(centred)
        return CollapseValues(
            classes=moments.classes,
            samples=moments.samples,
            features=moments.units,
            smallest_class=int(counts.min()),
            weighted=weighted,
            rank=found.rank,
            nc1=_nc1(moments, found, read),
            nc1_cheap=moments.within_trace() / float(found.variances.sum()) if found.rank else math.nan,
            cdnv=class_distance_variance(centred, moments.variances),
            **asdict(frame(centred)),
            orthogonal_distance=orthogonal_distance(moments.means),
            uniformity=evenness[0],
            uniformity_spread=evenness[1],
            margin=one_vs_rest_margin(centred) if wanted else None,
            minority_cosine=minority_cosine(centred, counts),
            **({} if classifier is None else _of_classifier(classifier.weight, moments.means, centred, counts)),
            **({} if read is None else read.shares()),
        )


def _nc1(moments: ClassMoments, found: Span, read: Decisions | None) -> float | None:
    if not moments.covariance and read is None:
        return None
    if not found.rank:
        return math.nan
    directions = found.directions[: found.rank]
    if read is not None:
        within = read.within[: found.rank]
    else:
        within = torch.linalg.vecdot(directions @ moments.within(), directions)
    return float((within / found.variances[: found.rank]).sum()) / moments.classes


def _of_classifier(weight: Tensor, means: Tensor, centred: Tensor, counts: Tensor) -> dict[str, Any]:
    spread, apart = frame(weight), duality(weight, centred)
    return {
        "weight_equinorm": spread.equinorm,
        "weight_cosine_spread": spread.cosine_spread,
        "weight_simplex_distance": spread.simplex_distance,
        "weight_minority_cosine": minority_cosine(weight, counts),
        "nc3": apart,
        "nc3_squared": apart**2,
        "nc3_uncentred": duality(weight, means),
    }


def check_classifier(weight: Tensor, bias: Tensor | None, moments: ClassMoments) -> Classifier:
    """Refuse a classifier that does not fit the classes and units of some moments; it comes back in float64.

    Raises:
        ArchitectureError: A shape does not fit.
        NotFiniteError: It holds NaN or infinity.
    """
    expected = {"weight": (moments.classes, moments.units), "bias": (moments.classes,)}
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise ArchitectureError(
                f"the classifier's {name} has shape {tuple(tensor.shape)}; expected {expected[name]}, for "
                f"{moments.classes} classes and {moments.units} units: give the classes that the data has, and the "
                "layer that reads these features"
            )
        if tensor is not None and not all_finite(tensor):
            raise NotFiniteError(f"the classifier's {name} of shape {tuple(tensor.shape)} holds NaN or infinity")
    wide = [None if t is None else t.detach().to(moments.device, torch.float64) for t in (weight, bias)]
    assert wide[0] is not None
    return Classifier(wide[0], wide[1])


def collapse_values(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weighted: bool = False,
    margin: bool | None = None,
) -> CollapseValues:
    """Measure neural collapse on features that are in memory.

    Args:
        features: Samples x units, floating-point.
        labels: (samples,), integers from 0.
        classes: Their number K. Default: the rows of `weight`, else the largest label + 1.
        weight: (K x units), rows of the classifier on these features: for NC3 and NC4.
        bias: (K,), its bias.
        weighted: Let classes count by their size, see `collapse_of`.
        margin: Compute the one-vs-rest margin, see `collapse_of`.

    Raises:
        ArchitectureError: Weight or bias does not fit classes and units.
        DataError: Features or labels cannot be used, or a class has fewer than two samples.
        NotFiniteError: A tensor holds NaN or infinity.

    >>> generator = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(40) % 4
    >>> features = torch.eye(4)[labels] + 0.01 * torch.randn(40, 4, generator=generator)
    >>> values = collapse_values(features, labels, weight=torch.eye(4))
    >>> values.nc1 < 1e-3, values.nc4
    (True, 1.0)
    """
    if classes is None:
        classes = len(weight) if weight is not None else _count(labels)
    moments = ClassMoments(classes, covariance=False)
    moments.update(features, labels)
    return collapse_of(moments, weight, bias, rows=[(features, labels)], weighted=weighted, margin=margin)


def _count(labels: Tensor) -> int:
    if not labels.numel():
        raise DataError(f"labels have shape {tuple(labels.shape)}: there is no sample")
    return int(labels.max()) + 1
