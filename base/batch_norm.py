"""Running statistics of batch norm, measured again: those of an average of networks are not the average of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .batches import Data
from .calibration import Site, Statistics, calibrate
from .held import MEMORY, Held

BatchNorm = nn.modules.batchnorm._BatchNorm
"""The one base of BatchNorm1d, 2d, 3d and SyncBatchNorm."""


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Name the batch norms of a network that keep running statistics."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BatchNorm) and layer.running_mean is not None
    }


def reset_batch_norms(model: nn.Module, data: Data, progress: bool | None = None, memory: int = MEMORY) -> None:
    """Set, in place, the running statistics of every batch norm that the data reaches.

    Its running mean and variance become the mean and the unbiased variance, over all samples, of what reaches it in
    evaluation mode, when the batch norms before it have been set (Jordan et al. 2023, §3, for networks with batch
    norm). Batches are joined as far as memory allows; in one run this is exact. Where it takes several, each batch
    norm normalises each by its own statistics first, and further passes in evaluation mode measure again until nothing
    changes.

    Args:
        model: The network; after an error it is as it was.
        data: Batches of inputs; labels are ignored.
        progress: Show a bar always (True), never (False), or on a terminal (None).
        memory: Bytes of inputs to keep, and of activations that are alive at a time.

    Raises:
        DataError: There is no batch, or one holds a single value for each unit.
        NotFiniteError: An input or an activation is NaN or infinite.

    >>> layer = nn.BatchNorm1d(1)
    >>> reset_batch_norms(layer, torch.tensor([[1.0], [2.0], [6.0]]))
    >>> layer.running_mean, layer.running_var
    (tensor([3.]), tensor([7.]))
    """
    sites = batch_norm_sites(model)
    held = data if isinstance(data, Held) else Held(data, memory)
    calibrate(model, sites, held, show=progress, what="resetting batch norm")
    count_batches(sites, held)


def batch_norm_sites(model: nn.Module) -> list[BatchNormSite]:
    """List the batch norms that keep running statistics, as places to be settled."""
    return [BatchNormSite(name, layer) for name, layer in batch_norms(model).items()]


def count_batches(sites: list[BatchNormSite], data: Held) -> None:
    """Write how many batches each batch norm has seen, which is what momentum=None averages over."""
    for site in sites:
        if site.found.count and site.norm.num_batches_tracked is not None:
            site.norm.num_batches_tracked.fill_(data.count)


class BatchNormSite(Site):
    """The input of a batch norm, of which its running statistics are those that are wanted."""

    what = "input"

    def __init__(self, name: str, norm: BatchNorm) -> None:
        super().__init__(name, norm)
        self.norm = norm

    def attach(self) -> RemovableHandle:
        """Watch the inputs; while steering, each is normalised by its own statistics."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = self.note(args[0] if args else next(iter(kwargs.values())))
            if self.steering:
                self.settle(batch)

        return self.norm.register_forward_pre_hook(hook, with_kwargs=True)

    def samples(self, values: Tensor) -> Tensor:
        """Read (N, units, …) as samples x units."""
        return values.movedim(1, -1).flatten(0, -2)

    @torch.no_grad()
    def settle(self, found: Statistics) -> None:
        """Write the mean and the unbiased variance."""
        mean, variance = self.tensors()
        mean.copy_(found.average)
        variance.copy_(found.variance(correction=1))

    def error(self, found: Statistics) -> float:
        """Compare what was found with what is written."""
        mean, variance = (tensor.double() for tensor in self.tensors())
        std = found.variance(correction=1).sqrt()
        varies = std > torch.finfo(torch.float32).eps * found.average.abs()
        if not varies.any():
            return 0.0
        off = torch.maximum((found.average - mean).abs() / std, (variance.sqrt() / std - 1).abs())
        return float(off[varies].max())

    def tensors(self) -> list[Tensor]:
        """List the running mean and variance."""
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        return [self.norm.running_mean, self.norm.running_var]
