"""What every accumulator asks of a batch before it adds it, and of the pairs of layers that it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from ..base.errors import DataError

Pair = tuple[str, str]
Known = tuple[int, torch.device]
"""Units and device of a layer in earlier batches."""


def check_layers(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a batch without layers, or with other layers than earlier batches had.

    Args:
        names: Layers of the batch.
        known: Layers of earlier batches; none before the first.

    Raises:
        DataError: They differ.
    """
    names, known = tuple(names), tuple(known)
    if not names or (known and set(names) != set(known)):
        raise DataError(
            f"the batch holds the layers {', '.join(names) or '(none)'}; expected "
            f"{', '.join(known) or 'at least one'}, the same in every batch"
        )


def check_matrix(name: str, x: Tensor, known: Known | None = None) -> None:
    """Refuse what is no floating-point matrix of samples x units, or does not fit earlier batches.

    Raises:
        DataError: Its shape, dtype or device does not fit.
    """
    shape = tuple(x.shape)
    if x.ndim != 2 or not x.numel():
        raise DataError(f"layer {name!r} has shape {shape}; expected samples x units, not empty: see as_samples")
    if not x.is_floating_point():
        raise DataError(f"layer {name!r} of shape {shape} is {x.dtype}; expected floating point: convert it first")
    if known is None:
        return
    units, device = known
    if shape[1] != units:
        raise DataError(f"layer {name!r} has {shape[1]} units (shape {shape}); earlier batches had {units}")
    if x.device != device:
        raise DataError(f"layer {name!r} is on {x.device}, earlier batches on {device}; move them with .to()")


def check_pair(a: str, b: str, activations: Mapping[str, Tensor]) -> None:
    """Refuse two layers that are not of the same samples on one device.

    Raises:
        DataError: Their numbers of samples or their devices differ.
    """
    x, y = activations[a], activations[b]
    check_alike(a, b, (len(x), len(y)), (x.device, y.device))


def check_alike(a: str, b: str, counts: tuple[int, int], devices: tuple[torch.device, torch.device]) -> None:
    """Refuse two layers that differ in their number of samples or their device, wherever these are kept.

    Raises:
        DataError: They do.
    """
    if counts[0] != counts[1]:
        raise DataError(
            f"layers {a!r} and {b!r} have {counts[0]} and {counts[1]} samples, but a pair needs the same samples; "
            "where they differ in positions, read both with positions='mean' or positions='features', or leave the "
            "pair out"
        )
    if devices[0] != devices[1]:
        raise DataError(f"layers {a!r} and {b!r} are on {devices[0]} and {devices[1]}; move them to one device")


def unique_pairs(pairs: str | Iterable[Pair]) -> tuple[Pair, ...]:
    """Read pairs of layer names, each once in the order that came first; "all" and "none" name none.

    Raises:
        DataError: Something else than these.

    >>> unique_pairs([("a", "b"), ("b", "a"), ("a", "a")])
    (('a', 'b'), ('a', 'a'))
    """
    if isinstance(pairs, str):
        if pairs not in ("all", "none"):
            raise DataError(f"pairs is {pairs!r}; expected 'all', 'none' or pairs of names")
        return ()
    unique: dict[frozenset[str], Pair] = {}
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"pairs holds {pair!r}; expected pairs of names, such as ('conv1', 'conv2')")
        a, b = pair
        unique.setdefault(frozenset((a, b)), (a, b))
    return tuple(unique.values())


def check_same(what: str, states: Sequence[Mapping[str, Any]], holders: Sequence[str]) -> None:
    """Refuse to join accumulators that differ in something that they must share.

    Args:
        what: What they hold, in a message.
        states: For each accumulator what must agree: sets, mappings or plain values by name; None is not known yet.
        holders: What to call each accumulator.

    Raises:
        DataError: Two of them differ. It depends on the arguments alone: where all processes of a group gave the same
            ones, all raise it.

    >>> check_same("moments", [{"units": {"x": 3}}, {"units": None}, {"units": {"x": 4}}], ["a", "b", "c"])
    Traceback (most recent call last):
    isthmus.base.errors.DataError: cannot join moments of other units: {'x': 3} and {'x': 4} (a and c)
    """
    for key in states[0]:
        known = [(state[key], holder) for state, holder in zip(states, holders, strict=True) if state[key] is not None]
        for value, holder in known[1:]:
            first, first_holder = known[0]
            if value != first:
                raise DataError(
                    f"cannot join {what} of other {key}: {_difference(first, value)} and "
                    f"{_difference(value, first)} ({first_holder} and {holder})"
                )


def _difference(value: Any, other: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: part for name, part in value.items() if name not in other or other[name] != part}
    return sorted(value - other) if isinstance(value, Set) else value
