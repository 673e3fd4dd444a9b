"""How much each unit of one representation has to do with each unit of another: correlation and information."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arrays import as_pair, centred
from .joint_counts import JointCounts, check_bins, quantile_edges

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_BLOCK = 1 << 24


def unit_correlation(x: Tensor | ArrayLike, y: Tensor | ArrayLike) -> Tensor:
    """Compute Pearson's correlation of each unit of x with each unit of y (Li et al. 2015, section 3).

    For activations that come in batches `Moments.correlation` gives the same.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.

    Returns:
        (units of x x units of y) in float64; NaN for units that do not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least two.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.tensor([[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]])
    >>> unit_correlation(x, -x[:, :1])
    tensor([[-1.0000],
            [    nan]], dtype=torch.float64)
    """
    x, y = as_pair(x, y, "a correlation")
    with torch.no_grad():
        return _unit_norm(centred(x)).T @ _unit_norm(centred(y))


def _unit_norm(x: Tensor) -> Tensor:
    x = x / x.abs().amax(0)  # its squares then stay within float64
    return x / x.norm(dim=0)


def mutual_information(
    x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, bins: int = 10, corrected: bool = False
) -> Tensor:
    """Estimate the mutual information of each unit of x with each unit of y (Li et al. 2015, section 3).

    Each unit is cut into bins of equal frequency over all samples, see `quantile_edges`; for the estimate, its bias and
    activations that come in batches see `JointCounts`. Increasing functions of a unit leave its information as it is.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        bins: For each unit.
        corrected: Subtract the first-order bias (Miller & Madow).

    Returns:
        (units of x x units of y) in nats (divide by log 2 for bits), float64; 0 for units that do not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least as many as bins.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.arange(40.0)[:, None]
    >>> mutual_information(x, torch.cat([x.exp(), -x, x.remainder(2)], 1), bins=4)  # log 4, log 4, 0
    tensor([[1.3863, 1.3863, 0.0000]], dtype=torch.float64)
    """
    check_bins(bins)
    x, y = as_pair(x, y, f"an estimate with {bins} bins", bins)
    edges = {"x": quantile_edges(x, bins), "y": quantile_edges(y, bins)}
    several = max(1, _BLOCK // (y.shape[1] * bins * bins))
    parts = []
    for units, cuts in zip(x.split(several, 1), edges["x"].split(several), strict=True):
        counts = JointCounts([("x", "y")], bins=bins, edges=edges | {"x": cuts})
        counts.update({"x": units, "y": y})
        parts.append(counts.mutual_information("x", "y", corrected=corrected))
    return torch.cat(parts)
