"""Assignment of units to units: maximum-weight bipartite matching, flat or of blocks with an order inside each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..base.errors import NotFiniteError


def assign(similarity: Tensor) -> Tensor:
    """Match each row to its own column so that the sum of similarities is largest (Kuhn 1955; scipy's solver, float64).

    Args:
        similarity: (n, n), finite.

    Returns:
        For each row its column, int64, on the CPU.

    Raises:
        NotFiniteError: An entry is NaN or infinite.

    >>> assign(torch.tensor([[0.1, 0.9], [0.8, 0.7]]))
    tensor([1, 0])
    """
    if not torch.isfinite(similarity).all():
        raise NotFiniteError(f"a similarity matrix of shape {tuple(similarity.shape)} holds NaN or infinity")
    favourites = similarity.detach().argmax(1).cpu()
    if len(favourites.unique()) == len(favourites):
        return favourites  # each row has its best, and no two the same: nothing can be better
    matrix = similarity.detach().to("cpu", torch.float64).numpy()
    return torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1])


def assign_each(similarity: Tensor) -> Tensor:
    """Assign every matrix of a batch (…, n, n): (…, n), on the CPU.

    >>> assign_each(torch.tensor([[[0.1, 0.9], [0.8, 0.7]], [[1.0, 0.0], [0.0, 1.0]]]))
    tensor([[1, 0],
            [0, 1]])
    """
    matrices = similarity.detach().reshape(-1, *similarity.shape[-2:]).cpu()
    return torch.stack([assign(matrix) for matrix in matrices]).reshape(similarity.shape[:-1])


def assign_blocks(outer: Tensor, inner: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Match blocks to blocks and, at once, the units inside every matched pair of blocks.

    For each pair of blocks the units inside are matched first; the value of the pair is what that yields. Of all
    matchings of this structure the one with the largest sum of similarities is returned.

    Args:
        outer: (G, G), similarity that depends on the blocks only.
        inner: Per inner group (G, m, G, m), similarity of unit j of block a with unit k of block c.

    Returns:
        The blocks' assignment (G,), and per inner group one assignment for each block, (G, m).
    """
    size = outer.shape[0]
    value = outer.detach().to("cpu", torch.float64).numpy().copy()
    chosen: dict[str, np.ndarray] = {}
    for name, similarity in inner.items():
        if not torch.isfinite(similarity).all():
            raise NotFiniteError(f"the similarity of {name}, of shape {tuple(similarity.shape)}, holds NaN or infinity")
        matrix = similarity.detach().to("cpu", torch.float64).numpy()
        chosen[name] = np.empty((size, size, matrix.shape[1]), dtype=np.int64)
        for a in range(size):
            for c in range(size):
                rows, columns = linear_sum_assignment(matrix[a, :, c], maximize=True)
                chosen[name][a, c] = columns
                value[a, c] += matrix[a, rows, c, columns].sum()
    matched = assign(torch.from_numpy(value))
    picked = {name: torch.from_numpy(table[np.arange(size), matched.numpy()]) for name, table in chosen.items()}
    return matched, picked
