"""Places in a network at which an affine map of each unit can be fused into parameters: what a repair can restore."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...base.calibration import Handles, Site, Statistics


class UnitSite(Site):
    """Units whose mean and standard deviation are to become given ones, by an affine map of each.

    Attributes:
        target: Mean and standard deviation of each unit, (units,), float64; None: nothing is wanted yet.
        norm: Whether it is the output of a norm.
        fixed: Why nothing can be fused here, or "".
        normed: Whether a batch norm with running statistics was seen to read it.
        given: The latest output, as long as it is alive.
    """

    def __init__(self, name: str, module: nn.Module, *, norm: bool = False) -> None:
        super().__init__(name, module)
        self.target: tuple[Tensor, Tensor] | None = None
        self.norm = norm
        self.fixed = ""
        self.normed = False
        self.given: weakref.ref[Tensor] | None = None

    @property
    @abstractmethod
    def shifts(self) -> bool:
        """Whether units can be shifted as well as scaled."""

    @abstractmethod
    def fuse(self, scale: Tensor, shift: Tensor) -> None:
        """Put y ↦ scale y + shift, each (units,), into the parameters."""

    @torch.no_grad()
    def settle(self, found: Statistics) -> None:
        """Fuse the map from what was found to what is wanted."""
        if self.target is not None and not self.fixed:
            self.fuse(*self.affine(found))

    def affine(self, found: Statistics) -> tuple[Tensor, Tensor]:
        """Give the scale and the shift that take units from what was found to what is wanted."""
        assert self.target is not None
        mean, std = found.average, found.variance().sqrt()
        wanted, wide = (each.to(mean) for each in self.target)
        varies = self._varies(found)
        scale = torch.where(varies, wide / torch.where(varies, std, torch.ones_like(std)), torch.ones_like(std))
        return scale, wanted - scale * mean if self.shifts else torch.zeros_like(mean)

    def _varies(self, found: Statistics) -> Tensor:
        # Rounding makes a constant unit vary a little; scaled up, that would be noise.
        return found.variance().sqrt() > torch.finfo(self.tensors()[0].dtype).eps * found.average.abs()

    def error(self, found: Statistics) -> float:
        """Compare standard deviations and, where units can be shifted, means."""
        if self.target is None or self.fixed:
            return 0.0
        wanted, wide = (each.to(found.average) for each in self.target)
        counted = self._varies(found) & (wide > 0)
        off = (found.variance().sqrt() / wide - 1).abs()
        if self.shifts:
            off = torch.maximum(off, (found.average - wanted).abs() / wide)
        return float(off[counted].max()) if counted.any() else 0.0


class LayerSite(UnitSite):
    """The output of a layer that has a weight for each unit.

    Attributes:
        axis: The axis of the units in the output, from the end.
        weight: The tensor that is scaled.
        bias: The tensor that is scaled and shifted, or None.
    """

    def __init__(
        self, name: str, module: nn.Module, axis: int, weight: Tensor, bias: Tensor | None, *, norm: bool = False
    ) -> None:
        super().__init__(name, module, norm=norm)
        self.axis, self.weight, self.bias = axis, weight, bias

    @property
    def shifts(self) -> bool:
        """Whether there is a bias."""
        return self.bias is not None

    def tensors(self) -> list[Tensor]:
        """List weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def attach(self) -> RemovableHandle:
        """Watch the outputs; while steering, each is given the wanted statistics."""
        return self.module.register_forward_hook(lambda _, __, output: self.seen(output))

    def seen(self, output: Any) -> Any:
        """Add what the module gives to what was found; give what is to take its place, or None."""
        values = self.output(output)
        self.given = weakref.ref(values)
        batch = self.note(values)
        if not self.steering or self.target is None or self.fixed:
            return None
        return self.replaced(output, self._moved(values, batch))

    def output(self, output: Any) -> Tensor:
        """Find the units in what the module gives."""
        return output

    def replaced(self, output: Any, values: Tensor) -> Any:
        """Put other values into what the module gives."""
        return values

    def _moved(self, values: Tensor, batch: Statistics) -> Tensor:
        scale, shift = self.affine(batch)
        wide = torch.promote_types(values.dtype, torch.float32)
        shape = self.column(scale).shape
        scale, shift = (each.view(shape).to(wide) for each in (scale, shift))
        return torch.addcmul(shift, values.to(wide), scale).to(values.dtype)

    def column(self, units: Tensor) -> Tensor:
        """Shape a value of each unit such that it fits the output."""
        return units.view([-1] + [1] * (-self.axis - 1))

    def cuts(self, values: Tensor) -> bool:
        """Whether the first axis is another than that of the units."""
        return values.ndim > -self.axis

    def samples(self, values: Tensor) -> Tensor:
        """Read an output as samples x units."""
        units_last = values.movedim(self.axis, -1)
        if self.mask is not None and units_last.shape[:-1] == self.mask.shape:
            return units_last[self.mask]
        return units_last.flatten(0, -2)

    @torch.no_grad()
    def fuse(self, scale: Tensor, shift: Tensor) -> None:
        """Scale the rows of the weight; scale and shift the bias."""
        self.weight.copy_(self.scaled(scale))
        if self.bias is not None:
            self.bias.copy_(self.bias * scale + shift)

    def scaled(self, scale: Tensor) -> Tensor:
        """Give the weight with each unit scaled."""
        return self.weight * scale.view([-1] + [1] * (self.weight.ndim - 1))


