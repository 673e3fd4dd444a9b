"""What networks with a common trunk share, and where a head goes back to the units of its own network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Unmerged(nn.Module):
    """A shared layer, the units of whose output are read off their slots, so that what follows has its own network's.

    Args:
        module: The layer.
        axis: Of its output.
        index: (units,), for each unit of the head's network the position of its slot.
    """

    index: Tensor

    def __init__(self, module: nn.Module, axis: int, index: Tensor) -> None:
        super().__init__()
        self.module = module
        self.axis = axis
        self.register_buffer("index", index)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer and pick."""
        return self.module(*args, **kwargs).index_select(self.axis, self.index)


@dataclass(frozen=True)
class Structure:
    """What the heads share.

    Attributes:
        heads: How many there are.
        upto: The last layer that is shared.
        shared: Modules that are the same objects in all heads, by their names in the original networks.
        once: Modules that are computed once, likewise.
        axis: Of the output of `upto`, where heads go back to their own units; None: their first parameters do that.
    """

    heads: int = 1
    upto: str | None = None
    shared: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    axis: int | None = None

    @property
    def called(self) -> tuple[str, ...]:
        """Names, in a head, of the modules that are computed once."""
        return tuple(map(self.inside, self.once))

    def inside(self, name: str) -> str:
        """Give the name that a module or tensor of the original network has in a head."""
        if self.axis is None or self.upto is None or not (name == self.upto or name.startswith(f"{self.upto}.")):
            return name
        return f"{self.upto}.module{name[len(self.upto) :]}"

    def to_json(self) -> dict[str, Any]:
        """Give the whole as JSON values."""
        return {"heads": self.heads, "upto": self.upto, "shared": self.shared, "once": self.once, "axis": self.axis}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Structure:
        """Read what `to_json` gave."""
        return cls(value["heads"], value["upto"], tuple(value["shared"]), tuple(value["once"]), value["axis"])


def assembled(
    heads: Sequence[nn.Module], structure: Structure, indices: Sequence[Tensor] | None = None
) -> list[nn.Module]:
    """Let networks share the modules of the first.

    Args:
        heads: Networks of their own; they are changed.
        structure: What they are to share.
        indices: Where heads go back to their own units, for each head the positions of their slots.

    Returns:
        The same networks.
    """
    for name in structure.shared if len(heads) > 1 else ():
        module = heads[0].get_submodule(name)
        for head in heads[1:]:
            put(head, name, module)
    if structure.axis is not None and structure.upto is not None and indices is not None:
        for head, index in zip(heads, indices, strict=True):
            module = head.get_submodule(structure.upto)
            put(head, structure.upto, Unmerged(module, structure.axis, index))
    return list(heads)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a module under every name that the module which stands there has."""
    old = model.get_submodule(name)
    for owner in list(model.modules()):
        for key, child in list(owner._modules.items()):
            if child is old:
                owner._modules[key] = module
