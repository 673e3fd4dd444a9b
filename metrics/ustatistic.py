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
    n = len(squares)
    above = torch.ones(n, n, dtype=torch.bool, device=squares.device).triu_(1)
    median = median_square(squares[above], n, norms.max(), units)
    squares.div_(-2 * bandwidth**2 * torch.where(median > 0, median, math.nan)).exp_()


def median_square(squares: Tensor, n: int, largest: Tensor, units: int) -> Tensor:
    """Compute the median of all n² squared distances between n samples, those of a sample to itself included.

    Args:
        squares: The squared distance of each pair of different samples, once.
        n: Number of samples.
        largest: The largest squared norm of a centred sample, and ...
        units: ... the number of units; they set what counts as a rounding error.

    Returns:
        A scalar; 0 where it is within the rounding errors of equal samples, which must not set a bandwidth.

    >>> median_square(torch.tensor([9.0, 49.0, 16.0]), 3, torch.tensor(30.0), 1)
    tensor(9.)
    """
    # In order n zeros come first, then each distance twice; of an even number the two middle ones are averaged.
    ranks = {(rank - n) // 2 for rank in ((n * n - 1) // 2, n * n // 2)}
    middle = [squares.new_zeros(()) if rank < 0 else squares.kthvalue(rank + 1).values for rank in sorted(ranks)]
    median = torch.stack(middle).mean()
    rounding = 4 * units**0.5 * torch.finfo(squares.dtype).eps * largest
    return torch.where(median > rounding, median, 0)


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
