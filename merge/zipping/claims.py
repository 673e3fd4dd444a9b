"""Claims that are measured before anything is zipped, in float64: a group can be, and a boundary is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...align import Symmetry
from ...align.terms import pieces
from ...base.architecture import full_state
from ...base.batches import Batch
from ...base.running import copied, evaluating
from .roles import READS, WRITES, Roles
from .slots import Slots

_SAMPLES = 8
_TOLERANCE = 1e-8


def precise(model: nn.Module) -> nn.Module:
    """Copy a network into float64, in evaluation mode."""
    return copied(model).double().eval()


def few(batch: Batch) -> Batch:
    """Take the first inputs of a batch: enough to measure by."""
    count = len(batch)

    def cut(value: object) -> object:
        whole = isinstance(value, Tensor) and value.ndim and value.shape[0] == count
        return value[:_SAMPLES] if whole else value  # pyright: ignore[reportIndexIssue]

    return Batch(tuple(map(cut, batch.args)), {k: cut(v) for k, v in batch.kwargs.items()})


def same_function(before: nn.Module, after: nn.Module, batch: Batch) -> bool:
    """Tell whether two networks in float64 give the same outputs, to rounding."""
    batch = batch.to(dtype=torch.float64)
    with evaluating(before), evaluating(after), torch.no_grad():
        first, second = (
            [leaf for leaf in tree_leaves(batch.call(model)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            for model in (before, after)
        )
    return all(
        bool(((a - b).abs().max() <= _TOLERANCE * a.abs().max().clamp_min(1e-30)).item())
        for a, b in zip(first, second, strict=True)
        if a.numel()
    )


def zippable(model: nn.Module, symmetry: Symmetry, roles: Roles, groups: Iterable[str], batch: Batch) -> list[str]:
    """Find the groups in which one unit can stand for two that do the same, by trying.

    Two units of a group are made to do the same. What reads them is then added up in the first, and the second does
    what a third one does: no output may change. It does where units act on each other, as in a layer norm or a
    product of queries and keys, and where a tensor has been taken to read that writes.

    Args:
        model: The network; it is not changed.
        symmetry: Of the network.
        roles: What its tensors are to the units.
        groups: Names of groups, of which `roles` knows nothing against it.
        batch: Inputs.

    Returns:
        Those in which it holds.
    """
    wanted = [group for group in groups if symmetry.by_name[group].size > 1]
    if _holds(model, symmetry, roles, wanted, batch):
        return wanted
    return [group for group in wanted if _holds(model, symmetry, roles, [group], batch)]


def _holds(model: nn.Module, symmetry: Symmetry, roles: Roles, groups: list[str], batch: Batch) -> bool:
    twins = precise(model)
    one_for_two = precise(model)
    for group in groups:
        _each(twins, symmetry, roles, group, WRITES, lambda values: values[1].copy_(values[0]))
        _each(one_for_two, symmetry, roles, group, WRITES, lambda values: values[1].copy_(values[-1]))
        _each(one_for_two, symmetry, roles, group, READS, _gather_first)
    return same_function(twins, one_for_two, batch)


def _gather_first(values: Tensor) -> None:
    values[0] += values[1]
    values[1] = 0


def _each(
    model: nn.Module,
    symmetry: Symmetry,
    roles: Roles,
    group: str,
    role: str,
    change: Callable[[Tensor], object],
) -> None:
    """Change, in place, all that has a role to the units of a group; they come on the first axis."""
    done: set[int] = set()
    for name, tensor in full_state(model).items():
        known = roles.axes[name]
        if known is None or tensor.data_ptr() in done or not tensor.is_floating_point():
            continue
        done.add(tensor.data_ptr())
        for piece in pieces(symmetry.layout[name]):
            for at, dim in enumerate(piece.dims):
                if dim.group == group and known[dim.axis] == role:
                    values = piece.get(tensor).clone()
                    change(values.movedim(at, 0))
                    piece.put(tensor, values)


def shuffled(symmetry: Symmetry, groups: Iterable[str]) -> Mapping[str, Slots]:
    """Draw slots for one network alone: an order of the units of each group, always the same."""
    generator = torch.Generator().manual_seed(0)
    return {group: Slots(torch.randperm(symmetry.by_name[group].size, generator=generator)[None]) for group in groups}
