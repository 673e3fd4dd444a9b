"""Linear centred kernel alignment (CKA) between layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..base.errors import DataError, NotFiniteError
from .moments import Moments

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def cka(x: Tensor | ArrayLike, y: Tensor | ArrayLike) -> float:
    """Compute the linear CKA of two representations of the same samples (Kornblith et al. 2019, section 3).

    ‖Ycᵀ Xc‖²_F / (‖Xcᵀ Xc‖_F ‖Ycᵀ Yc‖_F) with centred columns: the biased estimator. Computed in float64, through
    samples x samples or units x units products, whichever are cheaper.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.

    Returns:
        Between 0 and 1, unclamped; NaN, with a warning, where a representation does not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least two, on one device.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(cka(x, 3 * x + 1), 6)
    1.0
    """
    x, y = _as_matrix(x, "x"), _as_matrix(y, "y")
    if x.device != y.device:
        raise DataError(f"x is on {x.device}, y on {y.device}; move them to one device")
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} samples (shape {tuple(x.shape)}), y has {len(y)} (shape {tuple(y.shape)})")
    if len(x) < 2:
        raise DataError(f"x and y have 1 sample (shapes {tuple(x.shape)} and {tuple(y.shape)}); CKA needs at least 2")
    with torch.no_grad():
        x, y = _centred(x, "x"), _centred(y, "y")
        if not (x.any() and y.any()):
            warnings.warn(f"{'y' if x.any() else 'x'} does not vary over the samples: CKA is NaN", stacklevel=2)
            return math.nan
        return _linear_cka(x, y)


def _as_matrix(values: Tensor | ArrayLike, name: str) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(np.ascontiguousarray(values))
        except (TypeError, ValueError) as error:
            raise DataError(f"{name} is no numeric array: {error}") from error
    if values.ndim != 2 or values.shape[1] == 0 or values.shape[0] == 0:
        raise DataError(f"{name} has shape {tuple(values.shape)}; expected samples x units, not empty: see as_samples")
    if not values.is_floating_point():
        raise DataError(f"{name} of shape {tuple(values.shape)} is {values.dtype}; expected floating point")
    return values


def _centred(values: Tensor, name: str) -> Tensor:
    if not values.isfinite().all():
        raise NotFiniteError(f"{name} of shape {tuple(values.shape)} holds NaN or infinity")
    values = values.to(torch.float64)
    # Relative to its first sample a constant column is exactly zero, and stays so.
    values = values - values[0]
    values -= values.mean(0)
    # CKA does not depend on scale, but squares of very large or very small values would leave float64.
    scale = values.abs().max()
    return values / scale if scale > 0 else values


def _linear_cka(x: Tensor, y: Tensor) -> float:
    n, p, q = len(x), x.shape[1], y.shape[1]
    if n * (p + q) < p * p + p * q + q * q:
        k, l = x @ x.T, y @ y.T  # noqa: E741
        return float((k * l).sum() / (k.norm() * l.norm()))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def cka_from_moments(moments: Moments, layers_a: Iterable[str], layers_b: Iterable[str]) -> Tensor:
    """Read the linear CKA of each layer with each other off their moments, without running a network again.

    ‖Σ_ab‖²_F / (‖Σ_aa‖_F ‖Σ_bb‖_F), the biased estimator in feature space (Kornblith et al. 2019, section 3).

    Args:
        moments: With all pairs (a, a), (b, b) and (a, b).
        layers_a: Layers of the rows.
        layers_b: Layers of the columns.

    Returns:
        (layers of a x layers of b) in float64; NaN, with a warning, for a layer that does not vary.

    Raises:
        LayerNotFoundError: A layer or a pair was not kept.
        DataError: There is only one sample.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> moments = Moments()
    >>> moments.update({"x": x, "relu": x.relu()})
    >>> cka_from_moments(moments, ["x"], ["x", "relu"])
    tensor([[1.0000, 0.7955]], dtype=torch.float64)
    """
    layers_a, layers_b = list(layers_a), list(layers_b)
    norms = {name: moments.covariance(name, name).norm() for name in dict.fromkeys((*layers_a, *layers_b))}
    for name, norm in norms.items():
        if moments.count(name) < 2:
            raise DataError(f"layer {name!r} has 1 sample; CKA needs at least 2")
        if norm == 0:
            warnings.warn(f"layer {name!r} does not vary over the samples: its CKA is NaN", stacklevel=2)
    rows = [
        torch.stack([moments.covariance(a, b).square().sum() / (norms[a] * norms[b]) for b in layers_b])
        for a in layers_a
    ]
    return torch.stack(rows)