class TransposedSite(LayerSite):
    """The output of a transposed convolution, whose weight is (inputs, units of a group, …)."""

    def scaled(self, scale: Tensor) -> Tensor:
        """Give the weight with each unit scaled."""
        groups = self.module.groups
        assert isinstance(groups, int)
        units = scale.view(groups, 1, -1, *[1] * (self.weight.ndim - 2))
        return (self.weight.unflatten(0, (groups, -1)) * units).flatten(0, 1)


class ColumnSite(LayerSite):
    """The output of a layer whose weight has its units on the last axis: embeddings, and linear layers of GPT-2."""

    @property
    def shifts(self) -> bool:
        """Embeddings are shifted as a whole."""
        return self.bias is not None or isinstance(self.module, nn.Embedding)

    @torch.no_grad()
    def fuse(self, scale: Tensor, shift: Tensor) -> None:
        """Scale the columns of the weight, and shift the bias or, of an embedding, every row."""
        weight = self.weight * scale
        self.weight.copy_(weight if self.bias is not None or not self.shifts else weight + shift)
        if self.bias is not None:
            self.bias.copy_(self.bias * scale + shift)


class ElementSite(LayerSite):
    """The output of a norm over the last axes, each of whose elements is a unit: layer norm, RMS norm."""

    def samples(self, values: Tensor) -> Tensor:
        """Read an output as samples x elements."""
        kept = self.weight.ndim
        if self.mask is not None and values.shape[:-kept] == self.mask.shape:
            return values[self.mask].flatten(1)
        return values.flatten(-kept).reshape(-1, self.weight.numel())

    def column(self, units: Tensor) -> Tensor:
        """Shape a value of each element like the weight."""
        return units.view(self.weight.shape)

    @torch.no_grad()
    def fuse(self, scale: Tensor, shift: Tensor) -> None:
        """Scale the weight; scale and shift the bias."""
        scale, shift = self.column(scale), self.column(shift)
        self.weight.copy_(self.weight * scale)
        if self.bias is not None:
            self.bias.copy_(self.bias * scale + shift)


class OwnNormSite(ElementSite):
    """The output of a norm of the user's own, left alone unless it is seen to be proportional to the weight."""

    tried = False

    def attach(self) -> RemovableHandle:
        """Watch the outputs; the first one is tried with twice the weight."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self.tried:
                self.tried = True
                doubled = self._doubled(args, kwargs)
                bias = 0 if self.bias is None else self.bias
                if not torch.allclose(doubled - bias, 2 * (output - bias), rtol=1e-3, atol=1e-5):
                    self.fixed = "its output is not proportional to its weight"
            return self.seen(output)

        return self.module.register_forward_hook(hook, with_kwargs=True)

    def _doubled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        saved = self.weight.clone()
        try:
            self.weight.mul_(2)
            return self.module.forward(*args, **kwargs)
        finally:
            self.weight.copy_(saved)


class ProjectionSite(UnitSite):
    """The queries, keys or values of `nn.MultiheadAttention`, which no module computes.

    Attributes:
        index: 0 for queries, 1 for keys, 2 for values.
    """

    def __init__(self, name: str, module: nn.MultiheadAttention, index: int) -> None:
        super().__init__(f"{name}.{'qkv'[index]}", module)
        self.index = index
        packed = module.in_proj_weight
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[index]
        weight = packed.detach().chunk(3)[index] if packed is not None else separate.detach()
        self.weight = weight
        self.bias = None if module.in_proj_bias is None else module.in_proj_bias.detach().chunk(3)[index]

    @property
    def shifts(self) -> bool:
        """Whether there is a bias."""
        return self.bias is not None

    def tensors(self) -> list[Tensor]:
        """List the rows of weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def attach(self) -> Handles:
        """Compute the projection before the module does; while steering, hold its weights right during the call."""
        saved: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = ("query", "key", "value")[self.index]
            values = args[self.index] if len(args) > self.index else kwargs[named]
            batch = self.note(nn.functional.linear(values, self.weight, self.bias))
            if self.steering:
                saved[:] = [tensor.clone() for tensor in self.tensors()]
                self.settle(batch)

        def after(*_: Any) -> None:
            for tensor, values in zip(self.tensors(), saved, strict=False):
                tensor.copy_(values)
            saved.clear()

        return Handles(
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after),
        )

    def samples(self, values: Tensor) -> Tensor:
        """Read (…, units) as samples x units."""
        if self.mask is not None and values.shape[:-1] == self.mask.shape:
            return values[self.mask]
        return values.flatten(0, -2)

    @torch.no_grad()
    def fuse(self, scale: Tensor, shift: Tensor) -> None:
        """Scale rows of the weight; scale and shift those of the bias."""
        self.weight.copy_(self.weight * scale[:, None])
        if self.bias is not None:
            self.bias.copy_(self.bias * scale + shift)


class AttentionSite(LayerSite):
    """The output of `nn.MultiheadAttention`, whose projection is no call of a module either."""

    def output(self, output: Any) -> Tensor:
        """Find the mixed values beside the weights of attention."""
        return output[0]

    def replaced(self, output: Any, values: Tensor) -> Any:
        """Leave the weights of attention as they are."""
        return (values, *output[1:])
