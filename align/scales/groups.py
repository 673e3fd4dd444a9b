"""Scale symmetries as data: factors for units that grow their incoming weights and shrink the outgoing ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...base.architecture import full_state
from ...base.errors import ArchitectureError
from ...base.running import copied
from ..symmetry import Symmetry
from ..terms import Piece, pieces

Model = TypeVar("Model", bound=nn.Module)
Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where the factors of a scale enter.

    Attributes:
        name: Parameter or buffer.
        part: Which of its pieces; see `align.terms.pieces`.
        dim: Which dimension of the piece enumerates the units.
        exponent: The weights are multiplied by factor^exponent.
        shift: Added to the values before and taken off after: a batch norm divides by the root of variance + eps.
    """

    name: str
    part: int
    dim: int
    exponent: int
    shift: float = 0.0


@dataclass(frozen=True)
class Scale:
    """A factor for each unit of a group that leaves the network's function unchanged.

    Attributes:
        name: Its group's for the first of a group's scales that has weights on both sides; followed by " at " and a
            tensor's name for others, such as that of a convolution before its batch norm.
        group: Whose units.
        places: Where they enter.
    """

    name: str
    group: str
    places: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class ScaleGroups:
    """The scale symmetries of a network, one group's at a time.

    Attributes:
        symmetry: Whose groups.
        scales: What was found.
        left_out: Groups whose incoming and outgoing weights have no factors in common, each with the reason.
    """

    symmetry: Symmetry
    scales: tuple[Scale, ...]
    left_out: Mapping[str, str]

    def shape(self, scale: Scale) -> tuple[int, ...]:
        """Give the shape of a scale's factors: (*sizes of the groups that its group lies within, units)."""
        group = self.symmetry.by_name[scale.group]
        return (*(self.symmetry.by_name[name].size for name in group.within), group.size)

    def random(self, generator: torch.Generator | None = None, spread: float = 1.0) -> dict[str, Tensor]:
        """Draw factors for every scale: exp(spread · normal), float64.

        Args:
            generator: Source of randomness; None takes the global one.
            spread: Standard deviation of the logarithm.
        """
        return {
            scale.name: (spread * torch.randn(self.shape(scale), generator=generator, dtype=torch.float64)).exp()
            for scale in self.scales
        }

    def dims(self, place: Place) -> tuple[Piece, list[int]]:
        """Give the piece of a place, and its dimensions that enumerate the factors, outermost first."""
        return self._dims[place]

    @cached_property
    def _dims(self) -> dict[Place, tuple[Piece, list[int]]]:
        return {place: dims_of(self.symmetry, place) for scale in self.scales for place in scale.places}

    def scaled(self, state: Mapping[str, Tensor], factors: Factors) -> dict[str, Tensor]:
        """Scale the tensors of a full state; those without a place are given back as they are.

        Args:
            state: Every parameter and buffer by name; tied ones under each name.
            factors: By name of the scale; scales without factors stay.
        """
        result = dict(state)
        tied: dict[tuple[int, int], list[str]] = {}
        for name, tensor in state.items():
            tied.setdefault((tensor.data_ptr(), tensor.numel()), []).append(name)
        for scale in self.scales:
            for place in scale.places if scale.name in factors else ():
                piece, dims = self.dims(place)
                old = result[place.name]
                factor = factors[scale.name].to(old.device, torch.float64) ** place.exponent
                new = old.detach().clone()
                values = (piece.get(new).double() + place.shift) * _along(factor, piece, dims) - place.shift
                piece.put(new, values.to(new.dtype))
                given = state[place.name]
                result.update(dict.fromkeys(tied[given.data_ptr(), given.numel()], new))
        return result


def dims_of(symmetry: Symmetry, place: Place) -> tuple[Piece, list[int]]:
    """Give the piece of a place, and its dimensions that enumerate the units of its group, outermost group first."""
    piece = pieces(symmetry.layout[place.name])[place.part]
    return piece, piece.around(place.dim, symmetry.within[piece.dims[place.dim].group or ""])


def _along(factor: Tensor, piece: Piece, dims: list[int]) -> Tensor:
    order = sorted(range(len(dims)), key=dims.__getitem__)
    return factor.permute(order).reshape([dim.size if at in dims else 1 for at, dim in enumerate(piece.dims)])


def apply_scales(model: Model, factors: Factors, scales: ScaleGroups) -> Model:
    """Rescale a network's units; what is passed stays as it is.

    Args:
        model: The network.
        factors: By name of the scale, positive, of shape `scales.shape(scale)`; scales without factors stay.
        scales: From `scale_groups`.

    Returns:
        A new network with the same function.

    Raises:
        ArchitectureError: A scale is unknown, or factors are not positive, not finite or of another shape.
    """
    known = {scale.name: scale for scale in scales.scales}
    scales.symmetry.check_fits(model, "the model")
    for name, factor in factors.items():
        if name not in known:
            raise ArchitectureError(f"there is no scale {name}; known: {', '.join(known) or 'none'}")
        if tuple(factor.shape) != scales.shape(known[name]):
            raise ArchitectureError(
                f"factors of {name} have shape {tuple(factor.shape)}, expected {scales.shape(known[name])}"
            )
        if not (factor.isfinite() & (factor > 0)).all():
            raise ArchitectureError(f"factors of {name} must be positive and finite: others change the function")
    return with_state(model, scales.scaled(full_state(model), factors))


def with_state(model: Model, state: Mapping[str, Tensor]) -> Model:
    """Copy a network and give the copy other values."""
    result: Any = copied(model)
    with torch.no_grad():
        for name, tensor in full_state(result).items():
            tensor.copy_(state[name])
    return result
