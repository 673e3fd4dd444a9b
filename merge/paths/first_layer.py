"""The first layer of a network at many points of an affine space: a product per network instead of one per point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...base.interpolation import Span, combine
from .large_layers import linear, reachable, untouched

# Below so many inputs to a unit, adding outputs up costs as much as computing them.
_FEWEST_INPUTS = 64


@dataclass(frozen=True)
class _Entry:
    """What the layer gave in each network, and for which input."""

    input: Tensor
    outputs: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return sum(_size(tensor) for tensor in (self.input, *self.outputs))


class FirstLayer:
    """Lends the outputs of the first layer from point to point, as long as its input stays the same.

    A linear or convolutional layer is affine in its parameters: at the combination c of networks it gives
    Σ cᵢ (Wᵢ x + bᵢ). The first one mostly sees the same x at each point, the data as it is or as it was normalised;
    whether it does is looked up in the numbers, at each call. Where it does not, the layer computes as always.

    Args:
        hull: The networks; for as long as this is entered, the first layer of its scratch network asks here.
        memory: How many bytes may be held.
    """

    def __init__(self, hull: Span, memory: float) -> None:
        self._hull = hull
        self._memory = memory
        self._free = memory
        self._candidates: dict[str, nn.Module] = {}
        self._forwards: dict[str, Callable[..., Tensor]] = {}
        self._entries: dict[int, _Entry | None] = {}
        self._batch = 0
        self._coefficients: Sequence[float] = ()
        self._chosen = False

    def __enter__(self) -> FirstLayer:
        modules = dict(self._hull.model.named_modules())
        if self._memory and reachable(self._hull.model):
            for name, module in modules.items():
                if type(module) in _PRODUCTS and untouched(module):
                    self._candidates[name] = module
                    self._forwards[name] = module.forward
                    module.forward = partial(self._run, name, module)
        return self

    def __exit__(self, *_: object) -> None:
        self._leave(self._candidates)

    def at(self, batch: int, coefficients: Sequence[float]) -> None:
        """Say which batch comes, by its number, and at which point."""
        self._batch, self._coefficients = batch, coefficients

    def forget(self) -> None:
        """Let go of all that is held: the numbers of batches begin anew."""
        self._entries, self._free = {}, self._memory

    def _leave(self, names: Any) -> None:
        for name in list(names):
            layer, before = self._candidates.pop(name), self._forwards[name]
            del layer.forward
            if isinstance(before, partial):
                layer.forward = before

    def _run(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        if not self._chosen:
            self._chosen = True
            self._leave([other for other in self._candidates if other != name])
        entry = self._entry(name, layer, x)
        if entry is None:
            return self._forwards[name](x)
        return combine(entry.outputs, self._coefficients, torch.empty_like(entry.outputs[0]))

    def _entry(self, name: str, layer: nn.Module, x: Tensor) -> _Entry | None:
        try:
            if self._batch in self._entries:
                entry = self._entries[self._batch]
                if entry is None or torch.equal(entry.input, x):
                    return entry
            elif self._fits(name, layer, x):
                entry = self._entries[self._batch] = self._compute(name, layer, x)
                return entry
        except RuntimeError:  # tensors without values of their own, as inside vmap, or too large
            self.forget()
        self._leave([name] if name in self._candidates else [])
        return None

    def _fits(self, name: str, layer: nn.Module, x: Tensor) -> bool:
        if any(parameter not in self._hull.values for parameter in _names(name, layer)):
            return False
        weights = self._hull.values[_names(name, layer)[0]]
        types = {x.dtype, *(weight.dtype for weight in weights)}
        return (
            type(x) is Tensor
            and types in ({torch.float32}, {torch.float64})
            and math.prod(weights[0].shape[1:]) >= _FEWEST_INPUTS
        )

    def _compute(self, name: str, layer: nn.Module, x: Tensor) -> _Entry | None:
        product = _PRODUCTS[type(layer)]
        parameters = zip(*(self._hull.values[parameter] for parameter in _names(name, layer)), strict=True)
        outputs = []
        for each in parameters:
            outputs.append(product(layer, x, each[0], each[1] if len(each) > 1 else None))
            if (1 + len(outputs)) * _size(outputs[0]) > self._free:
                return None
        entry = _Entry(x.clone(), tuple(outputs))
        # 0 · ∞ is NaN, and a product under autocast is coarser than its factors
        exact = all(output.dtype == x.dtype and bool(output.isfinite().all()) for output in outputs)
        if not exact or entry.size > self._free:
            return None
        self._free -= entry.size
        return entry


def _linear(_: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight, bias)


def _convolution(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layer._conv_forward(x, weight, bias)  # pads as the layer does


_PRODUCTS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
}


def _names(name: str, layer: nn.Module) -> list[str]:
    prefix = f"{name}." if name else ""
    return [f"{prefix}{part}" for part in ("weight", "bias") if getattr(layer, part) is not None]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
