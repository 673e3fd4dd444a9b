"""Similarity of the layers of two networks, from one pass over the data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from operator import length_hint
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..base.batches import Batch, Data, batches, model_device
from ..base.errors import DataError, LayerNotFoundError, nearest
from ..base.progress import progress as progress_bar
from ..base.running import evaluating, on_device
from .capture import Activations, Positions, as_samples, capture, check_positions, leaf_layers, unit_axes
from .cka import cka_from_moments
from .moments import Moments, Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PASSING_ON = (nn.Identity, nn.Flatten, _DropoutNd)

# Each index is read off Moments; beside it, what its values are an estimate of.
_INDICES: dict[str, tuple[Callable[[Moments, Sequence[str], Sequence[str]], Tensor], str]] = {
    "cka": (cka_from_moments, "biased linear CKA, feature space"),
}


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarity of each layer of one network with each of another.

    Attributes:
        values: (layers of a x layers of b), float64.
        layers_a: Layer names of the rows, in execution order.
        layers_b: Layer names of the columns, in execution order.
        index: Name of the similarity index.
        convention: How it was computed: "positions", the number of "samples", the "estimator".
    """

    values: np.ndarray
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    index: str
    convention: Mapping[str, Any]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw a heat map: layers of b along x, of a along y, the first ones at the lower left.

        Args:
            ax: Where to draw. Default: a new figure, sized for the layer names.

        Returns:
            The axes.
        """
        rows, columns = self.values.shape
        if ax is None:
            import matplotlib.pyplot as plt

            size = (2.5 + 0.25 * max(columns, 8), 1.5 + 0.25 * max(rows, 8))
            ax = plt.subplots(figsize=size, layout="constrained")[1]
        image = ax.imshow(self.values, origin="lower", vmin=0, vmax=1, aspect="auto")
        ax.set_xticks(range(columns), self.layers_b, rotation=90, fontsize=8)
        ax.set_yticks(range(rows), self.layers_a, fontsize=8)
        ax.set_xlabel("layers of b")
        ax.set_ylabel("layers of a")
        ax.figure.colorbar(image, ax=ax, label=self.index.upper())
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give the content as plain lists and strings for JSON; NaN, which JSON lacks, becomes None."""
        values = [[None if math.isnan(value) else value for value in row] for row in self.values.tolist()]
        return {
            "values": values,
            "layers_a": list(self.layers_a),
            "layers_b": list(self.layers_b),
            "index": self.index,
            "convention": dict(self.convention),
        }


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    index: str = "cka",
    layers: str | Iterable[str] | tuple[Iterable[str] | None, Iterable[str] | None] | None = None,
    positions: Positions = "samples",
    unit_axis: int | None = None,
    product_dtype: torch.dtype = torch.float32,
    max_bytes: int = 4 << 30,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Similarity:
    """Compare each layer of one network with each layer of another on the same inputs, in one pass.

    Both networks run in evaluation mode and come back as they were. Of a module with several outputs the first is
    taken, unless another is named (`lstm[1][0]`).

    Args:
        model_a: Network of the rows.
        model_b: Network of the columns. Given the same object twice, it runs once.
        data: Batches: `x`, `(x, y)` or mappings of keyword inputs; one tensor is one batch.
        index: Similarity index: "cka".
        layers: Layer names for both, or a tuple of two lists, one for each. Default: all modules without children that
            run and give samples x units, but for those that only pass data on (identity, dropout, flatten).
        positions: How places of feature maps and tokens are read, see `as_samples`.
        unit_axis: The axis of the units in every activation. Default: told by the kind of module, see `as_samples`.
        product_dtype: Precision of the products of centred activations; sums are float64.
        max_bytes: Refuse to keep cross-moments beyond this size.
        device: Where to run. Default: the device of `model_a`. A network that is elsewhere is copied there.
        progress: Show a bar: always, never, or on a terminal only (None).

    Returns:
        The similarities, with the names of the layers.

    Raises:
        DataError: The index is unknown; layers differ in their number of samples; the cross-moments are too large; the
            data cannot be read. All before the second batch.
        LayerNotFoundError: A network lacks a layer, or did not call it.
        NotFiniteError: An activation holds NaN or infinity.

    >>> _ = torch.manual_seed(0)
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> similarity = compare(a, b, torch.randn(100, 4))
    >>> similarity.layers_a, similarity.values.shape
    (('0', '1', '2'), (3, 3))
    """
    measure, estimator = _find_index(index)
    check_positions(positions)
    device = torch.device(device) if device is not None else model_device(model_a)
    sides = _sides(model_a, model_b, layers, device)
    total = None if isinstance(data, (Tensor, Mapping, tuple, Batch)) else length_hint(data) or None
    moments, keys = None, []
    with ExitStack() as stack:
        captured = _watch(sides, stack)
        for batch in progress_bar(batches(data, device), "compare", total, progress):
            for model in captured:
                batch.call(model)
            keys = [side.keys(captured[side.model]) for side in sides]
            samples = _read(sides, keys, captured, positions, unit_axis)
            if moments is None:
                moments = Moments(_pairs(*_names(sides, keys)), product_dtype=product_dtype)
                _check_size(moments.pairs, samples, max_bytes)
            moments.update(samples)
    assert moments is not None  # without a batch, batches raises
    names_a, names_b = _names(sides, keys)
    values = measure(moments, names_a, names_b).cpu().numpy()
    convention = {"positions": positions, "samples": moments.count(names_a[0]), "estimator": estimator}
    return Similarity(values, tuple(keys[0]), tuple(keys[1]), index, convention)


