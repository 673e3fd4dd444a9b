"""Samples x units as users hold them, arrays or tensors, read and checked once for every index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..base.errors import DataError, NotFiniteError
from ..base.finite import all_finite

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def as_matrix(values: Tensor | ArrayLike, name: str = "x") -> Tensor:
    """Read a finite floating-point matrix of samples x units, on the device and in the precision that it has.

    Args:
        values: A tensor, or whatever numpy reads as an array.
        name: What to call it in a message.

    Raises:
        DataError: It is no floating-point matrix, or empty.
        NotFiniteError: It holds NaN or infinity.

    >>> as_matrix([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).shape
    torch.Size([3, 2])
    """
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(np.ascontiguousarray(values))
        except (TypeError, ValueError) as error:
            raise DataError(f"{name} is no numeric array: {error}") from error
    shape = tuple(values.shape)
    if values.ndim != 2 or 0 in shape:
        raise DataError(f"{name} has shape {shape}; expected samples x units, not empty: see as_samples")
    if not values.is_floating_point():
        raise DataError(f"{name} of shape {shape} is {values.dtype}; expected floating point: convert it first")
    if not all_finite(values):
        raise NotFiniteError(f"{name} of shape {shape} holds NaN or infinity")
    return values.detach()


def as_pair(x: Tensor | ArrayLike, y: Tensor | ArrayLike, index: str, least: int = 2) -> tuple[Tensor, Tensor]:
    """Read two representations of the same samples.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        index: What they are for, in a message.
        least: The fewest samples that the index is defined for.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples on one device, or too few samples.
        NotFiniteError: One holds NaN or infinity.
    """
    x, y = (z if isinstance(z, Tensor) else as_matrix(z, name) for name, z in (("x", x), ("y", y)))
    if x.device != y.device:
        raise DataError(f"x is on {x.device}, y on {y.device}; move them to one device")
    x, y = as_matrix(x, "x"), as_matrix(y, "y")
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} samples (shape {tuple(x.shape)}), y has {len(y)} (shape {tuple(y.shape)})")
    if len(x) < least:
        raise DataError(
            f"x and y have {len(x)} sample{'s' * (len(x) > 1)} (shapes {tuple(x.shape)} and {tuple(y.shape)}); "
            f"{index} needs at least {least}"
        )
    return x, y


def centred(x: Tensor) -> Tensor:
    """Subtract the mean of each column, in float64; a constant column becomes exactly zero."""
    x = x.to(torch.float64)
    # Relative to its first sample a constant column is exactly zero, and stays so.
    x = x - x[0]
    return x.sub_(x.mean(0))


def rescaled(x: Tensor) -> Tensor:
    """Divide by the largest magnitude, for indices that do not depend on scale: squares then stay within float64."""
    scale = x.abs().amax()
    return x / scale if scale > 0 else x
