"""What every merging of state dicts rests on: precision, tied tensors, and tensors that are no weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..base.architecture import State, full_state
from ..base.running import copied

RUNNING = ("running_mean", "running_var")


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Name the type to compute in: float32, or better where a tensor is.

    >>> accumulator(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float16))
    torch.float32
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def statistics_in(names: Iterable[str], given: Collection[str] | None) -> set[str]:
    """Name the tensors that are statistics of activations rather than weights.

    A sum of differences can make a variance negative, so these are averaged, whatever is done with the weights.

    Args:
        names: Of all tensors.
        given: Those that the caller knows to be; None: those called `running_mean` or `running_var`.

    >>> sorted(statistics_in(["norm.weight", "norm.running_var"], None))
    ['norm.running_var']
    """
    if given is not None:
        return set(names) & set(given)
    return {name for name in names if name.rpartition(".")[2] in RUNNING}


def tied(states: Sequence[State], names: Iterable[str]) -> dict[str, str]:
    """Find tensors that are one and the same under several names, as an embedding and a decoder.

    They share their memory; or, as a file holds a copy for each name, they are equal in each network, while the
    networks differ and it is no constant, such as the ones that a norm begins with.

    Args:
        states: At least one, of the same names and shapes.
        names: The tensors to be compared.

    Returns:
        For each further name of a tensor the first of its names.

    >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    >>> tied([{"in": a, "out": a.clone()}, {"in": b, "out": b.clone()}], ["in", "out"])
    {'out': 'in'}
    """
    seen: dict[tuple[object, ...], list[str]] = {}
    found: dict[str, str] = {}
    for name in names:
        tensor = states[0][name]
        like = seen.setdefault((tensor.dtype, tensor.shape, *_some_entries(tensor)), [])
        first = next((other for other in like if _one(states, name, other)), None)
        if first is None:
            like.append(name)
        else:
            found[name] = first
    return found


def rebuilt(model: nn.Module, state: State) -> nn.Module:
    """Copy a network and fill the copy with other parameters and buffers.

    Args:
        model: The network; it is not changed.
        state: Tensors by name, for each of its parameters and buffers.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> rebuilt(net, {"weight": torch.tensor([[2.0]])}).weight.item()
    2.0
    """
    merged = copied(model)
    with torch.no_grad():
        for name, place in full_state(merged).items():
            place.copy_(state[name])
    return merged


def _one(states: Sequence[State], name: str, other: str) -> bool:
    pairs = [(state[name], state[other]) for state in states]
    if all(a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and len(a.reshape(-1)) for a, b in pairs):
        return True
    if not all(torch.equal(a, b.to(a.device)) for a, b in pairs):
        return False
    constant = all(bool((a == a.reshape(-1)[:1]).all()) for a, _ in pairs)
    first = pairs[0][0]
    return not constant and any(not torch.equal(first, a.to(first.device, first.dtype)) for a, _ in pairs[1:])


def _some_entries(tensor: Tensor) -> tuple[object, ...]:
    flat = tensor.detach().reshape(-1)
    return tuple(flat[[0, len(flat) // 2, len(flat) - 1]].tolist()) if len(flat) else ()
