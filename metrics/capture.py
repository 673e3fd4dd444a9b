"""Activations of a network, copied while it runs, and their reading as samples x units."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from ..base.errors import DataError, LayerNotFoundError, NotFiniteError, nearest
from ..base.finite import all_finite

Positions = Literal["samples", "features", "mean"]

_UNITS_ON_AXIS_1 = (
    *(_ConvNd, _NormBase, nn.GroupNorm),
    *(_MaxPoolNd, _AvgPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd),
)
# Their children hold weights and are never called.
_WHOLE = (nn.MultiheadAttention,)
# Exact types only: a subclass of LayerNorm may well normalise axis 1.
_UNITS_ON_LAST_AXIS = frozenset({nn.Linear, nn.Bilinear, nn.LayerNorm, nn.Embedding, nn.RNN, nn.LSTM, nn.GRU})


class Activations(dict[str, Tensor]):
    """Activations of the latest forward call by layer name, in execution order.

    Attributes:
        origins: The name of the module that each activation came from.
    """

    def __init__(self, requested: Iterable[str] = (), reuse: bool = False) -> None:
        super().__init__()
        self._copies: dict[str, Tensor] | None = {} if reuse else None
        self.origins: dict[str, str] = {}
        self._requested = frozenset(requested)
        self._calls: Counter[str] = Counter()
        self._without_tensor: dict[str, str] = {}

    def clear(self) -> None:
        """Forget the latest forward call."""
        super().clear()
        self.origins.clear()
        self._calls.clear()
        self._without_tensor.clear()

    def record(self, module: str, value: Any) -> None:
        """Copy the tensors in one input or output of a module."""
        self._calls[module] += 1
        call = module if self._calls[module] == 1 else f"{module}#{self._calls[module]}"
        tensors = list(_tensors(value, call))
        if not tensors:
            self._without_tensor[call] = _describe(value)
        for name, tensor in tensors:
            wholes = (name[: part.start()] for part in re.finditer(r"\[", name))
            if not self._requested.isdisjoint((module, name, *wholes)):
                self[name] = self._copy(name, tensor.detach())
                self.origins[name] = module

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if self._copies is None or tensor.layout != torch.strided or tensor.is_nested:
            return tensor.clone()
        copy = self._copies.get(name)
        if copy is None or (copy.shape, copy.dtype, copy.device) != (tensor.shape, tensor.dtype, tensor.device):
            self._copies[name] = tensor.clone()
            return self._copies[name]
        return copy.copy_(tensor)

    def __missing__(self, name: str) -> Tensor:
        parts = [key for key in self if key.startswith(f"{name}[")]
        if parts:
            raise LayerNotFoundError(f"layer {name!r} has several outputs; name one of {', '.join(parts)}")
        if name in self._without_tensor:
            raise LayerNotFoundError(
                f"layer {name!r} gave no tensor but {self._without_tensor[name]}; name a layer that gives one"
            )
        if name in self._requested:
            raise LayerNotFoundError(
                f"layer {name!r} exists but was not called in the latest forward call, or has no such output"
            )
        raise LayerNotFoundError(f"no activation of layer {name!r} was captured{nearest(name, self)}")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{name}[{key}]")
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _tensors(part, f"{name}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name, None), f"{name}[{field.name}]")


def _describe(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind} of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"a {kind} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return "None" if value is None else f"a {kind}"


@contextmanager
def capture(
    model: nn.Module, layers: str | Iterable[str] | None = None, *, inputs: bool = False, reuse: bool = False
) -> Iterator[Activations]:
    """Copy the activations of chosen layers whenever the model runs.

    Each forward call of `model` first empties the mapping, then fills it in execution order. A module called
    again is `relu#2`, `relu#3`; a part of a tuple, list, mapping or dataclass is `lstm[0]`, `lstm[1][0]`, `block[key]`.

    Args:
        model: The network. Its hooks are as before once the context is left.
        layers: Names as in `model.named_modules()` or as captured (`relu#2`, `lstm[0]`); `""` is the model itself.
            Default: every module without children, of which those that run appear.
        inputs: Capture the first tensor that goes into each layer in place of what comes out.
        reuse: Write the copies of a call over those of the call before, where shapes agree: faster, since fresh memory
            costs more than copying, but what was taken out before changes.

    Yields:
        A dict of activations by name: detached copies, on the device of the model.

    Raises:
        LayerNotFoundError: The model has no such layer; also on reading one that was not called.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    >>> with capture(model) as activations:
    ...     _ = model(torch.zeros(5, 3))
    >>> {name: tuple(activation.shape) for name, activation in activations.items()}
    {'0': (5, 4), '1': (5, 4)}
    """
    requested = leaf_layers(model) if layers is None else [layers] if isinstance(layers, str) else list(layers)
    modules = _resolve(model, requested)
    activations = Activations(requested, reuse)
    with ExitStack() as hooks:
        handle = model.register_forward_pre_hook(lambda *_: activations.clear(), prepend=True)
        hooks.callback(handle.remove)
        for name, module in modules.items():
            hooks.callback(_hook(module, name, activations, inputs).remove)
        yield activations


def leaf_layers(model: nn.Module) -> list[str]:
    """Name the modules of a model that have no children.

    A reparametrised layer (weight norm, spectral norm, …) counts as one module: its parametrisations return weights. So
    does `nn.MultiheadAttention`, whose projection is never called.

    Raises:
        LayerNotFoundError: The model itself is the only module.
    """
    wholes = tuple(f"{name}." for name, module in model.named_modules() if name and isinstance(module, _WHOLE))
    names = [
        name
        for name, module in model.named_modules()
        if name
        and "parametrizations" not in name.split(".")
        and not name.startswith(wholes)
        and (isinstance(module, _WHOLE) or all(child == "parametrizations" for child, _ in module.named_children()))
    ]
    if not names:
        raise LayerNotFoundError(f"{type(model).__name__} has no submodules; capture it itself with layers=['']")
    return names


def _resolve(model: nn.Module, requested: list[str]) -> dict[str, nn.Module]:
    known = dict(model.named_modules(remove_duplicate=False))
    modules = {}
    for name in requested:
        module = name if name in known else re.split(r"[#\[]", name, maxsplit=1)[0]
        if module not in known or not isinstance(name, str):
            raise LayerNotFoundError(f"{type(model).__name__} has no layer {name!r}{nearest(str(name), known)}")
        modules[module] = known[module]
    return modules


def _hook(module: nn.Module, name: str, activations: Activations, inputs: bool) -> Any:
    if not inputs:
        return module.register_forward_hook(lambda _module, _args, output: activations.record(name, output))

    def record_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, *kwargs.values())
        activations.record(name, next((value for value in values if isinstance(value, Tensor)), None))

    return module.register_forward_pre_hook(record_input, with_kwargs=True)


def unit_axes(model: nn.Module, activations: Activations) -> dict[str, int | None]:
    """Tell the axis of the units of each activation from the kind of module that it came from.

    Convolutions, batch and group normalisation and pooling have their units on axis 1; linear, embedding, recurrent and
    layer normalisation modules on the last; a module with a weight of one axis, such as a normalisation of your own,
    where the weight fits. Any other module takes the axis of the latest captured activation of the same shape, and None
    where there is none.
    """
    axes: dict[str, int | None] = {}
    latest: dict[torch.Size, int | None] = {}
    for name, activation in activations.items():
        if activation.is_nested:  # without a shape
            axes[name] = None
            continue
        module = model.get_submodule(activations.origins[name])
        if isinstance(module, _UNITS_ON_AXIS_1):
            latest[activation.shape] = 1
        elif type(module) in _UNITS_ON_LAST_AXIS:
            latest[activation.shape] = -1
        elif (axis := _weighted_axis(module, activation)) is not None:
            latest[activation.shape] = axis
        axes[name] = latest.get(activation.shape)
    return axes


def _weighted_axis(module: nn.Module, activation: Tensor) -> int | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or activation.ndim < 2:
        return None
    fitting = [axis for axis in (1, -1) if activation.shape[axis] == len(weight)]
    return fitting[0] if len(fitting) == 1 else None


def check_positions(positions: str) -> None:
    """Refuse an unknown way to treat positions.

    Raises:
        DataError: With the known ones.
    """
    known = get_args(Positions)
    if positions not in known:
        raise DataError(f"unknown positions {positions!r}; known: {', '.join(known)}")


def as_mask(values: Any, count: int, name: str = "mask") -> Tensor:
    """Read a mask of tokens.

    Args:
        values: (N, tokens), bool or numbers 0 and 1; true where a token is real, false where it is padding.
        count: N, the number of samples.
        name: What to call it in a message.

    Returns:
        (N, tokens), bool.

    Raises:
        DataError: It is nothing of this kind, or all tokens of a sample are masked.

    >>> as_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]), 2)
    tensor([[ True,  True, False],
            [ True, False, False]])
    """
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != count:
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"type {type(values).__name__}"
        raise DataError(
            f"{name} has {found}; expected (N, tokens) = ({count}, tokens) of 0 and 1, 1 for a real token: name "
            "another input, or read without a mask by mask=None"
        )
    mask = values != 0
    if not (mask == values).all():
        raise DataError(f"{name} of shape {tuple(values.shape)} holds other values than 0 and 1; 1 is a real token")
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise DataError(f"{name} of shape {tuple(values.shape)} masks every token of sample {empty[0]}: leave it out")
    return mask


def masks(mask: Tensor, activation: Tensor, unit_axis: int | None = None) -> bool:
    """Tell whether an activation has one row for each token of a mask.

    It has where its shape without the axis of the units is the shape (N, tokens) of the mask, or (N · tokens). Tokens
    on a third axis, as in (N, heads, tokens, …), are not looked for.

    >>> mask = torch.ones(2, 5, dtype=torch.bool)
    >>> [masks(mask, torch.zeros(shape)) for shape in ((2, 5, 8), (10, 8), (2, 8), (2, 4, 5, 5))]
    [True, True, False, False]
    """
    if not 2 <= activation.ndim <= 3:
        return False
    rest = list(activation.shape)
    del rest[-1 if unit_axis is None or activation.ndim == 2 else unit_axis]
    return rest in (list(mask.shape), [mask.numel()])


def as_samples(
    activation: Tensor,
    positions: Positions = "samples",
    *,
    unit_axis: int | None = None,
    mask: Tensor | None = None,
    name: str = "activation",
) -> Tensor:
    """Read an activation as a matrix of samples x units.

    Args:
        activation: Of shape (N, units), (N, tokens, units), (N, units, height, width) or (N, units, d, h, w).
        positions: Tokens or places of a feature map become samples ("samples", as in Li et al. 2015), are flattened
            into features in the order of the axes ("features", as in Kornblith et al. 2019), or averaged ("mean").
        unit_axis: The axis of the units. Default: 1 of four or five axes, else the last.
        mask: (N, tokens), bool or 0 and 1, for an activation of (N, tokens, units) or (N · tokens, units): tokens where
            it is 0 become no samples and add nothing to a mean. Their values may be anything, NaN included.
        name: What to call the activation in a message.

    Returns:
        (N · positions, units), (N, positions · units) or (N, units); with a mask (real tokens, units) or (N, units). A
        two-dimensional activation without a mask is returned as it is.

    Raises:
        DataError: It is no floating-point tensor with an axis of samples and an axis of units; the mask does not fit,
            or masks tokens where positions are flattened into features.
        NotFiniteError: It holds NaN or infinity.

    >>> as_samples(torch.zeros(5, 8, 4, 4)).shape
    torch.Size([80, 8])
    >>> as_samples(torch.zeros(5, 8, 4, 4), "features").shape
    torch.Size([5, 128])
    >>> as_samples(torch.zeros(5, 16, 8), "mean").shape
    torch.Size([5, 8])
    >>> as_samples(torch.zeros(2, 3, 8), mask=torch.tensor([[1, 1, 1], [1, 0, 0]])).shape
    torch.Size([4, 8])
    """
    check_positions(positions)
    axis = _unit_axis(activation, unit_axis, name)
    if mask is not None:
        return _real_tokens(activation, positions, axis, mask, name)
    _check_finite(activation, activation, name)
    if activation.ndim == 2:
        return activation
    if positions == "features":
        return activation.flatten(1)
    units_last = activation.movedim(axis, -1)
    if positions == "samples":
        return units_last.reshape(-1, units_last.shape[-1])
    return units_last.flatten(1, -2).mean(1)


def _real_tokens(activation: Tensor, positions: Positions, axis: int, mask: Tensor, name: str) -> Tensor:
    mask = as_mask(mask, len(mask), f"the mask of {name}")
    shape = tuple(activation.shape)
    if not masks(mask, activation, axis):
        raise DataError(f"{name} of shape {shape} has no row for each token of the mask of shape {tuple(mask.shape)}")
    units_last = activation if activation.ndim == 2 else activation.movedim(axis, -1)
    units_last = units_last.reshape(*mask.shape, units_last.shape[-1])
    if positions == "features" and not mask.all():
        raise DataError(
            f"{name} of shape {shape} has {int((~mask).sum())} masked tokens, which cannot be flattened into features: "
            "choose positions='samples' or positions='mean'"
        )
    rows = units_last[mask]
    _check_finite(rows, activation, name)
    if positions == "samples":
        return rows
    if positions == "features":
        return activation.reshape(len(mask), -1)
    # In float64, so that the length of the padding cannot show in the rounding.
    kept = units_last.to(torch.float64).masked_fill(~mask[..., None], 0)
    return (kept.sum(1) / mask.sum(1, keepdim=True)).to(activation.dtype)


def _check_finite(values: Tensor, activation: Tensor, name: str) -> None:
    if not all_finite(values):
        raise NotFiniteError(f"{name} of shape {tuple(activation.shape)} holds NaN or infinity")


def _unit_axis(activation: Tensor, unit_axis: int | None, name: str) -> int:
    if activation.is_nested or activation.layout != torch.strided:
        raise DataError(f"{name} is a nested or sparse tensor; expected a dense one: make it so inside the network")
    shape = tuple(activation.shape)
    if not activation.is_floating_point():
        raise DataError(f"{name} of shape {shape} is {activation.dtype}; expected floating point: convert it first")
    if activation.ndim < 2 or (activation.ndim > 5 and unit_axis is None):
        raise DataError(
            f"{name} has shape {shape}; expected (N, units), (N, tokens, units) or (N, units, height, width): "
            "reshape it, or name the axis of the units with unit_axis"
        )
    if not activation.numel():
        raise DataError(f"{name} of shape {shape} is empty")
    axis = (1 if activation.ndim in (4, 5) else -1) if unit_axis is None else unit_axis
    if not -activation.ndim < axis < activation.ndim or axis == 0:
        raise DataError(f"{name} of shape {shape}: unit_axis={axis}, but axis 0 holds the samples, others the units")
    return axis
