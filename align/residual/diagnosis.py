"""Where a network stops to follow a rotation of its stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .probing import Bench, State, hooked

_CLOSE = 1e-6


@dataclass
class _Passed:
    """What entered and left a module in one call."""

    name: str
    kind: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def culprit(bench: Bench, still: State, turned: State, rotation: Tensor) -> str:
    """Name the first module whose output is neither the same nor rotated although all that entered it is, and say so.

    Args:
        bench: The network.
        still: Values of its parameters.
        turned: The same, rotated.
        rotation: The matrix, (units, units).
    """
    for before, after in zip(_watched(bench, still), _watched(bench, turned), strict=True):
        if all(_follows(x, y, rotation) for x, y in zip(before.outputs, after.outputs, strict=True)):
            continue
        if all(_follows(x, y, rotation) for x, y in zip(before.inputs, after.inputs, strict=True)):
            return f"{before.name} ({before.kind}) treats its units one by one"
        parent = before.name.rpartition(".")[0]
        where = f"the forward pass of {parent}" if parent else "the model's forward pass"
        return f"{where} treats its units one by one, before {before.name} ({before.kind})"
    return "the model's forward pass treats its units one by one"


def _watched(bench: Bench, state: State) -> list[_Passed]:
    found: list[_Passed] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if name:
            entered, left = (
                [x.clone() for x in tree_leaves(value) if isinstance(x, Tensor)] for value in (inputs, output)
            )
            found.append(_Passed(name, type(module).__name__, entered, left))

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        with hooked(model, note):
            yield

    bench.probe.watch({name: tensor.clone() for name, tensor in state.items()}, bench.batch, around)
    return found


def _follows(x: Tensor, y: Tensor, rotation: Tensor) -> bool:
    if x.shape != y.shape or not x.is_floating_point():
        return x.shape == y.shape and torch.equal(x, y)
    ways = [x, *(_turned(x, axis, rotation) for axis, size in enumerate(x.shape) if size == len(rotation))]
    size = float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0
    return any(torch.allclose(way, y, rtol=0.0, atol=_CLOSE * size) for way in ways)


def _turned(x: Tensor, axis: int, rotation: Tensor) -> Tensor:
    return (x.movedim(axis, -1) @ rotation.to(x).T).movedim(-1, axis)
