"""Which axes of a network's tensors write units and which read them, and which groups of units can be zipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...align import Symmetry
from ...align.terms import groups_of

WRITES, READS = "writes", "reads"


@dataclass(frozen=True)
class Roles:
    """What each axis of each tensor is to the units on it.

    Attributes:
        axes: Per parameter and buffer, for each axis "writes" or "reads"; None: its module is of an unknown kind.
        unknown: Per tensor without roles why.
    """

    axes: Mapping[str, tuple[str, ...] | None]
    unknown: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Roles:
        """Tell them by the kind of module that owns each tensor.

        A tensor of one axis writes: a bias, or a norm's parameter, which acts on each unit by itself.
        """
        axes: dict[str, tuple[str, ...] | None] = {}
        unknown: dict[str, str] = {}
        owners: dict[int, list[str]] = {}
        for name, tensor in _tensors(model):
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            axes[name] = _axes(module, own, tensor.ndim)
            owners.setdefault(id(tensor), []).append(name)
            if axes[name] is None:
                unknown[name] = (
                    f"{name} is of a {type(module).__name__}, of which it is not known what reads and writes"
                )
        for names in owners.values():
            if len({axes[name] for name in names}) > 1:
                for name in names:
                    axes[name] = None
                    unknown[name] = (
                        f"{' and '.join(names)} are one tensor, which reads in one place and writes in another"
                    )
        return cls(axes, unknown)

    def obstacle(self, symmetry: Symmetry, group: str) -> str | None:
        """Say why a group cannot be zipped; None: nothing that is known speaks against it."""
        found = symmetry.by_name[group]
        if found.kind != "free" or any(group in other.within for other in symmetry.groups):
            return f"its units are {found.kind}, with an order inside or around them"
        strange = next((self.unknown[name] for name, _ in found.axes if self.axes[name] is None), None)
        if strange:
            return strange
        roles = {roles[axis] for name, axis in found.axes if (roles := self.axes[name])}
        missing = {WRITES, READS} - roles
        return f"no tensor {missing.pop()} its units" if missing else None

    def writes(self, names: Sequence[str], layout: Mapping[str, tuple], groups: set[str]) -> bool:
        """Tell whether any of some tensors writes units of some groups."""
        return any(
            role == WRITES and groups_of([term]) & groups
            for name in names
            for role, term in zip(self.axes[name] or (), layout[name], strict=False)
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _axes(module: nn.Module, own: str, ndim: int) -> tuple[str, ...] | None:
    if ndim <= 1 or isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)):
        return (WRITES,) * ndim
    if own != "weight":
        return None
    if isinstance(module, nn.Linear):
        return (WRITES, READS)
    if isinstance(module, nn.Embedding):
        return (READS, WRITES)
    if isinstance(module, _ConvTransposeNd):
        return (READS, WRITES, *[READS] * (ndim - 2)) if module.groups == 1 else None
    if isinstance(module, _ConvNd) and (module.groups == 1 or module.groups == module.in_channels):
        return (WRITES, *[READS] * (ndim - 1))
    return None
