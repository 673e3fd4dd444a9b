"""Inner products of kernels whose samples are shuffled by every cyclic shift, for the price of a few products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shifted_products(a: Sequence[Tensor], b: Sequence[Tensor], order: Tensor) -> Tensor:
    """Compute Σ_ij K_ij L_π(i)π(j) of each pair of kernels for each cyclic shift π of the samples in an order.

    Shift s pairs the sample at place r of the order with that at place r + s, modulo their number n. Along each
    diagonal of the ordered kernels this is a circular correlation: one Fourier transform per kernel and one product
    per frequency give all n shifts, in n² log n operations per kernel and n² per pair.

    Args:
        a: Symmetric matrices (n x n).
        b: Likewise.
        order: (n,), a permutation.

    Returns:
        (n x len(a) x len(b)), shift 0 first.

    >>> kernel = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    >>> shifted_products([kernel], [kernel], torch.arange(3)).flatten()
    tensor([21., 14., 14.], dtype=torch.float64)
    """
    n = len(order)
    # A symmetric matrix has each diagonal twice, but for the main one and the middle one of an even n.
    weights = torch.full((n // 2 + 1, 1), 2.0, dtype=a[0].dtype, device=a[0].device)
    weights[0] = 1
    if n % 2 == 0:
        weights[-1] = 1
    spectra = {id(kernel): _spectrum(kernel, order.to(kernel.device)) for kernel in (*a, *b)}
    left = torch.stack([(spectra[id(kernel)].conj() * weights).T for kernel in a], 1)
    right = torch.stack([spectra[id(kernel)].T for kernel in b], 2)
    return torch.fft.irfft(left @ right, n=n, dim=0)


def _spectrum(kernel: Tensor, order: Tensor) -> Tensor:
    """Transform the diagonals of an ordered kernel: (n // 2 + 1 diagonals x frequencies)."""
    n = len(order)
    places = torch.arange(n, device=order.device)
    ahead = (places[: n // 2 + 1, None] + places) % n
    return torch.fft.rfft(kernel[order[None, :], order[ahead]], dim=1)
