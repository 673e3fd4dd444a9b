"""Soft permutations: a matrix per group instead of an order, so that what they give can be differentiated.

A matrix P takes the place of an order p: new[i] = Σ_j P[i, j] old[j] along every axis of its group. At a vertex of the
doubly stochastic matrices, P[i, p(i)] = 1, this is the permutation itself. The matrix need not be square: then
the result has as many units as P has rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .permutation import Permutation
from .symmetry import Symmetry
from .terms import Piece, Term, pieces


def one_hot(permutation: Permutation, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Write a permutation as matrices: per group (*sizes of the groups it lies within, size, size).

    >>> from isthmus import symmetry
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> same = symmetry(net, torch.ones(1, 2)).identity()
    >>> one_hot(same)["0"].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return {
        name: torch.nn.functional.one_hot(index, index.shape[-1]).to(dtype)
        for name, index in permutation.indices.items()
    }


def soft_permute(
    terms: Sequence[Term], tensor: Tensor, matrices: Mapping[str, Tensor], within: Mapping[str, tuple[str, ...]]
) -> Tensor:
    """Apply matrices to every axis of a parameter or buffer that enumerates units of their groups; a new tensor.

    Args:
        terms: One for each axis of the tensor, as in `Symmetry.layout`.
        tensor: What is permuted.
        matrices: Per group (*sizes of the groups it lies within, size, size); groups without one stay.
        within: Per group the groups that it lies within.
    """
    found = pieces(terms)
    if len(found) == 1 and all(positions is None for positions in found[0].positions):
        piece = found[0]
        return soft_take(piece.get(tensor), piece, matrices, within).reshape(tensor.shape)
    result = tensor.clone()
    for piece in found:
        piece.put(result, soft_take(piece.get(tensor), piece, matrices, within))
    return result


def soft_apply(symmetry: Symmetry, state: Mapping[str, Tensor], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply matrices to the tensors of a state dict (or any part of one); differentiable in both.

    Args:
        symmetry: Whose layout the tensors have.
        state: Parameters and buffers by name; those without a group are given back as they are.
        matrices: Per group (*sizes of the groups it lies within, size, size).
    """
    touched = {name for group in symmetry.groups if group.name in matrices for name, _ in group.axes}
    return {
        name: soft_permute(symmetry.layout[name], tensor, matrices, symmetry.within) if name in touched else tensor
        for name, tensor in state.items()
    }


def soft_take(
    tensor: Tensor, piece: Piece, matrices: Mapping[str, Tensor], within: Mapping[str, tuple[str, ...]]
) -> Tensor:
    """Apply matrices along every dimension of a piece; a group's matrices are chosen by the new outer positions.

    Args:
        tensor: The piece's values, with `piece.dims` as dimensions.
        piece: What each dimension is.
        matrices: Per group (*new sizes of the groups it lies within, new size, size).
        within: Per group the groups that it lies within, outermost first.
    """
    order = sorted(range(len(piece.dims)), key=lambda d: len(within.get(piece.dims[d].group or "", ())))
    for d in order:  # the outer ones first: an inner matrix is chosen by the new outer position
        group = piece.dims[d].group
        if group is None or group not in matrices:
            continue
        matrix = matrices[group].to(tensor)
        if not within[group]:
            moved = tensor.movedim(d, 0)
            tensor = (matrix @ moved.reshape(len(moved), -1)).reshape(-1, *moved.shape[1:]).movedim(0, d)
        else:
            outer = [piece.partner(d, name) for name in within[group]]
            assert None not in outer, f"{group} lies within a group that this tensor does not have"
            tensor = _take_within(tensor, d, [at for at in outer if at is not None], matrix)
    return tensor


def _take_within(tensor: Tensor, dim: int, outer: list[int], matrix: Tensor) -> Tensor:
    front = [*outer, dim]
    moved = tensor.movedim(front, list(range(len(front))))
    result = matrix @ moved.reshape(*moved.shape[: len(front)], -1)
    return result.reshape(*matrix.shape[:-1], *moved.shape[len(front) :]).movedim(list(range(len(front))), front)
