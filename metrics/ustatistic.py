"""The unbiased HSIC₁ of Song et al. (2012) as a product of two centred kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 4
"""The fewest samples that HSIC₁ is defined for."""


def rbf_from_products(products: Tensor, bandwidth: float, units: int) -> None:
    """Turn the products of centred samples into their RBF kernel exp(−d²/(2σ²)), in place.

    Args:
        products: x xᵀ of centred samples x units, (n x n).
        bandwidth: σ in units of the median distance over all n² entries of the matrix of distances, its zero diagonal
            included, as in the code of Kornblith et al. (2019).
        units: Units of x; they set what counts as a rounding error.

    A median distance of zero, up to rounding, leaves NaN: the kernel is undefined.

    >>> products = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    >>> rbf_from_products(products, bandwidth=1.0, units=1)
    >>> products
    tensor([[1.0000, 0.3679],
            [0.3679, 1.0000]])
    """
    norms = products.diagonal().clone()
    squares = products.mul_(-2).add_(norms).add_(norms[:, None]).clamp_min_(0)
    squares.fill_diagonal_(0)
    entries = squares.flatten()
    middle = entries.numel() // 2
    # torch gives the lower of the two middle values where the median is their mean.
    median = entries.kthvalue(middle + 1).values
    if entries.numel() % 2 == 0:
        median = (median + entries.kthvalue(middle).values) / 2
    # Equal samples far from the mean have a distance of rounding errors, which must not set the bandwidth.
    rounding = 4 * units**0.5 * torch.finfo(products.dtype).eps * norms.max()
    median = torch.where(median > rounding, median, math.nan)
    squares.div_(-2 * bandwidth**2 * median).exp_()


def centre_off_diagonal(kernel: Tensor) -> None:
    """U-centre in place: rows and columns sum to zero over the off-diagonal (Székely & Rizzo 2014, equation 2.1).

    The products of two such matrices sum to n(n−3) HSIC₁, and no large sums are subtracted.

    >>> x = torch.arange(5.0)[:, None]
    >>> kernel = x @ x.T
    >>> centre_off_diagonal(kernel)
    >>> bool(kernel.sum(0).abs().max() < 1e-5)
    True
    """
    n = len(kernel)
    kernel.fill_diagonal_(0)
    rows = kernel.sum(1, dtype=torch.float64)
    total = rows.sum() / ((n - 1) * (n - 2))
    half = (rows / (n - 2) - total / 2).to(kernel.dtype)
    kernel.sub_(half).sub_(half[:, None]).fill_diagonal_(0)
