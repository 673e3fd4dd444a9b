"""Which parameters take the inverse transposed of a head's new basis, so that it need not be a rotation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..symmetry import Group, Symmetry
from ..verify import change
from .probing import Bench
from .streams import carried

_EXACT = 1e-9

# Of the matrices that are tried: far enough from a rotation to tell, and well conditioned.
_SPREAD = 0.3


def find_dual(symmetry: Symmetry, bench: Bench, turning: Iterable[str], seed: int = 0) -> tuple[tuple[str, str], ...]:
    """Find the parameters opposite to each other in the products of a head: keys to queries, output to values.

    Queries M q and keys M⁻ᵀ k have the same products, for any invertible M; so have values and what reads them. Which
    module is on which side is found by trying; a module that holds both sides at once is left to rotations.

    Args:
        symmetry: Of the network.
        bench: The network with inputs.
        turning: Groups inside heads that may be rotated.
        seed: Of the matrices that are tried.

    Returns:
        Groups with parameters that take the inverse transposed; nothing for a group without sides.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[str, str]] = []
    for name in turning:
        group = symmetry.by_name[name]
        matrices = {name: _drawn(symmetry, group, generator).to(bench.probe.device)}
        for dual in _sides(group):
            if change(bench.outputs, bench.probe.run(_moved(symmetry, bench, matrices, dual), bench.batch)) <= _EXACT:
                found += dual
                break
    return tuple(found)


def _drawn(symmetry: Symmetry, group: Group, generator: torch.Generator) -> Tensor:
    blocks = symmetry.by_name[group.within[0]].size
    noise = torch.randn(blocks, group.size, group.size, generator=generator, dtype=torch.float64)
    return torch.eye(group.size, dtype=torch.float64) + _SPREAD * noise / group.size**0.5


def _sides(group: Group) -> Iterator[list[tuple[str, str]]]:
    """List the ways to put modules on two sides, the first module always on the first."""
    names = list(dict.fromkeys(name for name, _ in group.axes))
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    for size in range(1, len(modules)):
        for chosen in itertools.combinations(modules[1:], size):
            yield [(group.name, name) for name in names if name.rpartition(".")[0] in chosen]


def _moved(
    symmetry: Symmetry, bench: Bench, matrices: dict[str, Tensor], dual: list[tuple[str, str]]
) -> dict[str, Tensor]:
    names = {name for group in matrices for name, _ in symmetry.by_name[group].axes}
    moving = {name: tensor for name, tensor in bench.state.items() if name in names}
    return {**bench.state, **carried(symmetry, moving, matrices, dual)}
