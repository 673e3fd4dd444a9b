"""From two networks and their data to a contact sheet of matched units, or of the units in a cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...base.batches import Data, require_repeatable
from ...base.errors import DataError
from .contact_sheet import Strip, contact_sheet
from .maximisation import maximise as maximised
from .receptive_field import ReceptiveField, receptive_field
from .top_inputs import TopInputs, top_inputs
from .watching import as_units

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

# What gives legible pictures; of fields of a few pixels a blur would leave nothing but a spot.
_VARIATION, _BLUR_EVERY, _BLURRED = 0.3, 8, 16

Layers = str | tuple[str, str]


@dataclass(frozen=True)
class _Wish:
    """What is to be drawn of each unit; see `see_pairs`."""

    count: int
    largest: bool
    maximise: bool | Mapping[str, Any]
    crop: bool
    mean: Sequence[float] | float | None
    std: Sequence[float] | float | None
    seed: int
    unit_axis: int | None
    device: torch.device | str | None
    progress: bool | None


def see_pairs(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    layers: Layers,
    pairs: Tensor | ArrayLike,
    *,
    similarities: Tensor | ArrayLike | None = None,
    count: int = 8,
    largest: bool = True,
    maximise: bool | Mapping[str, Any] = False,
    crop: bool = True,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    titles: tuple[str, str] | None = None,
    cell: float = 0.5,
    figure: Figure | None = None,
    seed: int = 0,
    unit_axis: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Figure:
    """Draw what drives matched units: those of a at the left, those of b at the right (Li et al. 2015, Figure 2).

    Args:
        model_a: The network of the left block.
        model_b: That of the right one.
        data: Batches that can be read twice; both networks get them.
        layers: Name of the layer in both, or one name for each.
        pairs: (m, 2) unit numbers, of a and of b; each is a row. Units may occur more than once.
        similarities: (m,) to be written beside the pairs, or (units of a x units of b) to take them from. NaN: none.
        count: How many inputs for each unit.
        largest: Those of the largest activations; False for the least.
        maximise: Also draw the input found by `maximise`; a mapping holds settings for it.
        crop: Cut the receptive field out of inputs that are images; False draws its box on them. Where the fields of
            inputs differ in size, since they cannot be traced beyond the border, boxes are drawn as well.
        mean: The mean that was subtracted of each channel, for pixels in [0, 1].
        std: The standard deviation that each channel was divided by.
        titles: What stands above the blocks. Default: the networks' letters and layers.
        cell: Side of a cell in inches.
        figure: Where to draw. Default: a new figure.
        seed: Seed of `maximise`.
        unit_axis: The axis of the units. Default: as `unit_axes` tells it.
        device: Where to run; a network that is elsewhere is copied. Default: where it is.
        progress: Show bars. Default: on a terminal.

    Returns:
        The figure.

    Raises:
        DataError: The data, layers, pairs or an argument cannot be used, or the inputs are nothing that can be drawn.
        LayerNotFoundError: A network has no such layer.
        NotFiniteError: An input or an activation holds NaN or infinity.

    >>> generator = torch.Generator().manual_seed(0)
    >>> data, net = torch.rand(20, 1, 8, 8, generator=generator), nn.Conv2d(1, 4, 3)
    >>> figure = see_pairs(net, net, data, "", [(0, 0), (3, 3)], similarities=[1.0, 1.0])
    >>> figure.get_size_inches().round(2).tolist()
    [10.26, 1.72]
    """
    numbers = _pairs(pairs)
    labels = None if similarities is None else _labels(similarities, numbers)
    wish = _Wish(count, largest, maximise, crop, mean, std, seed, unit_axis, device, progress)
    left, right = _both(model_a, model_b, data, layers, numbers.T.tolist(), wish)
    rows = [(left[a], right[b]) for a, b in numbers.tolist()]
    return _sheet(rows, layers, titles, wish, labels, cell, figure)


def see_cluster(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    layers: Layers,
    units_a: Any,
    units_b: Any,
    *,
    count: int = 8,
    largest: bool = True,
    maximise: bool | Mapping[str, Any] = False,
    crop: bool = True,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    titles: tuple[str, str] | None = None,
    cell: float = 0.5,
    figure: Figure | None = None,
    seed: int = 0,
    unit_axis: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Figure:
    """Draw what drives the units of a cluster that spans two networks (Li et al. 2015, section 5).

    Rows at the left and at the right have nothing to do with each other; arguments not named here are those of
    `see_pairs`.

    Args:
        model_a: The network of the left block.
        model_b: That of the right one.
        data: Batches that can be read twice.
        layers: Name of the layer in both, or one name for each.
        units_a: The cluster's units in a, none or more.
        units_b: Those in b.
        count: How many inputs for each unit.
        largest: Those of the largest activations; False for the least.
        maximise: Also draw the input found by `maximise`; a mapping holds settings for it.
        crop: Cut the receptive field out; False draws its box.
        mean: The mean that was subtracted of each channel.
        std: The standard deviation that each channel was divided by.
        titles: What stands above the blocks.
        cell: Side of a cell in inches.
        figure: Where to draw. Default: a new figure.
        seed: Seed of `maximise`.
        unit_axis: The axis of the units.
        device: Where to run.
        progress: Show bars.

    Returns:
        The figure.

    Raises:
        DataError: As for `see_pairs`, or there is no unit at all.
        LayerNotFoundError: A network has no such layer.
        NotFiniteError: An input or an activation holds NaN or infinity.
    """
    chosen = [[] if len(units) == 0 else as_units(units).tolist() for units in (units_a, units_b)]
    if not any(chosen):
        raise DataError("the cluster has no unit; pass those of a, of b, or of both")
    wish = _Wish(count, largest, maximise, crop, mean, std, seed, unit_axis, device, progress)
    left, right = _both(model_a, model_b, data, layers, chosen, wish)
    rows = [(left.get(a), right.get(b)) for a, b in zip_longest(*chosen, fillvalue=-1)]
    return _sheet(rows, layers, titles, wish, None, cell, figure)


def _pairs(pairs: Tensor | ArrayLike) -> Tensor:
    array = pairs.detach().cpu().numpy() if isinstance(pairs, Tensor) else np.asarray(pairs)
    if array.ndim != 2 or array.shape[1] != 2 or not len(array) or array.dtype.kind not in "iu":
        raise DataError(f"pairs have shape {array.shape} of {array.dtype}; expected (m, 2) unit numbers, of a and of b")
    return as_units(array.reshape(-1).astype(np.int64)).reshape(-1, 2)


def _labels(similarities: Tensor | ArrayLike, pairs: Tensor) -> list[str]:
    values = torch.as_tensor(similarities).detach().cpu()
    if values.ndim == 2:
        if not bool((pairs.amax(0) < torch.tensor(values.shape)).all()):
            raise DataError(f"similarities of shape {tuple(values.shape)} lack a unit of the pairs")
        values = values[pairs[:, 0], pairs[:, 1]]
    if values.shape != (len(pairs),):
        raise DataError(
            f"similarities have shape {tuple(values.shape)} for {len(pairs)} pairs; give one each, or the whole matrix"
        )
    return ["–" if math.isnan(value) else f"{value:.2f}".replace("-", "−") for value in values.tolist()]


def _names(layers: Layers) -> tuple[str, str]:
    return (layers, layers) if isinstance(layers, str) else layers


def _both(
    model_a: nn.Module, model_b: nn.Module, data: Data, layers: Layers, units: Sequence[Sequence[int]], wish: _Wish
) -> list[dict[int, Strip]]:
    require_repeatable(data, "each network reads it")
    sides = zip((model_a, model_b), _names(layers), units, strict=True)
    return [_strips(model, data, layer, sorted(set(own)), wish) if own else {} for model, layer, own in sides]


def _sheet(
    rows: Sequence[tuple[Strip | None, Strip | None]],
    layers: Layers,
    titles: tuple[str, str] | None,
    wish: _Wish,
    labels: Sequence[str] | None,
    cell: float,
    figure: Figure | None,
) -> Figure:
    if titles is None:
        a, b = (f" · {name}" if name else "" for name in _names(layers))
        titles = (f"network A{a}", f"network B{b}")
    heading = "largest activations" if wish.largest else "least activations"
    return contact_sheet(
        rows, labels=labels, titles=titles, heading=heading, label_heading="similarity", mean=wish.mean, std=wish.std,
        cell=cell, figure=figure,
    )  # fmt: skip


def _strips(model: nn.Module, data: Data, layer: str, units: Sequence[int], wish: _Wish) -> dict[int, Strip]:
    top = top_inputs(
        model, data, layer, units=units, count=wish.count, largest=wish.largest, unit_axis=wish.unit_axis,
        device=wish.device, progress=wish.progress,
    )  # fmt: skip
    example = next(iter(top.kept.values()))[None]
    field = None
    if example.ndim == 4 and example.is_floating_point():
        field = receptive_field(model, layer, example, unit_axis=wish.unit_axis, device=wish.device)
    pictures: Sequence[Tensor | None] = [None] * len(units)
    if wish.maximise is not False:
        pictures = _pictures(model, layer, top, field, wish)
    return {unit: _strip(top, unit, field, picture, wish) for unit, picture in zip(units, pictures, strict=True)}


def _strip(top: TopInputs, unit: int, field: ReceptiveField | None, picture: Tensor | None, wish: _Wish) -> Strip:
    label = f"unit {unit}"
    if unit in top.constant:
        return Strip(label, None, picture, note="does not vary")
    inputs = top.inputs(unit)
    if field is None or field.whole:
        return Strip(label, inputs, picture)
    fields = [field.at(position) for position in top.positions[top.row(unit)]]
    if wish.crop and _even(field):
        crops = [own.crop(x, math.nan) for own, x in zip(fields, inputs, strict=True)]
        return Strip(label, torch.stack(crops), picture)
    return Strip(label, inputs, picture, [own.box for own in fields])


def _even(field: ReceptiveField) -> bool:
    """Tell whether the boxes of all places are of one size."""
    return all(axis.jump is not None and axis.start is not None and axis.stop is not None for axis in field.axes)


def _pictures(
    model: nn.Module, layer: str, top: TopInputs, field: ReceptiveField | None, wish: _Wish
) -> Sequence[Tensor]:
    """Maximise each unit among inputs of the data's size and range."""
    kept = torch.stack(list(top.kept.values()))
    local = None if field is None or field.whole else field
    share = 1.0 if local is None else math.prod(local.clipped[2:]) / math.prod(local.input_shape)
    # Only pixels of the field move: they get the norm, and a step, that a part of the data of their number has.
    size = math.sqrt(share)
    settings: dict[str, Any] = {
        "target": "mean" if local is None else "centre",
        "norm": max(float(kept.to(torch.float64).square().mean().sqrt()), 1e-6) * size,
        "rate": 0.05 * size,
        "total_variation": _VARIATION,
        "blur_every": _BLUR_EVERY if local is None or min(local.clipped[2:]) >= _BLURRED else 0,
        "bounds": _pixel_range(wish, kept),
        "seed": wish.seed,
        "unit_axis": wish.unit_axis,
        "device": wish.device,
        "progress": wish.progress,
    }
    settings |= wish.maximise if isinstance(wish.maximise, Mapping) else {}
    found = maximised(model, layer, top.units, kept[:1], **settings).inputs
    if local is None or not wish.crop or not _even(local):
        return list(found)
    return list(local.crop(found, math.nan))


def _pixel_range(wish: _Wish, kept: Tensor) -> tuple[Any, Any] | None:
    if wish.mean is None and wish.std is None:
        low, high = (float(end) for end in kept.aminmax())
        return (low, high) if low < high else None
    mean, std = (np.asarray(default if x is None else x, dtype=float) for x, default in ((wish.mean, 0), (wish.std, 1)))
    return tuple(((end - mean) / std).tolist() for end in (0, 1))  # pyright: ignore[reportReturnType]
