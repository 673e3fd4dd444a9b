"""How well each unit of one network agrees with its match in another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..permutation import Permutation
from .problem import rows
from .search import Problem, Search


def weight_scores(permutation: Permutation, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute for each unit of a the cosine similarity of all its weights with those of its match in b.

    Args:
        permutation: Brings b into the order of a.
        a: Parameters of the first network, by name.
        b: Parameters of the second, before permutation.

    Returns:
        Per group (units,), float64; a unit inside a block is counted once for each block. NaN for one without weights.
    """
    symmetry = permutation.symmetry
    search = Search(Problem.between(symmetry, a, b), permutation)
    sums: dict[str, Tensor] = {}
    for pair in search.problem.pairs:
        values = pair.a, search.now(pair)
        for at, dim in enumerate(pair.piece.dims):
            if dim.group is None:
                continue
            group = symmetry.by_name[dim.group]
            dims = pair.piece.around(at, group.within)
            x, y = (rows(tensor, dims).double() for tensor in values)
            terms = torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)]).cpu()
            sums[group.name] = sums[group.name] + terms if group.name in sums else terms
    return {name: dot / (xx.sqrt() * yy.sqrt()) for name, (dot, xx, yy) in sums.items()}
