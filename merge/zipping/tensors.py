"""Parameters that are merged and unmerged: every axis of a tensor by the slots of the units on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...align.terms import Piece, Term, pieces
from .roles import READS, WRITES
from .slots import Slots


def merged(
    tensors: Sequence[Tensor], terms: Sequence[Term], roles: Sequence[str] | None, slots: Mapping[str, Slots]
) -> Tensor:
    """Give the tensor of the merged network: Σ_i M_i W_i U_i (Stoica et al. 2024, eq. 4).

    Where an axis writes units, those of a slot are averaged; where it reads them, they are added up. Networks are
    averaged over what no slot tells apart, such as outputs.

    Args:
        tensors: One of each network.
        terms: What their axes are made of.
        roles: "writes" or "reads" for each axis; None only if no axis has units with slots.
        slots: By group; groups without keep their order.

    Returns:
        A new tensor, of the type and on the device of the first.
    """
    first = tensors[0].detach()
    if not first.is_floating_point():
        return first.clone()
    out = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    for piece in pieces(terms):
        parts = [
            _folded(piece.get(tensor.detach().to(out)), piece, roles, slots, network)
            for network, tensor in enumerate(tensors)
        ]
        piece.put(out, torch.stack(parts).sum(0) / _counts(piece, roles, slots, len(tensors)).to(out))
    return out.to(first.dtype)


def unmerged(tensor: Tensor, terms: Sequence[Term], network: int, slots: Mapping[str, Slots]) -> Tensor:
    """Let a tensor that reads units of one network read their slots: W_i U_i.

    Args:
        tensor: Of the network.
        terms: What its axes are made of; those with slots read.
        network: Which one.
        slots: By group.
    """
    out = tensor.detach().to(torch.float64, copy=True)
    for piece in pieces(terms):
        piece.put(out, _folded(piece.get(out.clone()), piece, [READS] * len(terms), slots, network))
    return out.to(tensor.dtype)


def expansion(term: Term, network: int, slots: Mapping[str, Slots]) -> Tensor:
    """Give, for every position of an axis in one network, the position of its slot in the merged network.

    Args:
        term: What the axis is made of.
        network: Which one.
        slots: By group.

    Returns:
        (positions,) int64.
    """
    index = torch.arange(term.size)
    for piece in pieces([term]):
        values = piece.get(torch.arange(term.size))
        for at, dim in enumerate(piece.dims):
            if dim.group is not None and dim.group in slots:
                values = values.index_select(at, slots[dim.group].index[network])
        piece.put(index, values)
    return index


def _folded(
    values: Tensor, piece: Piece, roles: Sequence[str] | None, slots: Mapping[str, Slots], network: int
) -> Tensor:
    """Add up the units of each slot along every dimension that has slots."""
    for at, dim in enumerate(piece.dims):
        if dim.group is not None and dim.group in slots:
            assert roles is not None, f"units of {dim.group} on an axis of which it is not known what it does"
            index = slots[dim.group].index[network].to(values.device)
            values = torch.zeros_like(values).index_add_(at, index, values)
    return values


def _counts(piece: Piece, roles: Sequence[str] | None, slots: Mapping[str, Slots], networks: int) -> Tensor:
    """Count, for every entry of a merged piece, the written entries that were added up."""
    total = torch.zeros([1] * len(piece.dims), dtype=torch.float64)
    for network in range(networks):
        part = torch.ones([1] * len(piece.dims), dtype=torch.float64)
        for at, dim in enumerate(piece.dims):
            if dim.group is not None and dim.group in slots and roles is not None and roles[dim.axis] == WRITES:
                held = torch.bincount(slots[dim.group].index[network], minlength=dim.size).to(part)
                part = part * held.reshape([-1 if place == at else 1 for place in range(len(piece.dims))])
        total = total + part
    return total.clamp_min(1.0)  # no network has units in both slots of such an entry, which then is zero
