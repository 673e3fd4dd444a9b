"""Activations of a network, copied while it runs, and their reading as samples x units."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from ..base.errors import DataError, LayerNotFoundError, NotFiniteError, nearest

Positions = Literal["samples", "features", "mean"]

_UNITS_ON_AXIS_1 = (
    *(_ConvNd, _NormBase, nn.GroupNorm),
    *(_MaxPoolNd, _AvgPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd),
)
# Exact types only: a subclass of LayerNorm may well normalise axis 1.
_UNITS_ON_LAST_AXIS = frozenset({nn.Linear, nn.Bilinear, nn.LayerNorm, nn.Embedding, nn.RNN, nn.LSTM, nn.GRU})


class Activations(dict[str, Tensor]):
    """Activations of the latest forward call by layer name, in execution order.

    Attributes:
        origins: The name of the module that each activation came from.
    """

    def __init__(self, requested: Iterable[str] = ()) -> None:
        super().__init__()
        self.origins: dict[str, str] = {}
        self._requested = frozenset(requested)
        self._calls: Counter[str] = Counter()

    def clear(self) -> None:
        """Forget the latest forward call."""
        super().clear()
        self.origins.clear()
        self._calls.clear()

    def record(self, module: str, value: Any) -> None:
        """Copy the tensors in one input or output of a module."""
        self._calls[module] += 1
        call = module if self._calls[module] == 1 else f"{module}#{self._calls[module]}"
        for name, tensor in _tensors(value, call):
            wholes = (name[: part.start()] for part in re.finditer(r"\[", name))
            if not self._requested.isdisjoint((module, name, *wholes)):
                self[name] = tensor.detach().clone()
                self.origins[name] = module

    def __missing__(self, name: str) -> Tensor:
        parts = [key for key in self if key.startswith(f"{name}[")]
        if parts:
            raise LayerNotFoundError(f"layer {name!r} has several outputs; name one of {', '.join(parts)}")
        if name in self._requested:
            raise LayerNotFoundError(
                f"layer {name!r} exists but was not called in the latest forward call, or gave no tensor"
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


@contextmanager
def capture(
    model: nn.Module, layers: str | Iterable[str] | None = None, *, inputs: bool = False
) -> Iterator[Activations]:
    """Copy the activations of chosen layers whenever the model runs.

    Each forward call of `model` first empties the mapping, then fills it in execution order. A module called
    again is `relu#2`, `relu#3`; a part of a tuple, list or mapping is `lstm[0]`, `lstm[1][0]`, `block[key]`.

    Args:
        model: The network. Its hooks are as before once the context is left.
        layers: Names as in `model.named_modules()` or as captured (`relu#2`, `lstm[0]`); `""` is the model itself.
            Default: every module without children, of which those that run appear.
        inputs: Capture the first tensor that goes into each layer in place of what comes out.

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
    activations = Activations(requested)
    with ExitStack() as hooks:
        handle = model.register_forward_pre_hook(lambda *_: activations.clear(), prepend=True)
        hooks.callback(handle.remove)
        for name, module in modules.items():
            hooks.callback(_hook(module, name, activations, inputs).remove)
        yield activations


def leaf_layers(model: nn.Module) -> list[str]:
    """Name the modules of a model that have no children.

    A reparametrised layer (weight norm, spectral norm, …) counts as one module: its parametrisations return weights.

    Raises:
        LayerNotFoundError: The model itself is the only module.
    """
    names = [
        name
        for name, module in model.named_modules()
        if name
        and "parametrizations" not in name.split(".")
        and all(child == "parametrizations" for child, _ in module.named_children())
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
    layer normalisation modules on the last. Any other module takes the axis of the latest captured activation of the
    same shape, and None where there is none.
    """
    axes: dict[str, int | None] = {}
    latest: dict[torch.Size, int | None] = {}
    for name, activation in activations.items():
        module = model.get_submodule(activations.origins[name])
        if isinstance(module, _UNITS_ON_AXIS_1):
            latest[activation.shape] = 1
        elif type(module) in _UNITS_ON_LAST_AXIS:
            latest[activation.shape] = -1
        axes[name] = latest.get(activation.shape)
    return axes


def check_positions(positions: str) -> None:
    """Refuse an unknown way to treat positions.

    Raises:
        DataError: With the known ones.
    """
    known = get_args(Positions)
    if positions not in known:
        raise DataError(f"unknown positions {positions!r}; known: {', '.join(known)}")


def as_samples(
    activation: Tensor,
    positions: Positions = "samples",
    *,
    unit_axis: int | None = None,
    name: str = "activation",
) -> Tensor:
    """Read an activation as a matrix of samples x units.

    Args:
        activation: Of shape (N, units), (N, tokens, units), (N, units, height, width) or (N, units, d, h, w).
        positions: Tokens or places of a feature map become samples ("samples", as in Li et al. 2015), are flattened
            into features, position by position ("features", as in Kornblith et al. 2019), or averaged ("mean").
        unit_axis: The axis of the units. Default: 1 of four or five axes, else the last.
        name: What to call the activation in a message.

    Returns:
        (N · positions, units), (N, positions · units) or (N, units); a two-dimensional activation is returned as it is.

    Raises:
        DataError: It is no floating-point tensor with an axis of samples and an axis of units.
        NotFiniteError: It holds NaN or infinity.

    >>> as_samples(torch.zeros(5, 8, 4, 4)).shape
    torch.Size([80, 8])
    >>> as_samples(torch.zeros(5, 8, 4, 4), "features").shape
    torch.Size([5, 128])
    >>> as_samples(torch.zeros(5, 16, 8), "mean").shape
    torch.Size([5, 8])
    """
    check_positions(positions)
    axis = _unit_axis(activation, unit_axis, name)
    if not activation.isfinite().all():
        raise NotFiniteError(f"{name} of shape {tuple(activation.shape)} holds NaN or infinity")
    if activation.ndim == 2:
        return activation
    units_last = activation.movedim(axis, -1)
    if positions == "samples":
        return units_last.reshape(-1, units_last.shape[-1])
    if positions == "features":
        return units_last.reshape(len(units_last), -1)
    return units_last.flatten(1, -2).mean(1)


def _unit_axis(activation: Tensor, unit_axis: int | None, name: str) -> int:
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
