"""From slots to networks: the trunk merged, and heads that read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...align import Symmetry
from ...align.terms import groups_of
from ...base.architecture import full_state
from ...base.errors import ArchitectureError
from ...base.running import copied
from .boundary import Boundary
from .roles import Roles
from .slots import Slots
from .structure import Structure, assembled
from .tensors import expansion, merged, unmerged


@dataclass(frozen=True, eq=False)
class Joint:
    """How networks are joined, whatever the slots are.

    Attributes:
        symmetry: Of the first network; the others' trunks have the same.
        layouts: Per network what the axes of its tensors are made of.
        roles: What they are to the units, per network.
        boundary: Which of them are merged.
        structure: What the heads share.
        expanded: Groups whose units are picked behind the boundary.
    """

    symmetry: Symmetry
    layouts: Sequence[Mapping[str, tuple]]
    roles: Sequence[Roles]
    boundary: Boundary
    structure: Structure
    expanded: frozenset[str]

    def heads(self, models: Sequence[nn.Module], slots: Mapping[str, Slots]) -> list[nn.Module]:
        """Merge the trunk of networks, and give each a head that reads it.

        Args:
            models: As many as the slots are of; they are not changed.
            slots: By group.
        """
        count = len(models) if self.boundary.upto is not None else 1
        heads = [copied(model) for model in models[:count]]
        states = [full_state(model) for model in models]
        with torch.no_grad():
            self._merge_trunk(full_state(heads[0]), states, slots)
            for network, head in enumerate(heads):
                self._read_slots(head, network, slots)
        indices = [self._index(network, slots, states[0]) for network in range(count)] if self.expanded else None
        return assembled(heads, self.structure, indices)

    def _merge_trunk(
        self, target: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]], slots: Mapping[str, Slots]
    ) -> None:
        done: set[int] = set()
        for name in sorted(self.boundary.trunk):
            if target[name].data_ptr() in done and target[name].numel():
                continue  # a tied tensor is one tensor
            done.add(target[name].data_ptr())
            tensors = [state[name] for state in states]
            target[name].copy_(merged(tensors, self.layouts[0][name], self.roles[0].axes[name], slots))

    def _read_slots(self, head: nn.Module, network: int, slots: Mapping[str, Slots]) -> None:
        reading = {group: found for group, found in slots.items() if group not in self.expanded}
        done: set[int] = set()
        for name, tensor in full_state(head).items():
            terms = self.layouts[min(network, len(self.layouts) - 1)][name]
            if name in self.boundary.trunk or not groups_of(terms) & reading.keys() or tensor.data_ptr() in done:
                continue
            done.add(tensor.data_ptr())
            tensor.copy_(unmerged(tensor, terms, network, reading))

    def _index(self, network: int, slots: Mapping[str, Slots], state: Mapping[str, Tensor]) -> Tensor:
        term = self.boundary.output[next(iter(self.boundary.output))]
        return expansion(term, network, slots).to(next(iter(state.values())).device)


def join(symmetries: Sequence[Symmetry], roles: Sequence[Roles], bound: Boundary, zipped: Sequence[str]) -> Joint:
    """Settle how heads read a trunk in which some groups are zipped.

    If a group that crosses the boundary is only read behind it, the first parameters of the head take the slots up.
    If it goes on behind it, as the stream of a residual network does, the units of each network are picked out of
    the slots at the boundary.

    Args:
        symmetries: Of each network.
        roles: Likewise.
        bound: What is merged.
        zipped: Names of the groups that are to be.

    Raises:
        ArchitectureError: A group goes on behind the boundary, and not by the output of its layer.
    """
    outer = {name for symmetry in symmetries for name in symmetry.layout if name not in bound.trunk}
    inner = groups_of(term for name in bound.trunk for term in symmetries[0].layout[name])
    written = {
        group
        for group in inner & set(zipped)
        for symmetry, role in zip(symmetries, roles, strict=True)
        if role.writes([name for name in symmetry.layout if name in outer], symmetry.layout, {group})
    }
    expanded = frozenset(groups_of(bound.output.values()) & set(zipped)) if written else frozenset()
    if written - expanded:
        group = sorted(written - expanded)[0]
        name = next(n for n, _ in symmetries[0].by_name[group].axes if n in outer)
        raise ArchitectureError(
            f"the units of {group} go on behind {bound.upto}, as {name} writes to them, but the output of {bound.upto} "
            "does not show them: name the last layer of a stage or block, or one whose output all of the rest reads"
        )
    axis = next(iter(bound.output)) if expanded else None
    heads = len(symmetries) if bound.upto is not None else 1
    structure = Structure(heads, bound.upto, bound.shared, bound.called, axis)
    return Joint(symmetries[0], [s.layout for s in symmetries], roles, bound, structure, expanded)