@dataclass(frozen=True)
class _Side:
    """One network of the two; `prefix` tells its layers from those of the other."""

    model: nn.Module
    prefix: str
    layers: tuple[str, ...]
    chosen: bool  # by the user, by name

    def keys(self, activations: Activations) -> list[str]:
        keys = []
        for key, module in activations.origins.items():
            first_output = module in self.layers and not re.search(r"\[[1-9]", key.removeprefix(module))
            comparable = activations[key].is_floating_point() and activations[key].ndim > 1
            if (first_output or key in self.layers) and (comparable or self.chosen):
                keys.append(key)
        if self.chosen:
            for name in self.layers:
                if name not in keys and name not in {activations.origins[key] for key in keys}:
                    activations[name]  # says why it is missing
        if not keys:
            raise LayerNotFoundError(f"{type(self.model).__name__}: no layer with samples x units ran; name some")
        return keys


def _names(sides: Sequence[_Side], keys: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[side.prefix + key for key in own] for side, own in zip(sides, keys, strict=True)]


def _read(
    sides: Sequence[_Side],
    keys: Sequence[Sequence[str]],
    captured: Mapping[nn.Module, Activations],
    positions: Positions,
    unit_axis: int | None,
) -> dict[str, Tensor]:
    samples: dict[str, Tensor] = {}
    for side, own in zip(sides, keys, strict=True):
        activations = captured[side.model]
        axes = unit_axes(side.model, activations)
        for key in own:
            name, activation = side.prefix + key, activations[key]
            if name not in samples:
                axis = axes[key] if unit_axis is None or activation.ndim == 2 else unit_axis
                samples[name] = as_samples(activation, positions, unit_axis=axis, name=name)
    return samples


def _find_index(index: str) -> tuple[Callable[[Moments, Sequence[str], Sequence[str]], Tensor], str]:
    if index not in _INDICES:
        raise DataError(f"unknown index {index!r}{nearest(index, _INDICES)}")
    return _INDICES[index]


def _sides(model_a: nn.Module, model_b: nn.Module, layers: Any, device: torch.device) -> tuple[_Side, _Side]:
    per_side = isinstance(layers, tuple) and len(layers) == 2 and not any(isinstance(part, str) for part in layers)
    if not per_side and layers is not None and not isinstance(layers, str):
        layers = tuple(layers)  # read once for each side
    chosen_a, chosen_b = layers if per_side else (layers, layers)
    a = _side(on_device(model_a, device), chosen_a, "model_a.")
    b = _side(a.model if model_b is model_a else on_device(model_b, device), chosen_b, "model_b.")
    return (replace(a, prefix=""), replace(b, prefix="")) if model_a is model_b else (a, b)


def _side(model: nn.Module, layers: str | Iterable[str] | None, prefix: str) -> _Side:
    if layers is not None:
        return _Side(model, prefix, (layers,) if isinstance(layers, str) else tuple(layers), chosen=True)
    names = (name for name in leaf_layers(model) if not isinstance(model.get_submodule(name), _PASSING_ON))
    return _Side(model, prefix, tuple(names), chosen=False)


def _watch(sides: tuple[_Side, _Side], stack: ExitStack) -> dict[nn.Module, Activations]:
    stack.enter_context(torch.no_grad())
    layers = {
        side.model: [name for other in sides if other.model is side.model for name in other.layers] for side in sides
    }
    for model in layers:
        stack.enter_context(evaluating(model))
    return {model: stack.enter_context(capture(model, names)) for model, names in layers.items()}


def _pairs(names_a: list[str], names_b: list[str]) -> list[Pair]:
    return [*((name, name) for name in (*names_a, *names_b)), *product(names_a, names_b)]


def _check_size(pairs: Iterable[Pair], samples: Mapping[str, Tensor], max_bytes: int) -> None:
    needed = sum(8 * samples[a].shape[1] * samples[b].shape[1] for a, b in pairs)
    if needed > max_bytes:
        largest = max(samples, key=lambda name: samples[name].shape[1])
        raise DataError(
            f"the cross-moments would take {needed / 2**30:.3g} GiB (the largest layer, {largest}, has "
            f"{samples[largest].shape[1]} units), more than max_bytes={max_bytes}: choose positions='mean', fewer "
            "layers, or a larger max_bytes"
        )
