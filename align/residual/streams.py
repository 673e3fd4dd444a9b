"""Residual streams: groups of units whose basis may be rotated, for they are read through norms only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...base.errors import SymmetryError
from ..soft import soft_permute
from ..symmetry import Symmetry
from ..terms import Fixed
from .norms import Norm
from .readers import Reader

# A leftover bias is divided by the gain that is folded away; it must not become larger than this many times its size.
_STEEPEST = 1e6


@dataclass(frozen=True)
class Stream:
    """A group of units whose basis may be rotated.

    Attributes:
        name: The group.
        size: Number of units.
        kind: "rms": every orthogonal matrix leaves the function as it is; "layer": those that leave the vector of
            ones where it is.
        norms: Norms over its units that have parameters.
        readers: For each of these norms the weights that read it.
        writers: All other axes of its units, (parameter, axis): of what writes to the stream or reads it as it is.
        centred: Axes whose part along the vector of ones does nothing and is taken out ("layer" only).
    """

    name: str
    size: int
    kind: str
    norms: tuple[Norm, ...]
    readers: tuple[tuple[Reader, ...], ...]
    writers: tuple[tuple[str, int], ...]
    centred: tuple[tuple[str, int], ...] = ()

    @property
    def hold_ones(self) -> bool:
        """Whether rotations must leave the vector of ones where it is."""
        return self.kind == "layer"

    @property
    def gains(self) -> tuple[str, ...]:
        """Names of the gains, which no rotation touches."""
        return tuple(norm.gain for norm in self.norms if norm.gain)

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stream:
        """Read what `to_json` gave."""
        norms = tuple(Norm(**norm) for norm in value["norms"])
        readers = tuple(tuple(Reader(**reader) for reader in several) for several in value["readers"])
        rest = {key: tuple((name, axis) for name, axis in value[key]) for key in ("writers", "centred")}
        return cls(value["name"], value["size"], value["kind"], norms, readers, **rest)


def fold(
    stream: Stream, symmetry: Symmetry, state: Mapping[str, Tensor], keep: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Absorb the gains and biases of a stream's norms in the weights that read them.

    With y = g ∘ n(x) + b and a reader W y + c: W ← W diag(g), g ← 1, and c ← c + W b, b ← 0 if every reader has a
    bias c; else b ← b / g, which stays with the norm and is rotated with the stream. Then what is in `centred` loses
    its part along the vector of ones, as layer norm does not see it (Ashkboos et al. 2024, §3.2).

    Args:
        stream: The stream.
        symmetry: Of the network.
        state: Tensors by name.
        keep: Gains to be left as they are: of tied readers, and constant.

    Returns:
        All tensors by name; those that change are new, in float64.

    Raises:
        SymmetryError: A bias that no reader can take belongs to a unit whose gain is zero.
    """
    folded = dict(state)
    for norm, readers in zip(stream.norms, stream.readers, strict=True):
        if norm.gain in keep and norm.gain:
            continue
        _fold_norm(norm, readers, folded)
    if stream.centred:
        size = stream.size
        centring = {stream.name: torch.eye(size, dtype=torch.float64) - 1.0 / size}
        for name, axis in stream.centred:
            layout = symmetry.layout[name]
            terms = [term if at == axis else Fixed(term.size) for at, term in enumerate(layout)]
            folded[name] = soft_permute(terms, folded[name].double(), centring, symmetry.within)
    return folded


def _fold_norm(norm: Norm, readers: Sequence[Reader], state: dict[str, Tensor]) -> None:
    gain = None
    if norm.gain:
        gain = state[norm.gain].double() + (1 - norm.neutral)
        state[norm.gain] = torch.full_like(gain, norm.neutral)
    if norm.bias:
        bias = state[norm.bias].double()
        if takes_bias(readers):
            for reader in readers:
                added = state[reader.name].double().movedim(reader.axis, -1) @ bias
                state[reader.bias] = state[reader.bias].double() + added
            state[norm.bias] = torch.zeros_like(bias)
        elif gain is not None:
            state[norm.bias] = _divided(norm, bias, gain)
    if gain is not None:
        for reader in readers:
            weight = state[reader.name].double()
            shape = [1] * weight.ndim
            shape[reader.axis] = -1
            state[reader.name] = weight * gain.reshape(shape)


def takes_bias(readers: Sequence[Reader]) -> bool:
    """Whether what a norm adds can be added by its readers instead."""
    return bool(readers) and all(reader.bias for reader in readers)


