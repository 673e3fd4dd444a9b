"""One pass over data in which two networks and those between them run side by side, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...base.batches import Batch, Data, batches, model_device
from ...base.errors import DataError, LayerNotFoundError
from ...base.progress import progress as progress_bar
from ...base.running import evaluating
from ...metrics.capture import Activations, Positions, as_mask, as_samples, capture, masks, unit_axes
from ...metrics.reading import Side, without_fast_path
from .cosines import Overlap, additivity_sides, cosine_distances, mixed, total

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Hardshrink, nn.Softshrink, nn.Threshold),
)
"""Modules that act on each entry alone and have no parameters: the same function in both networks."""

LINEAR = (nn.Linear, _ConvNd)
"""Modules that are linear in their input but for a bias."""


@dataclass
class LayerTotals:
    """What the pass has added up for one layer; entries for each alpha.

    Attributes:
        rows: Samples seen, or positions where they count as samples.
        endpoint: Sum of 1 - cos(f_a, f_b).
        distances: Sums of 1 - cos(f_alpha, mixture of f_a and f_b).
        between: Overlap of f_alpha (x) with that mixture (y), over all samples at once.
        additivity: Sums of 1 - cos(σ(mixture), mixture of σ); None for a layer that is no activation.
        commutativity: Overlap of W_a H_a + W_b H_b with W_a H_b + W_b H_a; None for a layer that is not linear.
        inputs: Overlap of H_a with H_b.
    """

    rows: int
    endpoint: float
    distances: list[float]
    between: list[Overlap]
    additivity: list[float] | None = None
    commutativity: Overlap | None = None
    inputs: Overlap = field(default_factory=Overlap)


@dataclass(frozen=True)
class Pair:
    """Two networks, and those on the line between them.

    Attributes:
        a: The network at 0, with the layers to read.
        b: The network at 1.
        alphas: Places on the line.
        between: The network at each.
    """

    a: Side
    b: nn.Module
    alphas: tuple[float, ...]
    between: tuple[nn.Module, ...]


def measure_features(
    pair: Pair, data: Data, positions: Positions, mask: str | None, show: bool | None
) -> tuple[dict[str, LayerTotals], int]:
    """Run all networks on each batch, in evaluation mode, and add up what their layers show.

    Returns:
        Totals by layer in execution order, and the number of inputs.
    """
    samples, models = 0, (pair.a.model, pair.b, *pair.between)
    with torch.no_grad(), without_fast_path(), ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        outputs = [stack.enter_context(capture(model, pair.a.layers, reuse=True)) for model in models]
        names = _with_inputs(pair.a)
        inputs = [stack.enter_context(capture(model, names, inputs=True, reuse=True)) for model in models[:2]]
        run = FeaturePass(pair, outputs, inputs, positions, mask)
        for index, batch in enumerate(progress_bar(batches(data, model_device(pair.a.model)), "features", show=show)):
            run.add(batch, index)
            samples += len(batch)
    return run.totals, samples


def _with_inputs(side: Side) -> list[str]:
    modules = dict(side.model.named_modules(remove_duplicate=False))
    names = (re.split(r"[#\[]", name, maxsplit=1)[0] for name in side.layers)
    return [name for name in names if isinstance(modules.get(name), (*ACTIVATIONS, *LINEAR))]


class FeaturePass:
    """Adds up what captured activations show; `add` runs the networks on a batch."""

    def __init__(
        self,
        pair: Pair,
        outputs: Sequence[Activations],
        inputs: Sequence[Activations],
        positions: Positions,
        mask: str | None,
    ) -> None:
        self.totals: dict[str, LayerTotals] = {}
        self._pair, self._outputs, self._inputs = pair, outputs, inputs
        self._positions: Positions = positions
        self._mask_name = mask
        # Fixed by the first batch, so that a coincidence of sizes in a later one changes no meaning.
        self._axes: dict[str, int | None] = {}
        self._origins: dict[str, str] = {}
        # Of the latest batch.
        self._mask: Tensor | None = None

    def add(self, batch: Batch, index: int) -> None:
        """Run the networks on a batch and add what it shows."""
        self._mask = self._read_mask(batch, index)
        features: list[Mapping[str, Tensor]] = []
        inputs: list[Mapping[str, Tensor]] = []
        models = (self._pair.a.model, self._pair.b, *self._pair.between)
        for number, (model, outputs) in enumerate(zip(models, self._outputs, strict=True)):
            batch.call(model)
            if not self.totals:
                self._choose(model, outputs, len(batch))
            # Now: a module that two networks share would add the calls of the next one.
            features.append({name: outputs[name] for name in self.totals})
            if number < len(self._inputs):
                inputs.append(dict(self._inputs[number]))
        for name, totals in self.totals.items():
            self._add_features(name, totals, [found[name] for found in features], len(batch))
            if name in inputs[0]:
                self._add_conditions(name, totals, inputs[0][name], inputs[1][name])

    def _choose(self, model: nn.Module, outputs: Activations, count: int) -> None:
        side, names = self._pair.a, list(outputs)
        if side.chosen:
            for name in side.layers:
                outputs[name]  # says why it is missing
        else:
            names = _first_fitting(outputs, count)
        if not names:
            raise LayerNotFoundError(f"{type(model).__name__}: no layer with samples x units ran; name some")
        axes = unit_axes(model, outputs)
        self._axes = {name: axes[name] for name in names}
        self._origins = {name: outputs.origins[name] for name in names}
        number = len(self._pair.alphas)
        for name in names:
            module = model.get_submodule(outputs.origins[name])
            self.totals[name] = LayerTotals(
                *(0, 0.0, [0.0] * number, [Overlap() for _ in range(number)]),
                additivity=[0.0] * number if isinstance(module, ACTIVATIONS) else None,
                commutativity=Overlap() if isinstance(module, LINEAR) else None,
            )

    def _read_mask(self, batch: Batch, index: int) -> Tensor | None:
        if self._mask_name is None or self._mask_name not in batch.kwargs:
            return None
        return as_mask(batch.kwargs[self._mask_name], len(batch), f"batch {index}: the mask {self._mask_name!r}")

    def _rows(self, name: str, tensor: Tensor, count: int) -> Tensor:
        if tensor.shape[:1] != (count,):
            raise DataError(
                f"{name} has shape {tuple(tensor.shape)} for {count} samples; the first axis must be that of the "
                "samples: name the layers to read, without this one"
            )
        mask = self._mask if self._mask is not None and masks(self._mask, tensor, self._axes[name]) else None
        if mask is None and self._positions == "features" and tensor.is_floating_point():
            return tensor.flatten(1)
        return as_samples(tensor, self._positions, unit_axis=self._axes[name], mask=mask, name=name)

    def _all_entries(self, name: str, tensor: Tensor) -> Tensor:
        """Give (rows, entries) of all that is not padding."""
        axis = self._axes[name]
        if self._mask is None or not masks(self._mask, tensor, axis):
            return tensor.flatten(1)
        return as_samples(tensor, "samples", unit_axis=axis, mask=self._mask, name=name)

    def _add_features(self, name: str, totals: LayerTotals, found: Sequence[Tensor], count: int) -> None:
        a, b, *between = (self._rows(name, tensor, count) for tensor in found)
        totals.rows += len(a)
        totals.endpoint += total(cosine_distances(a, b)[:, None], name)
        for index, (alpha, rows) in enumerate(zip(self._pair.alphas, between, strict=True)):
            mixture = mixed(a, b, alpha)
            totals.distances[index] += total(cosine_distances(rows, mixture)[:, None], name)
            totals.between[index].add(rows, mixture, name)

    def _add_conditions(self, name: str, totals: LayerTotals, h_a: Tensor, h_b: Tensor) -> None:
        module_a, module_b = (model.get_submodule(self._origins[name]) for model in (self._pair.a.model, self._pair.b))
        if totals.additivity is not None:
            for index, alpha in enumerate(self._pair.alphas):
                sides = additivity_sides(h_a, h_b, alpha, module_a.forward)
                inside, outside = (self._rows(name, side, len(side)) for side in sides)
                totals.additivity[index] += total(cosine_distances(inside, outside)[:, None], name)
        if totals.commutativity is not None:
            same = _without_bias(module_a, h_a) + _without_bias(module_b, h_b)
            crossed = _without_bias(module_a, h_b) + _without_bias(module_b, h_a)
            totals.commutativity.add(self._all_entries(name, same), self._all_entries(name, crossed), name)
            totals.inputs.add(self._all_entries(name, h_a), self._all_entries(name, h_b), name)


def _first_fitting(outputs: Activations, count: int) -> list[str]:
    """Choose of each call of a module the first output with an axis of samples and one of units."""
    chosen: dict[str, str] = {}
    for key, module in outputs.origins.items():
        tensor = outputs[key]
        call = module + key.removeprefix(module).split("[", 1)[0]
        plain = tensor.is_floating_point() and not tensor.is_nested and tensor.layout == torch.strided
        if call not in chosen and plain and tensor.ndim > 1 and tensor.shape[0] == count:
            chosen[call] = key
    return list(chosen.values())


def _without_bias(module: nn.Module, inputs: Tensor) -> Tensor:
    out = module.forward(inputs)  # not called: hooks have seen this layer
    bias = cast("Tensor | None", module.bias)
    if bias is None:
        return out
    return out - (bias if isinstance(module, nn.Linear) else bias.view(-1, *[1] * (out.ndim - 2)))
