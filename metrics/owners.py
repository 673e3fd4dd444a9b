"""Which sample of a batch each row of a samples x units matrix is of."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.errors import DataError


def row_owners(activation: Tensor, rows: int, count: int, mask: Tensor | None = None, name: str = "x") -> Tensor:
    """Tell which sample each row is of that `as_samples` makes of an activation.

    Args:
        activation: Of shape (N, …), or (N · places, …) with the places of one sample together.
        rows: How many rows it gave.
        count: N, the number of samples of the batch.
        mask: (N, tokens), bool, where each of its real tokens gave one row.
        name: What to call the activation in a message.

    Returns:
        (rows,) in int64, rising, on the device of the activation: places in the batch.

    Raises:
        DataError: The first axis is not that of the samples, so that a row belongs to no one sample.

    >>> row_owners(torch.zeros(2, 3, 8), 6, 2)
    tensor([0, 0, 0, 1, 1, 1])
    >>> row_owners(torch.zeros(2, 3, 8), 4, 2, torch.tensor([[True, True, True], [True, False, False]]))
    tensor([0, 0, 0, 1])
    """
    shape = tuple(activation.shape)
    # (tokens, N, units) passes for (N · places, tokens, units) where there are twice as many tokens as samples.
    turned = activation.ndim > 2 and shape[0] != count and shape[1] == count
    if shape[0] % count or turned:
        raise DataError(
            f"{name} has shape {shape} for {count} samples: its first axis is not that of the samples, so that its "
            "rows are of no one sample; name other layers, without this one"
        )
    if mask is not None:
        return mask.nonzero()[:, 0].to(activation.device)
    return torch.arange(rows, device=activation.device) // (rows // count)