def _divided(norm: Norm, bias: Tensor, gain: Tensor) -> Tensor:
    result = torch.where(bias == 0, bias, bias / gain)
    if not bool((result.abs() <= _STEEPEST * bias.abs().clamp_min(torch.finfo(torch.float32).tiny)).all()):
        at = int((result.abs() / bias.abs().clamp_min(1e-300)).nan_to_num(0.0, torch.inf).argmax())
        raise SymmetryError(
            f"{norm.bias} cannot be kept when {norm.gain} is folded away: its readers have no bias to take it, and the "
            f"gain of unit {at} is {float(gain[at]):.1e}. Set that unit's bias to zero, or give the readers biases"
        )
    return result


def rotated(
    streams: Iterable[Stream],
    symmetry: Symmetry,
    state: Mapping[str, Tensor],
    rotations: Mapping[str, Tensor],
    dual: Iterable[tuple[str, str]] = (),
) -> dict[str, Tensor]:
    """Apply matrices along every axis of their streams but those of the gains.

    Args:
        streams: Streams of a folded network.
        symmetry: Of the network.
        state: Tensors by name, folded.
        rotations: Q by stream, (units, units): the activations x of the stream become Q x.
        dual: Groups with parameters that take the inverse transposed matrix.

    Returns:
        All tensors by name; those that change are new, in float64.
    """
    gains = {name for stream in streams for name in stream.gains}
    moving = {name: tensor.double() for name, tensor in state.items() if name not in gains}
    matrices = {name: matrix.double() for name, matrix in rotations.items()}
    touched = {name for name, _ in _axes(symmetry, rotations)}
    return {**state, **carried(symmetry, {k: t for k, t in moving.items() if k in touched}, matrices, dual)}


def carried(
    symmetry: Symmetry,
    state: Mapping[str, Tensor],
    matrices: Mapping[str, Tensor],
    dual: Iterable[tuple[str, str]] = (),
) -> dict[str, Tensor]:
    """Apply matrices along every axis of their groups, or their transposed inverses; differentiable in both.

    Args:
        symmetry: Of the network.
        state: Tensors by name.
        matrices: By group, as in `soft_permute`.
        dual: Groups with parameters that take the inverse transposed matrix; for a rotation that is the same.
    """
    pairs = set(dual)
    inverse = {group: torch.linalg.inv(matrices[group]).mT for group, _ in pairs if group in matrices}
    found = {}
    for name, tensor in state.items():
        own = {group: inverse[group] if (group, name) in pairs else matrix for group, matrix in matrices.items()}
        found[name] = soft_permute(symmetry.layout[name], tensor, own, symmetry.within)
    return found


def _axes(symmetry: Symmetry, groups: Iterable[str]) -> Iterable[tuple[str, int]]:
    return (axis for name in groups for axis in symmetry.by_name[name].axes)


def kept_gains(
    streams: Iterable[Stream], state: Mapping[str, Tensor], ties: Sequence[Sequence[str]], untie: bool | None
) -> tuple[str, ...]:
    """List the gains that stay where they are, so that a tied weight that reads them stays tied.

    Args:
        streams: The streams.
        state: Tensors by name.
        ties: Names of each tied tensor.
        untie: Fold them all the same; None: those that are not constant.

    Raises:
        SymmetryError: Nothing is to be untied, and a gain is not constant.
    """
    tied = {name for names in ties for name in names}
    found = []
    for stream in streams:
        for norm, readers in zip(stream.norms, stream.readers, strict=True):
            if untie or not norm.gain or not tied & {reader.name for reader in readers}:
                continue
            constant = bool((state[norm.gain] == state[norm.gain][0]).all())
            if constant:
                found.append(norm.gain)
            elif untie is False:
                raise SymmetryError(
                    f"{norm.gain} is not constant and can only be folded into a copy of what reads it, which is tied; "
                    "pass untie=True or leave it to be decided"
                )
    return tuple(found)


def with_centring(
    stream: Stream, keep: Iterable[str] = (), *, writers: bool, tied: Sequence[Sequence[str]] = ()
) -> Stream:
    """Choose what is centred: readers whose norms leave no bias and, where nothing reads the stream itself, writers.

    Args:
        stream: The stream.
        keep: Gains that stay with their norms.
        writers: Whether nothing reads the stream but through norms.
        tied: Names of each tensor that is to stay tied.
    """
    if stream.kind != "layer":
        return stream
    bound: set[str] = set()
    chosen: set[tuple[str, int]] = set(stream.writers) if writers else set()
    for norm, readers in zip(stream.norms, stream.readers, strict=True):
        if norm.bias and (not takes_bias(readers) or norm.gain in set(keep)):
            bound.update(reader.name for reader in readers)
        else:
            chosen.update((reader.name, reader.axis) for reader in readers)
    for names in tied:
        if bound & set(names):
            bound |= set(names)
    return replace(stream, centred=tuple(sorted((name, axis) for name, axis in chosen if name not in bound)))
