"""Statistics of a merged trunk and of the heads behind it: measured anew, or given back from the parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...base.batches import Data
from ..repairs import UnitStatistics, prepare
from .planning import Plan
from .roles import WRITES
from .slots import Slots
from .tensors import merged
from .zipped import Zipped


def repaired(
    zipped: Zipped,
    parents: Sequence[nn.Module],
    plan: Plan,
    slots: Mapping[str, Slots],
    data: Data,
    method: str,
    progress: bool | None = None,
) -> None:
    """Repair zipped networks, in place (Jordan et al. 2023).

    Args:
        zipped: What was made of the parents.
        parents: The networks in the order in which they were merged.
        plan: What is merged.
        slots: By group.
        data: Batches of all tasks.
        method: "reset": batch norms get the statistics of `data`. "rescale": units of the trunk get the mean of their
            parents' means and standard deviations, units of a head those of its parent. "both".
        progress: Show bars; None: on a terminal.
    """
    prepared = prepare(parents, data, method, progress)
    for number, head in enumerate(zipped.heads):
        if not prepared.targets:
            prepared.apply(head, [1.0])
            continue
        target = _target(zipped, plan, slots, prepared.targets, number)
        if method != "rescale" or set(target.mean) - {target.last}:
            replace(prepared, targets=(target,)).apply(head, [1.0])


def _target(
    zipped: Zipped, plan: Plan, slots: Mapping[str, Slots], found: Sequence[UnitStatistics], number: int
) -> UnitStatistics:
    """Say what the units of a head should do; those of the trunk are the first head's to repair."""
    inside, own = zipped.structure.inside, found[number]

    def wanted(part: str) -> dict[str, Tensor]:
        return {
            inside(name): _blended(plan, slots, [getattr(each, part)[name] for each in found], name)
            if shared
            else values
            for name, values in getattr(own, part).items()
            if not (shared := _is_shared(plan, name)) or number == 0
        }

    return UnitStatistics(wanted("mean"), wanted("std"), inside(own.last), frozenset(map(inside, own.normed)))


def _is_shared(plan: Plan, layer: str) -> bool:
    return any(name.rpartition(".")[0] == layer for name in plan.boundary.trunk)


def _blended(plan: Plan, slots: Mapping[str, Slots], values: Sequence[Tensor], layer: str) -> Tensor:
    """Average the statistics of units as the weights that write them are."""
    weight = f"{layer}.weight"
    for role, term in zip(plan.roles[0].axes.get(weight) or (), plan.symmetries[0].layout.get(weight, ()), strict=True):
        if role == WRITES and term.size == len(values[0]):
            return merged(values, (term,), (WRITES,), slots)
    return torch.stack(list(values)).mean(0)
