"""Orthogonal matrices: drawn at random, and the best one by Procrustes, with or without the ones vector held."""

from __future__ import annotations

import torch
from torch import Tensor


def complement(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Give an orthonormal basis of the vectors whose entries sum to zero, (size, size - 1): Helmert's.

    >>> basis = complement(4)
    >>> torch.allclose(basis.T @ basis, torch.eye(3, dtype=basis.dtype)), bool(basis.sum(0).abs().max() < 1e-12)
    (True, True)
    """
    rows = torch.arange(size, dtype=dtype)[:, None]
    columns = torch.arange(1, size, dtype=dtype)[None]
    basis = (rows < columns).to(dtype) - columns * (rows == columns).to(dtype)
    return basis / (columns * (columns + 1)).sqrt()


def random_rotation(
    size: int, generator: torch.Generator | None = None, *, hold_ones: bool = False, copies: tuple[int, ...] = ()
) -> Tensor:
    """Draw an orthogonal matrix, uniformly (Mezzadri 2007: QR of normal numbers with the signs of R taken out).

    Args:
        size: Number of rows and columns.
        generator: Source of randomness; None takes the global one.
        hold_ones: Leave the vector of ones where it is, as layer norm demands.
        copies: Draw so many of them: the result is (*copies, size, size).

    Returns:
        float64, on the CPU.

    >>> turn = random_rotation(5, torch.Generator().manual_seed(0), hold_ones=True)
    >>> torch.allclose(turn @ turn.T, torch.eye(5).double()), torch.allclose(turn.sum(1), torch.ones(5).double())
    (True, True)
    """
    inner = size - 1 if hold_ones else size
    q, r = torch.linalg.qr(torch.randn(*copies, inner, inner, generator=generator, dtype=torch.float64))
    drawn = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return held(drawn, size) if hold_ones else drawn


def held(turn: Tensor, size: int) -> Tensor:
    """Lay a rotation of the complement of the ones vector, (size - 1, size - 1), into the whole space."""
    basis = complement(size, turn.dtype).to(turn.device)
    return basis @ turn @ basis.T + torch.ones_like(turn[..., :1, :1]) / size


def procrustes(cross: Tensor, *, hold_ones: bool = False) -> Tensor:
    """Find the orthogonal matrix R that maximises tr(Rᵀ C), so that R B comes closest to A where C = A Bᵀ.

    The solution is U Vᵀ of the singular value decomposition C = U S Vᵀ (Schönemann 1966).

    Args:
        cross: C, (…, units, units).
        hold_ones: Only matrices that leave the vector of ones where it is.

    Returns:
        R in float64, on the device of C.

    >>> turn = random_rotation(4, torch.Generator().manual_seed(0))
    >>> b = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)).double()
    >>> torch.allclose(procrustes((turn @ b) @ b.T), turn)
    True
    """
    cross = cross.double()
    if hold_ones:
        basis = complement(cross.shape[-1]).to(cross.device)
        return held(procrustes(basis.T @ cross @ basis), cross.shape[-1])
    u, _, vh = torch.linalg.svd(cross)
    return u @ vh
