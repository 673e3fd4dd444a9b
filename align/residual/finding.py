"""Find the residual streams of a network, each with the proof by measurement that its basis may be rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...base.errors import SymmetryError
from ..symmetry import Symmetry
from ..verify import change
from .diagnosis import culprit
from .norms import Norm, find_norms
from .orthogonal import random_rotation
from .probing import Bench, State
from .readers import Uses, follow_norms
from .streams import Stream, fold, rotated, with_centring

TOLERANCE = 1e-9
# A rotation of half of the axes must change the outputs by this much, or nothing is proved.
_SEEN = 1e-6


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        streams: Groups whose basis may be rotated.
        refused: Groups that have norms, or might have been streams, and why they are none.
    """

    streams: tuple[Stream, ...]
    refused: dict[str, str]


def find_streams(symmetry: Symmetry, bench: Bench, seed: int = 0) -> Search:
    """Find the groups whose basis may be rotated once their norms are folded.

    Groups with norms that have parameters are looked at first; where there is no such stream, all free groups, for a
    norm without parameters leaves no trace but its effect.

    Args:
        symmetry: Of the network.
        bench: The network with inputs.
        seed: Of the rotations that are tried.

    Raises:
        SymmetryError: There is no stream, with the reason for each group that looked like one.
    """
    norms = find_norms(symmetry, bench, seed)
    proper = [norm for norm in norms if norm.kind in ("rms", "layer")]
    uses = follow_norms(symmetry, bench, proper)
    refused: dict[str, str] = {}
    streams: list[Stream] = []
    with_norms = {norm.group: None for norm in norms}
    free = [group.name for group in symmetry.groups if group.kind == "free" and group.size > 1]
    for name in [name for name in free if name in with_norms]:
        mine = [norm for norm in norms if norm.group == name]
        reason = _unfit(mine, uses, bench)
        found = reason or _proved(symmetry, bench, _stream(symmetry, name, mine, uses), seed)
        if isinstance(found, str):
            refused[name] = found
        else:
            streams.append(found)
    for name in [name for name in free if name not in with_norms] if not streams else []:
        found = _proved(symmetry, bench, _stream(symmetry, name, [], uses), seed)
        if isinstance(found, str):
            refused[name] = found
        else:
            streams.append(found)
    if not streams:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:4])
        raise SymmetryError(
            f"{bench.probe.name} has no residual stream that can be rotated; {reasons or 'it has no free group'}. "
            "A stream is read through RMS norm or layer norm only; match units by permutation instead"
        )
    return Search(tuple(streams), refused)


def _unfit(norms: Sequence[Norm], uses: dict[str, Uses], bench: Bench) -> str:
    """Say why gains cannot be folded; "" if they can."""
    for norm in norms:
        kind = type(bench.probe.module(norm.module)).__name__
        if norm.kind == "other":
            return f"{norm.module} ({kind}) does not normalise over all units together"
        if norm.kind == "scale":
            return f"{norm.module} ({kind}) scales each unit of the stream by itself"
        if uses[norm.module].others and norm.gain:
            return (
                f"the output of {norm.module} ({kind}) is not only read by weights, so that its gain cannot be folded "
                f"into them: {uses[norm.module].others[0]}"
            )
    readers: dict[tuple[str, int], str] = {}
    for norm in norms:
        for reader in uses[norm.module].readers:
            other = readers.setdefault((reader.name, reader.axis), norm.module)
            if other != norm.module:
                return f"{reader.name} reads the outputs of {other} and {norm.module}, which have gains of their own"
    return ""


def _stream(symmetry: Symmetry, name: str, norms: Sequence[Norm], uses: dict[str, Uses]) -> Stream:
    group = symmetry.by_name[name]
    kind = "layer" if any(norm.kind == "layer" for norm in norms) else "rms"
    readers = tuple(tuple(uses[norm.module].readers) for norm in norms)
    own = {(key, 0) for norm in norms for key in (norm.gain, norm.bias)}
    own |= {(reader.name, reader.axis) for several in readers for reader in several}
    writers = tuple(axis for axis in group.axes if axis not in own)
    return Stream(name, group.size, kind, tuple(norms), readers, writers)


