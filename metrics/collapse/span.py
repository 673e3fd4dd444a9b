"""The directions that the means of classes span."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .class_moments import ClassMoments

_ROUNDING = 1e-14
"""Of the spread inside the classes: more than the means of a class are off by in float64."""


@dataclass(frozen=True, eq=False)
class Span:
    """Eigenvectors of the between-class covariance Σ_B.

    Attributes:
        directions: Orthonormal, (min(K - 1, units) x units), those of the largest variance first.
        variances: Eigenvalues of Σ_B, (min(K - 1, units),).
        rank: How many of them are more than rounding.
    """

    directions: Tensor
    variances: Tensor
    rank: int


def span(moments: ClassMoments, weighted: bool = False, rtol: float = 1e-6) -> Span:
    """Find the eigenvectors of Σ_B from the class means themselves, without squaring: (units x units) is never made.

    Args:
        moments: Of every class.
        weighted: Whether Σ_B counts classes by their share of the samples.
        rtol: Singular values of the means up to this share of the largest count as zero.

    >>> moments = ClassMoments(3, covariance=False)
    >>> moments.update(torch.tensor([[2.0, 0.0], [0.0, 0.0], [-2.0, 0.0]]), torch.tensor([0, 1, 2]))
    >>> span(moments).rank
    1
    """
    rows = moments.centred_means(weighted) * moments.weights(weighted).sqrt()[:, None]
    if len(rows) <= moments.units:
        # A triangular factor first: faster where there are many more units than classes, and as accurate.
        q, r = torch.linalg.qr(rows.T)
        _, s, vt = torch.linalg.svd(r.T)
        vt = vt @ q.T
    else:
        _, s, vt = torch.linalg.svd(rows, full_matrices=False)
    least = min(moments.classes - 1, moments.units)
    s, vt = s[:least], vt[:least]
    # Means that coincide differ by the rounding of float64 still.
    rounding = _ROUNDING * moments.within_trace() ** 0.5
    return Span(vt, s.square(), int((s > max(rtol * float(s[0]), rounding)).sum()))
