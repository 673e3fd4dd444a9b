"""Tables of counts, and how well the two labellings that they count agree."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def contingency(a: Tensor, b: Tensor, rows: int, columns: int) -> Tensor:
    """Count the samples of each pair of labels, (rows x columns) int64; negative labels count nowhere.

    >>> contingency(torch.tensor([0, 0, 1, -1]), torch.tensor([2, 2, 0, 0]), 2, 3)
    tensor([[0, 0, 2],
            [1, 0, 0]])
    """
    known = (a >= 0) & (b >= 0)
    return torch.bincount(a[known] * columns + b[known], minlength=rows * columns).reshape(rows, columns)


def matched(table: Tensor) -> tuple[Tensor, Tensor]:
    """Match rows to columns one to one so that most samples are in matched cells (Kuhn 1955).

    Returns:
        Rows and columns of the matched cells, as many as the shorter side, int64.

    >>> matched(torch.tensor([[5, 4], [4, 0]]))
    (tensor([0, 1]), tensor([1, 0]))
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return torch.from_numpy(rows).long(), torch.from_numpy(columns).long()


def adjusted_rand(table: Tensor) -> float:
    """Compute the Rand index adjusted for chance (Hubert & Arabie 1985, equation 5): 1 if equal, 0 by chance.

    >>> adjusted_rand(torch.tensor([[3, 0], [0, 3]])), adjusted_rand(torch.tensor([[2, 2], [2, 2]])) < 0
    (1.0, True)
    """
    counts = table.to(torch.float64)
    pairs, rows, columns = (_pairs(x) for x in (counts, counts.sum(1), counts.sum(0)))
    expected = rows * columns / max(_pairs(counts.sum().reshape(1)), 1.0)
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else (pairs - expected) / (largest - expected)


def normalised_information(table: Tensor) -> float:
    """Compute the mutual information over the mean of the entropies (Strehl & Ghosh 2002): 1 if equal, 0 if unrelated.

    >>> normalised_information(torch.tensor([[0, 3], [3, 0]])), normalised_information(torch.tensor([[2, 2], [2, 2]]))
    (1.0, 0.0)
    """
    joint, rows, columns = (_entropy(x) for x in (table.flatten(), table.sum(1), table.sum(0)))
    if rows + columns == 0:
        return 1.0  # one label on either side: the same partition
    return float(np.clip(2 * (rows + columns - joint) / (rows + columns), 0.0, 1.0))


def _pairs(counts: Tensor) -> float:
    return float((counts * (counts - 1) / 2).sum())


def _entropy(counts: Tensor) -> float:
    shares = counts[counts > 0].to(torch.float64) / counts.sum()
    return float(-(shares * shares.log()).sum())