def _proved(symmetry: Symmetry, bench: Bench, stream: Stream, seed: int) -> Stream | str:
    """Give the stream as it can be folded and rotated, or why it cannot."""
    plain = fold(stream, symmetry, bench.state)
    if (error := _error(bench, bench.outputs, plain)) > TOLERANCE:
        names = ", ".join(norm.module for norm in stream.norms)
        return f"folding {names} into what reads them changes the outputs by {error:.1e}"
    for writers in (True, False):
        chosen = with_centring(stream, writers=writers)
        if _error(bench, bench.outputs, fold(chosen, symmetry, bench.state)) <= TOLERANCE:
            break
    else:
        chosen = stream
    kinds = ("layer",) if stream.kind == "layer" else ("rms", "layer")
    for kind in kinds:
        tried = replace(chosen, kind=kind)
        folded = fold(tried, symmetry, bench.state)
        turn = turn_of(tried, seed)
        turned = rotated([tried], symmetry, folded, {stream.name: turn})
        if _error(bench, bench.outputs, turned) <= TOLERANCE:
            return tried if _is_seen(tried, symmetry, bench, folded, turned) else _UNSEEN
    folded = fold(chosen, symmetry, bench.state)
    turn = turn_of(replace(chosen, kind="layer"), seed)
    return culprit(bench, folded, rotated([chosen], symmetry, folded, {stream.name: turn}), turn)


_UNSEEN = "the outputs do not depend on it, so nothing is proved; pass example inputs that reach it"


def _is_seen(stream: Stream, symmetry: Symmetry, bench: Bench, folded: State, turned: State) -> bool:
    """Tell whether the outputs would show a rotation that is left out somewhere."""
    names = [name for name, tensor in turned.items() if tensor is not folded[name]]
    half = set(names[: len(names) // 2])
    mixed = {name: turned[name] if name in half else tensor for name, tensor in folded.items()}
    del stream, symmetry
    return _error(bench, bench.outputs, mixed) > _SEEN


def turn_of(stream: Stream, seed: int) -> Tensor:
    """Draw a rotation that a stream admits."""
    return random_rotation(stream.size, torch.Generator().manual_seed(seed), hold_ones=stream.hold_ones)


def _error(bench: Bench, before: list[Tensor], state: State) -> float:
    return change(before, bench.probe.run(state, bench.batch))


def check_exact(
    bench: Bench, symmetry: Symmetry, streams: Sequence[Stream], folded: State, seed: int = 0
) -> tuple[float, float]:
    """Measure on a network's own weights that folding, and a random rotation after it, leave its outputs as they are.

    Returns:
        The two relative changes.

    Raises:
        SymmetryError: One is larger than 1e-9, with the stream.
    """
    error = _error(bench, bench.given, folded)
    if error > TOLERANCE:
        names = ", ".join(stream.name for stream in streams)
        raise SymmetryError(f"folding the norms of stream {names} changes the outputs by {error:.1e} in float64")
    turns = {stream.name: turn_of(stream, seed) for stream in streams}
    turned = _error(bench, bench.given, rotated(streams, symmetry, folded, turns))
    if turned > TOLERANCE:
        for stream in streams:
            one = {stream.name: turns[stream.name]}
            if (alone := _error(bench, bench.given, rotated(streams, symmetry, folded, one))) > TOLERANCE:
                why = culprit(bench, folded, rotated(streams, symmetry, folded, one), turns[stream.name])
                raise SymmetryError(
                    f"rotating stream {stream.name} changes the outputs by {alone:.1e} in float64: {why}"
                )
        raise SymmetryError(f"rotating all streams together changes the outputs by {turned:.1e} in float64")
    return error, turned
