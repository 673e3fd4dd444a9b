"""One layer of a network, found by its name and watched while the network runs: samples x units x places."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.batches import Batch, as_batch, model_device
from ...base.errors import DataError
from ...base.running import evaluating, on_device
from ...metrics.capture import Activations, as_samples, capture, unit_axes
from ...metrics.reading import without_fast_path

Example = Tensor | Sequence[int]
"""A batch of inputs, or the shape of one input."""


@dataclass(frozen=True)
class Place:
    """Where a layer stands in a network.

    Attributes:
        key: Its name as captured.
        module: The module that it comes from.
        axis: The axis of its units, above 0.
    """

    key: str
    module: str
    axis: int


def place_of(
    model: nn.Module, activations: Activations, layer: str, samples: int, unit_axis: int | None = None
) -> Place:
    """Find the activation that a layer's name stands for, after a forward call under `capture`.

    Args:
        model: The network.
        activations: What was captured of this layer alone.
        layer: Its name; of a module with several outputs, the first one of samples x units.
        samples: How many samples the call had.
        unit_axis: The axis of the units. Default: as `unit_axes` and `as_samples` tell it.

    Raises:
        DataError: The activation has no axis of samples, or none of units.
        LayerNotFoundError: The layer was not called, or gave no tensor.
    """
    fitting = [key for key, x in activations.items() if not x.is_nested and x.ndim > 1 and x.is_floating_point()]
    key = layer if layer in activations or not fitting else fitting[0]
    activation = activations[key]
    axis = unit_axes(model, activations)[key] if unit_axis is None or activation.ndim == 2 else unit_axis
    as_samples(activation, unit_axis=axis, name=key)
    if len(activation) != samples:
        raise DataError(
            f"layer {key!r} has shape {tuple(activation.shape)} for {samples} samples; its first axis must be that of "
            "the samples: name another layer"
        )
    if axis is None:
        axis = 1 if activation.ndim in (4, 5) else activation.ndim - 1
    return Place(key, activations.origins[key], axis % activation.ndim)


class Watched:
    """A layer of a network that runs up to it; `watching` makes it.

    Attributes:
        place: Where the layer stands.
        units: How many units it has.
        spatial: Numbers of places along each axis: (height, width) of feature maps, (tokens,) of tokens, () of none.
        example: The inputs of the call that told these.
    """

    def __init__(self, model: nn.Module, place: Place, shape: Sequence[int], example: Tensor) -> None:
        sizes = list(shape[1:])
        self.place, self.units = place, sizes.pop(place.axis - 1)
        self.spatial = tuple(sizes)
        self.example = example
        self._model = model

    def __call__(self, inputs: Tensor) -> Tensor:
        """Give the layer's activations, (N, units, *spatial), as a part of the graph of the inputs."""
        found: list[Tensor] = []
        calls: Counter[str] = Counter()

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            calls["made"] += 1
            number = calls["made"]
            name = self.place.module if number == 1 else f"{self.place.module}#{number}"
            if self.place.key == name or self.place.key.startswith(f"{name}["):
                # A copy, since what follows may write into it.
                found.append(_part(output, self.place.key[len(name) :]).clone())
                raise _EnoughError

        handle = self._model.get_submodule(self.place.module).register_forward_hook(keep)
        try:
            Batch((inputs,)).call(self._model)
        except _EnoughError:
            pass
        finally:
            handle.remove()
        if not found:
            raise DataError(f"layer {self.place.key!r} was not called for inputs of shape {tuple(inputs.shape)}")
        return found[0].movedim(self.place.axis, 1)


class _EnoughError(Exception):
    """The layer has been reached; what follows need not run."""


def _part(value: Any, path: str) -> Tensor:
    for key in re.findall(r"\[([^\]]*)\]", path):
        if isinstance(value, Mapping):
            value = next(part for name, part in value.items() if str(name) == key)
        else:
            value = value[int(key)] if isinstance(value, (tuple, list)) else getattr(value, key)
    return value


@contextmanager
def watching(
    model: nn.Module,
    layer: str,
    example: Example,
    *,
    unit_axis: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Watched]:
    """Hold a network in evaluation mode to run it up to one layer; it comes back as it was.

    Args:
        model: The network.
        layer: Name of the layer, as for `capture`.
        example: A batch of inputs, or the shape of one input, for which normal noise is drawn.
        unit_axis: The axis of the units, see `place_of`.
        device: Where to run; a network that is elsewhere is copied. Default: where it is.

    Raises:
        DataError: The example or the layer cannot be used.
        LayerNotFoundError: There is no such layer, or it was not called.
        NotFiniteError: The example, or the layer's activation of it, holds NaN or infinity.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
    >>> with watching(model, "0", (1, 6, 5)) as layer:
    ...     layer.units, layer.spatial, layer(torch.zeros(7, 1, 6, 5)).shape
    (2, (4, 3), torch.Size([7, 2, 4, 3]))
    """
    model = on_device(model, device)
    inputs = _example(model, example)
    with evaluating(model), without_fast_path():
        with torch.no_grad(), capture(model, layer) as activations:
            Batch((inputs,)).call(model)
            place = place_of(model, activations, layer, len(inputs), unit_axis)
        yield Watched(model, place, activations[place.key].shape, inputs)


def _example(model: nn.Module, example: Example) -> Tensor:
    device = model_device(model)
    if isinstance(example, Tensor):
        if example.ndim < 2 or not len(example):
            raise DataError(f"the example has shape {tuple(example.shape)}; expected (N, …), a batch of inputs")
        as_batch(example)
        return example.detach().to(device)
    shape = tuple(example)
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise DataError(f"the example is {shape}; expected a batch of inputs or the shape of one, such as (3, 32, 32)")
    dtype = next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.float32)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def as_units(units: Any, count: int | None = None, layer: str = "") -> Tensor:
    """Read unit numbers.

    Args:
        units: One number, or a sequence or tensor of them.
        count: How many units there are. Default: not known yet.
        layer: Their layer, for a message.

    Returns:
        (m,) int64 on the CPU, m > 0.

    Raises:
        DataError: These are no unit numbers, there is none, or the layer has no such unit.

    >>> as_units([3, 1], 4)
    tensor([3, 1])
    """
    try:
        numbers = torch.as_tensor(units).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"units is {units!r}; expected unit numbers, such as [0, 5]") from error
    if numbers.ndim > 1 or not numbers.numel() or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise DataError(f"units is {units!r}; expected unit numbers, such as [0, 5]")
    numbers = numbers.reshape(-1).to(torch.int64)
    wrong = numbers[(numbers < 0) | (numbers >= (1 << 62 if count is None else count))].tolist()
    if wrong:
        known = "" if count is None else f": layer {layer!r} has units 0 to {count - 1}"
        raise DataError(f"there is no unit {wrong[0]}{known}")
    return numbers


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer of at least some size.

    Raises:
        DataError: With the name of the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name} is {value!r}; expected an integer of at least {least}")
