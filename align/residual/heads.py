"""Units inside attention heads: they too may be rotated, head by head, where no nonlinearity meets them alone.

Values enter the output projection and queries meet keys through products only, so that any orthogonal matrix per head
may stand between the two; rotary positions and norms of queries and keys forbid it for those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..assignment import assign
from ..soft import soft_apply
from ..symmetry import Group, Symmetry
from ..terms import pieces
from ..verify import change
from .orthogonal import random_rotation
from .probing import Bench

_EXACT = 1e-9
# So many are tried one by one; more are halved first.
_ONE_BY_ONE = 2


def find_turning(symmetry: Symmetry, bench: Bench, seed: int = 0) -> tuple[str, ...]:
    """Find the groups inside heads whose units may be rotated, by doing so.

    Args:
        symmetry: Of the network.
        bench: The network with inputs.
        seed: Of the rotations.

    Returns:
        Names of groups that lie within one group, which lies within none.
    """
    generator = torch.Generator().manual_seed(seed)

    def is_inner(group: Group) -> bool:
        return group.kind == "within" and len(group.within) == 1 and not symmetry.by_name[group.within[0]].within

    matrices = {
        group.name: random_rotation(group.size, generator, copies=(symmetry.by_name[group.within[0]].size,))
        for group in symmetry.groups
        if is_inner(group)
    }

    def holds(names: Sequence[str]) -> bool:
        turned = soft_apply(symmetry, bench.state, {name: matrices[name] for name in names})
        return change(bench.outputs, bench.probe.run(turned, bench.batch)) <= _EXACT

    def search(names: Sequence[str]) -> list[str]:
        if not names or holds(names):
            return list(names)
        if len(names) == 1:
            return []
        half = max(len(names) // 2, 1)
        return [*search(names[:half]), *search(names[half:])]

    # those of one kind of axis fail together, as queries and keys under rotary positions do
    axes = {name: len(symmetry.by_name[name].axes) for name in matrices}
    return tuple(search(sorted(matrices, key=lambda name: axes[name])))


def cross_products(
    symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor], group: Group, *, fixed: bool = False
) -> Tensor:
    """Sum A Bᵀ over all parameters' axes of a free group, (units, units) in float64.

    Args:
        symmetry: Of both networks.
        a: Parameters of the first, by name.
        b: Parameters of the second.
        group: Whose units.
        fixed: Only parts of parameters whose other axes have a fixed order, as embeddings have.
    """
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for name in dict.fromkeys(name for name, _ in group.axes):
        for piece in pieces(symmetry.layout[name]) if name in a else ():
            for at, dim in enumerate(piece.dims):
                loose = any(d.group for i, d in enumerate(piece.dims) if i != at)
                if dim.group != group.name or (fixed and loose):
                    continue
                x, y = (piece.get(state[name]).double().movedim(at, 0).reshape(group.size, -1) for state in (a, b))
                total = total.to(x.device) + x @ y.T
    return total


def block_products(
    symmetry: Symmetry, a: Mapping[str, Tensor], b: Mapping[str, Tensor], outer: Group, inner: Group | None
) -> Tensor:
    """Sum A Bᵀ for all pairs of blocks, in float64.

    Args:
        symmetry: Of both networks.
        a: Parameters of the first, by name.
        b: Parameters of the second.
        outer: The group of blocks.
        inner: A group within it; None takes the parts of parameters that hold no group within it.

    Returns:
        (blocks, blocks, units, units), or (blocks, blocks, 1, 1) without an inner group.
    """
    within = {group.name for group in symmetry.groups if group.within == (outer.name,)}
    size = inner.size if inner else 1
    total = torch.zeros(outer.size, outer.size, size, size, dtype=torch.float64)
    for name in dict.fromkeys(name for name, _ in outer.axes):
        for piece in pieces(symmetry.layout[name]) if name in a else ():
            for at, dim in enumerate(piece.dims):
                own = [i for i, d in enumerate(piece.dims) if d.group in within]
                mine = [i for i in own if inner and piece.dims[i].group == inner.name]
                if dim.group != outer.name or (not mine if inner else own):
                    continue
                front = [at, *mine[:1]]
                x, y = (
                    piece.get(state[name])
                    .double()
                    .movedim(front, list(range(len(front))))
                    .reshape(outer.size, size, -1)
                    for state in (a, b)
                )
                total = total.to(x.device) + torch.einsum("gmr,hnr->ghmn", x, y)
    return total


def assign_heads(products: Sequence[Tensor], fixed: Tensor) -> Tensor:
    """Assign heads by how well they agree once the units inside each pair are rotated onto each other.

    The best rotation of one pair's units gives the nuclear norm of their product (Schönemann 1966).

    Args:
        products: For each group inside the heads what `block_products` gave.
        fixed: The same for what no group inside the heads is part of, (heads, heads).

    Returns:
        For each head of the first network the head of the second.

    >>> b = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    >>> cross = torch.einsum("gmr,hnr->ghmn", b.flip(0).flip(1), b)
    >>> assign_heads([cross], torch.zeros(2, 2)).tolist()
    [1, 0]
    """
    total = fixed.double().cpu()
    for product in products:
        total = total + torch.linalg.svdvals(product).sum(-1).cpu()
    return assign(total)
