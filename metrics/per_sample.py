"""Gradients of a network's outputs for each input on its own: what Fisher information is made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from ..base.batches import Batch
from ..base.errors import DataError
from ..base.evaluation import find_logits

Gradients = dict[str, Tensor]

_NUMBERS = 2**24
"""How many numbers of per-sample gradients are held at once; more take longer, as they leave the cache."""


def per_sample_gradients(
    model: nn.Module, batch: Batch, cotangents: Tensor, chunk: int | None = None
) -> Iterator[Gradients]:
    """Give the gradient of ⟨cotangent, output⟩ for each input of a batch and each of its cotangents, some at a time.

    By `vmap` over inputs and cotangents; one by one where an operator of the network cannot be mapped (control flow
    that depends on the data, functions without a rule). Inputs must not act on one another: hold the network in
    evaluation mode.

    Args:
        model: The network, in evaluation mode.
        batch: N inputs, on its device.
        cotangents: (N, cotangents, *shape of the output of one input).
        chunk: How many inputs at once. Default: as many as 2^24 numbers hold.

    Yields:
        By name of the parameter, tied ones once: (inputs, cotangents, *shape), for each chunk of inputs, and of
        cotangents where those of one input are too many.

    >>> batch = Batch((torch.tensor([[1.0], [2.0]]),))
    >>> [found] = per_sample_gradients(nn.Linear(1, 1), batch, torch.ones(2, 1, 1))
    >>> found["weight"].flatten(), found["bias"].flatten()
    (tensor([1., 2.]), tensor([1., 1.]))
    """
    parameters = parameters_of(model)
    room = max(1, _NUMBERS // max(1, sum(p.numel() for p in parameters.values())))
    at_once = min(cotangents.shape[1], room)
    chunk = max(1, room // at_once) if chunk is None else chunk
    one_by_one = False
    for start in range(0, len(batch), chunk):
        part = _part(batch, start, start + chunk)
        for some in cotangents[start : start + chunk].split(at_once, 1):
            found = None if one_by_one else _mapped(model, parameters, part, some)
            one_by_one = found is None
            yield _one_by_one(model, parameters, part, some) if found is None else found


def parameters_of(model: nn.Module) -> Gradients:
    """Name the parameters that can have gradients, tied ones once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}


def _mapped(model: nn.Module, parameters: Gradients, batch: Batch, cotangents: Tensor) -> Gradients | None:
    values, rebuild = _take_apart(batch)

    def gradients(rows: tuple[Tensor, ...], directions: Tensor) -> Gradients:
        single = rebuild([row[None] for row in rows])
        pull = vjp(lambda p: logits(_call(model, p, single))[0], parameters)[1]
        return vmap(lambda direction: pull(direction)[0])(directions)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")  # torch maps it by a loop
            return vmap(gradients)(tuple(values), cotangents)
    except RuntimeError:  # what torch raises for whatever it cannot map; a fault of the network itself comes again
        return None


def _one_by_one(model: nn.Module, parameters: Gradients, batch: Batch, cotangents: Tensor) -> Gradients:
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    rows = []
    for index in range(len(batch)):
        with torch.enable_grad():
            output = logits(_call(model, leaves, _part(batch, index, index + 1)))[0]
        found = [
            torch.autograd.grad(output, list(leaves.values()), direction, retain_graph=True, materialize_grads=True)
            for direction in cotangents[index]
        ]
        rows.append([torch.stack(parts) for parts in zip(*found, strict=True)])
    return {name: torch.stack([row[place] for row in rows]) for place, name in enumerate(leaves)}


def _call(model: nn.Module, parameters: Gradients, batch: Batch) -> Any:
    return functional_call(model, parameters, batch.args, dict(batch.kwargs), tie_weights=True)


def _part(batch: Batch, start: int, stop: int) -> Batch:
    values, rebuild = _take_apart(batch)
    return rebuild([value[start:stop] for value in values])


def _take_apart(batch: Batch) -> tuple[list[Tensor], Callable[[list[Tensor]], Batch]]:
    """Give the inputs that have an axis of samples, and a function that puts others in their place."""
    named = {**dict(enumerate(batch.args)), **batch.kwargs}
    count = len(batch)
    own = [key for key, value in named.items() if isinstance(value, Tensor) and value.shape[:1] == (count,)]

    def rebuild(values: list[Tensor]) -> Batch:
        found = {**named, **dict(zip(own, values, strict=True))}
        return Batch(tuple(found[index] for index in range(len(batch.args))), {key: found[key] for key in batch.kwargs})

    return [named[key] for key in own], rebuild


def logits(outputs: Any) -> Tensor:
    """Find the logits in what a network gave: itself, an entry or an attribute `logits`.

    Raises:
        DataError: There are none.
    """
    found = find_logits(outputs)
    if found is None or found.ndim < 2:
        raise DataError(
            f"the network's output is a {type(outputs).__name__}, in which there is no tensor (inputs, …, classes); "
            "wrap the network in one that gives its logits"
        )
    return found
