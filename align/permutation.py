"""Permutations as data: they apply to models and state dicts, invert, compose, and are saved in small files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from ..base.architecture import full_state
from ..base.errors import ArchitectureError, nearest
from ..base.files import PathLike, save_state_dict
from ..base.running import copied
from .storage import check_suffix, read_tensors, reading
from .symmetry import Group, Symmetry
from .terms import Fixed, groups_of, pieces, take

FORMAT = "isthmus permutation 1"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Permutation:
    """A member of a network's symmetry: new[j] = old[indices[j]] along every axis of each group.

    Attributes:
        symmetry: What it is a permutation of; enough to apply it without the model.
        indices: Per group an int64 tensor of shape (*sizes of the groups it lies within, size).

    >>> import isthmus
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    >>> drawn = isthmus.symmetry(net, x).random(torch.Generator().manual_seed(1))
    >>> torch.allclose(drawn.apply(net)(x), net(x), atol=1e-6)
    True
    """

    symmetry: Symmetry
    indices: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for group in self.symmetry.groups:
            _check_indices(self.symmetry, group, self.indices.get(group.name))
        for name in self.indices:
            if name not in self.symmetry.by_name:
                known = nearest(name, self.symmetry.by_name)
                raise ArchitectureError(f"indices for {name}, which is no group of this symmetry{known}")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Permutation)
            and self.indices.keys() == other.indices.keys()
            and all(torch.equal(index, other.indices[name]) for name, index in self.indices.items())
        )

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.indices)))

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self == self.symmetry.identity()

    @overload
    def apply(self, target: Model) -> Model: ...
    @overload
    def apply(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def apply(self, target: nn.Module | Mapping[str, Tensor]) -> nn.Module | dict[str, Tensor]:
        """Permute a model or a state dict; what is passed stays as it is.

        Args:
            target: A module, or tensors by name. Names that the symmetry does not know are refused.

        Returns:
            A new one of the same kind.

        Raises:
            ArchitectureError: Names or shapes do not belong to this symmetry.
        """
        if isinstance(target, nn.Module):
            permuted = self._apply_to_state(full_state(target), whole=True)
            model = copied(target)
            with torch.no_grad():
                for name, tensor in full_state(model).items():
                    tensor.copy_(permuted[name])
            return model
        return self._apply_to_state(target, whole=False)

    def _apply_to_state(self, state: Mapping[str, Tensor], whole: bool) -> dict[str, Tensor]:
        shapes = self.symmetry.shapes
        # what has nothing to permute may be missing, such as the counters of batch norm in old checkpoints
        needed = {name for name, terms in self.symmetry.layout.items() if whole or groups_of(terms)}
        needed -= set() if whole else set(self.symmetry.unsaved)
        for name in (*state, *sorted(needed)):
            if name not in shapes:
                raise ArchitectureError(f"{name} is not part of this symmetry{nearest(name, shapes)}")
            if name not in state:
                raise ArchitectureError(f"{name} of shape {shapes[name]} is missing{nearest(name, state)}")
            if tuple(state[name].shape) != shapes[name]:
                raise ArchitectureError(
                    f"{name} has shape {tuple(state[name].shape)}, but this permutation is for {shapes[name]}"
                )
        return {name: self.permute(name, tensor) for name, tensor in state.items()}

    def permute(self, name: str, tensor: Tensor) -> Tensor:
        """Permute one parameter or buffer, by name; the result is a new tensor."""
        terms = self.symmetry.layout[name]
        permuted = tensor.detach().clone()
        if all(isinstance(term, Fixed) for term in terms):
            return permuted
        for piece in pieces(terms):
            piece.put(permuted, take(piece.get(tensor.detach()), piece, self.indices, self.symmetry.within))
        return permuted

    def inverse(self) -> Permutation:
        """Give the permutation that undoes this one."""
        undone: dict[str, Tensor] = {}
        for group in sorted(self.symmetry.groups, key=lambda group: len(group.within)):
            index = self.indices[group.name].argsort(-1)
            # a block that is moved back takes its inner order along
            undone[group.name] = index[self._sources(undone, group)] if group.within else index
        return Permutation(self.symmetry, {group.name: undone[group.name] for group in self.symmetry.groups})

    def compose(self, other: Permutation) -> Permutation:
        """Give the permutation that applies `other` first and then this one.

        Raises:
            ArchitectureError: They are permutations of different symmetries.
        """
        if self.symmetry.groups != other.symmetry.groups:
            raise ArchitectureError("the two permutations belong to different symmetries and cannot be composed")
        indices = {}
        for group in self.symmetry.groups:
            first = other.indices[group.name]
            first = first[self._sources(self.indices, group)] if group.within else first
            indices[group.name] = first.gather(-1, self.indices[group.name])
        return Permutation(self.symmetry, indices)

    def _sources(self, indices: Mapping[str, Tensor], group: Group) -> tuple[Tensor, ...]:
        """For every position of the groups that `group` lies within, where `indices` take its block from."""
        outer = [self.symmetry.by_name[name] for name in group.within]
        grid = torch.meshgrid(*(torch.arange(o.size) for o in outer), indexing="ij")
        digits = dict(zip(group.within, grid, strict=True))
        return tuple(indices[o.name][(*(digits[name] for name in o.within), digits[o.name])] for o in outer)

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file that also holds the symmetry, whole or not at all."""
        metadata = {"format": FORMAT, "symmetry": json.dumps(self.symmetry.to_json())}
        return save_state_dict(self.indices, check_suffix(path), metadata)

    @classmethod
    def load(cls, path: PathLike) -> Permutation:
        """Read a saved permutation.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
        """
        metadata, tensors = read_tensors(path, FORMAT)
        with reading(path):
            return cls(Symmetry.from_json(json.loads(metadata["symmetry"])), tensors)


def _check_indices(symmetry: Symmetry, group: Group, index: Tensor | None) -> None:
    shape = (*(symmetry.by_name[name].size for name in group.within), group.size)
    if index is None or tuple(index.shape) != shape:
        found = "nothing" if index is None else f"shape {tuple(index.shape)}"
        raise ArchitectureError(f"group {group.name}: indices of shape {shape} expected, {found} given")
    if index.dtype != torch.int64 or not torch.equal(index.sort(-1).values, torch.arange(group.size).expand(shape)):
        raise ArchitectureError(f"group {group.name}: the indices are no permutation of 0 … {group.size - 1}")
