"""What is settled before networks are zipped: their symmetries, the boundary, and which groups can be merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ...align import Symmetry
from ...align import symmetry as derive
from ...align.nets.preparation import check_networks
from ...align.terms import groups_of
from ...base.architecture import check_same_architecture, full_state
from ...base.batches import Batch
from ...base.errors import ArchitectureError
from .boundary import Boundary, boundary
from .claims import few, precise, same_function, shuffled, zippable
from .evidence import Looks, places
from .joining import Joint, join
from .roles import Roles

UNSEEN = "no activation shows its units"
ACTING = "measured: its units act on each other, or are read where it is not known"


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known of networks before any data is read.

    Attributes:
        models: The networks.
        symmetries: Of each.
        roles: Of their tensors.
        boundary: What is merged.
        groups: Names of the groups in it.
        looks: Where the units of free groups are seen.
        batch: A few inputs.
    """

    models: tuple[nn.Module, ...]
    symmetries: tuple[Symmetry, ...]
    roles: tuple[Roles, ...]
    boundary: Boundary
    groups: tuple[str, ...]
    looks: Looks
    batch: Batch

    @classmethod
    def of(cls, models: Sequence[nn.Module], upto: str | None, symmetry: Symmetry | None, batch: Batch) -> Plan:
        """Derive the symmetries, find the boundary, and refuse networks that differ in what is merged.

        Raises:
            ArchitectureError: Trunks differ, with the tensors and both shapes.
            LayerNotFoundError: There is no layer `upto`.
            NotFiniteError: A parameter holds NaN or infinity.
        """
        for number, model in enumerate(models):
            check_networks([model], [f"network {number}"])
        example = few(batch)
        first = derive(models[0], example) if symmetry is None else symmetry.verified(models[0], example)
        bound = boundary(models[0], upto, first, example)
        symmetries = [first]
        for number, model in enumerate(models[1:], 1):
            _check_trunk(bound, models[0], model, number)
            alike = type(model) is type(models[0]) and _shapes(model) == first.shapes
            symmetries.append(first if alike else derive(model, example))
            _check_layout(bound, first, symmetries[-1], number)
        inner = groups_of(term for name in bound.trunk for term in first.layout[name])
        names = tuple(group.name for group in first.groups if group.name in inner)
        free = [name for name in names if first.by_name[name].kind == "free"]
        looks = places(first, models, free, bound.called)
        return cls(tuple(models), tuple(symmetries), tuple(map(Roles.of, models)), bound, names, looks, example)

    def refused(self) -> dict[str, str]:
        """Say of each group that cannot be zipped why."""
        refused: dict[str, str] = {}
        for name in self.groups:
            both = zip(self.roles, self.symmetries, strict=True)
            reasons = [roles.obstacle(symmetry, name) for roles, symmetry in both]
            why = next((reason for reason in reasons if reason), None if self.looks.get(name) else UNSEEN)
            if why:
                refused[name] = why
        left = [name for name in self.groups if name not in refused]
        held = zippable(self.models[0], self.symmetries[0], self.roles[0], left, self.batch)
        return refused | {name: ACTING for name in left if name not in held}

    def joint(self, zipped: Sequence[str]) -> Joint:
        """Settle how heads read the trunk, and measure it: units of the trunk in another order change nothing.

        Raises:
            ArchitectureError: What crosses the boundary cannot be read behind it.
        """
        joint = join(self.symmetries, self.roles, self.boundary, list(zipped))
        if not zipped:
            return joint
        model, first = precise(self.models[0]), replace(joint.structure, heads=1)
        head = replace(joint, structure=first).heads([model], shuffled(self.symmetries[0], zipped))[0]
        if not same_function(model, head, self.batch):
            raise ArchitectureError(
                f"what is computed up to {self.boundary.upto} goes on behind it in more ways than one, and no head "
                "could read it: name the last layer of a stage or block, or one before the branches"
            )
        return joint


def _shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in full_state(model).items()}


def _check_trunk(bound: Boundary, first: nn.Module, other: nn.Module, number: int) -> None:
    a, b = (
        {name: tensor for name, tensor in full_state(model).items() if name in bound.trunk} for model in (first, other)
    )
    check_same_architecture(a, b, ("network 0", f"network {number}"))


def _check_layout(bound: Boundary, first: Symmetry, other: Symmetry, number: int) -> None:
    for name in sorted(bound.trunk):
        if other.layout[name] != first.layout[name]:
            raise ArchitectureError(
                f"{name}: its units are tied to others in network {number} than in network 0, so that no layer up to "
                f"{bound.upto} of the two can be merged; pass networks that differ in their last layers alone"
            )
