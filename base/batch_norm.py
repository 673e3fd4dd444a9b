"""Running statistics of batch norm, measured again: those of an average of networks are not the average of theirs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Data, batches, model_device
from .errors import DataError, NotFiniteError
from .progress import progress as progress_bar
from .running import evaluating

BatchNorm = nn.modules.batchnorm._BatchNorm
"""The one base of BatchNorm1d, 2d, 3d and SyncBatchNorm."""


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Name the batch norms of a network that keep running statistics."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BatchNorm) and layer.running_mean is not None
    }


def reset_batch_norms(model: nn.Module, data: Data, progress: bool | None = None) -> None:
    """Set, in place, the running statistics of every batch norm that the data reaches.

    One pass with batch statistics, in which the inputs of every batch norm are recorded; its running mean and variance
    become the exact mean and unbiased variance over all samples (Jordan et al. 2023, §3, for networks with batch norm).

    Args:
        model: The network.
        data: Batches of inputs; labels are ignored. Large ones are better than small ones.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Raises:
        DataError: There is no batch, or one holds a single value for each unit.
        NotFiniteError: An input or an activation is NaN or infinite.

    >>> layer = nn.BatchNorm1d(1)
    >>> reset_batch_norms(layer, torch.tensor([[1.0], [2.0], [6.0]]))
    >>> layer.running_mean, layer.running_var
    (tensor([3.]), tensor([7.]))
    """
    layers = batch_norms(model)
    found = {name: _Running() for name in layers}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name].add(args[0] if args else next(iter(kwargs.values())), name)

        return hook

    with evaluating(model), ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(note(name), with_kwargs=True).remove)
            layer.training = True
        for batch in progress_bar(batches(data, model_device(model)), "resetting batch norm", show=progress):
            batch.call(model)
        for name, running in found.items():
            running.write(layers[name])


@dataclass
class _Running:
    """Mean and sum of squared deviations of each unit, batches merged as by Chan, Golub & LeVeque (1983)."""

    count: int = 0
    calls: int = 0
    shift: Tensor | None = None
    mean: Tensor | None = None
    squares: Tensor | None = None

    def add(self, values: Tensor, name: str) -> None:
        samples = values.movedim(1, -1).flatten(0, -2) if values.ndim > 1 else values[None]
        if len(samples) < 2:
            raise DataError(
                f"a batch gives {name} one value for each unit, of shape {tuple(values.shape)}, which has no variance; "
                "use larger batches, and drop_last=True if the last one is that small"
            )
        samples = samples.to(torch.float64)
        if self.shift is None:  # constant units then have exactly zero variance, whatever their value
            self.shift = samples[0].clone()
        samples = samples - self.shift
        mean = samples.mean(0)
        squares = (samples - mean).square().sum(0)
        if not torch.isfinite(squares).all():
            raise NotFiniteError(f"the input of {name}, of shape {tuple(values.shape)}, holds NaN or infinity")
        self._merge(len(samples), mean, squares)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        self.calls += 1
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        delta, total = mean - self.mean, self.count + count
        self.mean += delta * (count / total)
        self.squares += squares + delta.square() * (self.count * count / total)
        self.count = total

    def write(self, layer: BatchNorm) -> None:
        if self.mean is None or self.squares is None or self.shift is None:
            return  # the data never came here
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(self.shift + self.mean)
        layer.running_var.copy_(self.squares / (self.count - 1))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(self.calls)
