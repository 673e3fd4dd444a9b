"""`ot_fusion`: average networks of unequal widths after transporting their units onto those of the first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.architecture import check_finite, full_state
from ...base.batches import Batch, Data, batches, require_repeatable
from ...base.errors import DataError, SymmetryError, nearest
from ...base.interpolation import normalised, weighted_mean
from ...base.running import copied, on_device
from ...metrics.coupling import soft_coupling
from ..derive import as_example
from ..derive import symmetry as derive
from ..nets.problem import Family, Similarities, families, front, rows
from ..soft import soft_take
from ..symmetry import Symmetry
from ..terms import Piece, groups_of, pieces
from .padding import Frame, frame
from .rectangular import correlations

METHODS = ("weights", "activations")
OUTGOING = ("sum", "mean")
Matrices = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Fusion:
    """Networks fused into one of the widths of the first.

    Attributes:
        model: The weighted mean.
        couplings: For each network but the first, per group the coupling of the first's units (rows) with its units:
            all masses together are 1 (per position of the groups that it lies within).
        aligned: For each network but the first its state dict in the widths and the order of the first.
    """

    model: nn.Module
    couplings: tuple[Mapping[str, Tensor], ...]
    aligned: tuple[dict[str, Tensor], ...]


def ot_fusion(
    models: Sequence[nn.Module],
    data: Data | None = None,
    *,
    method: str = "weights",
    weights: Sequence[float] | None = None,
    outgoing: str = "sum",
    symmetries: Sequence[Symmetry] | None = None,
    example_inputs: Any = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    verify: bool = True,
) -> Fusion:
    """Fuse networks of one architecture and any widths by optimal transport (Singh & Jaggi 2020, algorithm 1).

    Group by group, from the inputs on, the units of each further network are coupled with those of the first, every
    layer's units with equal masses, such that the transport costs least. Ground cost is the squared Euclidean distance
    of the weights that come from groups coupled before (with masses given, the coupling of largest inner product; each
    tensor divided by its root mean square), or on `data` the distance of standardised activations. The weights are then
    transported, T divided by the masses of the first (barycentric projection), and averaged. For equal widths each
    coupling is a permutation.

    Attention heads, and units inside blocks, have no coupling of their own and must be of equal numbers: they are
    permuted.

    Args:
        models: At least two; the first is the reference, whose widths the result has. None is changed.
        data: Batches. Needed for method "activations" and read once for each further network.
        method: "weights" or "activations".
        weights: Of the networks in the mean; equal by default.
        outgoing: What becomes of weights that read transported units. "sum": each unit hands all that is read
            from it on to its partners, so that a unit that was split in two equal halves is put together again; "mean":
            the published equations, which let a layer of n units that is transported onto m lose all but m/n of it.
            For equal widths the same. Which axis reads is told by the kind of layer: the second and further ones of
            a weight, the first of a transposed convolution, none of an embedding.
        symmetries: Of each network; None derives them.
        example_inputs: For deriving and verifying symmetries, where there is no data.
        device: Where to compute; None: where the models are.
        progress: Show bars; None: on a terminal.
        verify: Measure that the symmetries hold.

    Raises:
        ArchitectureError: The networks do not correspond, with the parameter and both shapes.
        NotFiniteError: A parameter or an activation holds NaN or infinity.
        DataError: Fewer than two networks; data or inputs are missing; a method or the weights are unknown or wrong.
        SymmetryError: Heads or blocks are not of equal numbers, or lie several deep.

    >>> make = lambda n: nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 2))
    >>> net, wide, x = make(4), make(8), torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    >>> with torch.no_grad():  # every unit in two copies, each of them heard half
    ...     for mine, theirs in zip(net.parameters(), wide.parameters()):
    ...         rows = mine.repeat_interleave(len(theirs) // len(mine), 0)
    ...         _ = theirs.copy_(rows.repeat_interleave(2, 1) / 2 if rows.shape != theirs.shape else rows)
    >>> torch.allclose(ot_fusion([net, wide], x).model(x), net(x), atol=1e-6)
    True
    """
    _check_arguments(models, data, method, outgoing)
    shares = normalised(weights, len(models))
    for at, model in enumerate(models):
        check_finite(dict(model.named_parameters()), f"network {at}")
    claims, stream = _symmetries(models, symmetries, data, example_inputs, verify)
    here = [on_device(model, device) for model in models]
    couplings, aligned = [], []
    for at in range(1, len(models)):
        both = frame(claims[0], claims[at])
        pair = here[0], here[at]
        seen = stream if at == 1 else batches(data) if data is not None else ()
        coupling = _Transport(both, pair, correlations(both, pair, seen, progress) if method == "activations" else None)
        couplings.append(coupling.run())
        aligned.append(coupling.moved(pair[1].state_dict(), outgoing))
    fused = copied(here[0])
    fused.load_state_dict(weighted_mean([here[0].state_dict(), *aligned], shares))
    return Fusion(fused, tuple(couplings), tuple(aligned))


def _check_arguments(models: Sequence[nn.Module], data: Data | None, method: str, outgoing: str) -> None:
    for name, value, known in (("method", method, METHODS), ("outgoing", outgoing, OUTGOING)):
        if value not in known:
            raise DataError(f"unknown {name} {value!r}{nearest(value, known)}")
    if len(models) < 2:
        raise DataError(f"{len(models)} networks cannot be fused; pass two or more")
    if method == "activations" and data is None:
        raise DataError("fusing by activations needs data: pass batches of inputs")
    if method == "activations" and data is not None and len(models) > 2:
        require_repeatable(data, "it is read once for each network but the first")


def _symmetries(
    models: Sequence[nn.Module], given: Sequence[Symmetry] | None, data: Data | None, inputs: Any, verify: bool
) -> tuple[list[Symmetry], Iterable[Batch]]:
    stream = iter(()) if data is None else batches(data)
    first = next(stream, None)
    inputs = first if inputs is None else inputs
    if given is None and inputs is None:
        raise DataError("deriving the symmetries needs inputs: pass data, example_inputs, or symmetries made before")
    if given is not None and len(given) != len(models):
        raise DataError(f"{len(given)} symmetries for {len(models)} networks; pass one each")
    example = None if inputs is None else as_example(inputs)
    claims = []
    for at, model in enumerate(models):
        claim = derive(model, example, verify=False) if given is None else given[at]
        claim.check_fits(model, f"network {at}")
        claims.append(claim.verified(model, example) if verify and example is not None else claim)
    return claims, itertools.chain([] if first is None else [first], stream)


class _Transport:
    """The coupling of one network's units with those of the reference, group by group."""

    def __init__(
        self,
        both: Frame,
        models: tuple[nn.Module, nn.Module],
        seen: Mapping[Family, tuple[Similarities, Mapping[str, int]]] | None,
    ) -> None:
        self.both, self.model, self.seen = both, models[1], seen
        self.states = [full_state(model) for model in models]
        trainable = dict(models[0].named_parameters())
        self.parts: list[tuple[str, Piece, Piece]] = [
            (name, mine, theirs)
            for name in trainable
            for mine, theirs in zip(pieces(both.a.layout[name]), pieces(both.b.layout[name]), strict=True)
        ]
        self.matrices: Matrices = {}
        self.reads = {name: _reading_axes(self.model, name, both.b) for name in self.states[1]}

    def run(self) -> Matrices:
        """Couple every group, those first of whose weights most lead to what is coupled already."""
        waiting = [family for family in families(self.both.common) if not family.group.within]
        reached = {name for family in waiting for name in family.names}
        for group in self.both.common.groups:
            self._check(group.name, reached)
        couplings: Matrices = {}
        while waiting:
            family = max(waiting, key=self._known_share)
            waiting.remove(family)
            couplings |= self._couple(family)
        return couplings

    def _check(self, name: str, reached: set[str]) -> None:
        sizes = [symmetry.by_name[name].size for symmetry in (self.both.a, self.both.b)]
        group = self.both.common.by_name[name]
        if name not in reached:
            raise SymmetryError(
                f"group {name} lies within several others, {', '.join(group.within)}: transport is not defined for it; "
                "derive the symmetries with hold=[…] to keep its order, or use match"
            )
        nested = group.within or any(name in other.within for other in self.both.common.groups)
        if nested and sizes[0] != sizes[1]:
            raise SymmetryError(
                f"group {name}, of {sizes[0]} and {sizes[1]}, consists of blocks or of units inside them, which can "
                "only be permuted: networks to be fused need as many; match_widths can match them"
            )

    def _couple(self, family: Family) -> Matrices:
        total = self._similarities(family)
        sizes = [symmetry.by_name[family.group.name].size for symmetry in (self.both.a, self.both.b)]
        if family.inner:
            orders = total.solve(family)
            found = {k: nn.functional.one_hot(order, order.shape[-1]).double() for k, order in orders.items()}
            self.matrices |= found
            return {name: matrix / matrix.shape[-1] for name, matrix in found.items()}
        coupling = soft_coupling(total.outer[: sizes[0], : sizes[1]])
        self.matrices[family.group.name] = coupling * sizes[0]
        return {family.group.name: coupling}

    def _similarities(self, family: Family) -> Similarities:
        if self.seen is not None and family in self.seen:
            return self.seen[family][0]
        total = Similarities.zeros(family)
        usable = [part for part in self.parts if self._usable(part[1], family)] or self.parts
        for name, mine, theirs in usable:
            a, b = mine.get(self.states[0][name]).double(), theirs.get(self.states[1][name]).double()
            size = float(a.square().mean().sqrt() * b.square().mean().sqrt()) or 1.0
            others = {k: matrix for k, matrix in self.matrices.items() if k not in family.names}
            b = soft_take(b, theirs, others, self.both.b.within)
            for at, dim in enumerate(mine.dims):
                if dim.group == family.group.name:
                    dims, inner = front(mine, at, family)
                    x, y = rows(a, dims), rows(b, dims)
                    shared = min(x.shape[1], y.shape[1])  # they differ only where nothing is known yet
                    similarity = (x[:, :shared] @ y[:, :shared].T).cpu() / size
                    if inner is None:
                        total.outer[: len(x), : len(y)] += similarity
                    else:
                        total.add(inner, similarity)
        return total

    def _usable(self, piece: Piece, family: Family) -> bool:
        names = [dim.group for dim in piece.dims if dim.group]
        return family.group.name in names and set(names) <= self.matrices.keys() | set(family.names)

    def _known_share(self, family: Family) -> float:
        touching = [part for part in self.parts if family.group.name in {dim.group for dim in part[1].dims}]
        known = [part for part in touching if self._usable(part[1], family)]
        entries = [sum(self.states[0][name].numel() for name, *_ in some) for some in (known, touching)]
        return entries[0] / max(entries[1], 1)

    def moved(self, state: Mapping[str, Tensor], outgoing: str) -> dict[str, Tensor]:
        """Transport a state dict of the second network into the widths of the first."""
        return {name: self._transported(name, tensor.detach(), outgoing) for name, tensor in state.items()}

    def _transported(self, name: str, tensor: Tensor, outgoing: str) -> Tensor:
        if not groups_of(self.both.b.layout[name]):
            return tensor.clone()
        result = tensor.new_zeros(self.both.a.shapes[name])
        for mine, theirs in zip(pieces(self.both.a.layout[name]), pieces(self.both.b.layout[name]), strict=True):
            moved = soft_take(theirs.get(tensor).double(), theirs, self.matrices, self.both.b.within)
            for one, other in zip(mine.dims, theirs.dims, strict=True):
                if outgoing == "sum" and other.group and other.axis in self.reads[name]:
                    moved = moved * (other.size / one.size)
            mine.put(result, moved.to(tensor.dtype))
        return result


def _reading_axes(model: nn.Module, name: str, symmetry: Symmetry) -> frozenset[int]:
    """Name the axes of a tensor along which it reads: they are summed over."""
    module = model.get_submodule(name.rpartition(".")[0])
    ndim = len(symmetry.layout[name])
    if ndim < 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return frozenset()
    if isinstance(module, nn.modules.conv._ConvTransposeNd) or type(module).__name__ == "Conv1D":
        return frozenset({0})
    return frozenset(range(1, ndim))
