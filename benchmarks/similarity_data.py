"""What the tools of similarity.py are compared on, and the values that they should give, from dense float64 kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from similarity_peers import BANDWIDTH, Layers
from torch import Tensor, nn

from isthmus import zoo
from isthmus.base.errors import DataFileError
from isthmus.metrics import capture

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CHECKPOINTS = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th"}
LATENT = 48
BLOCK = 2000


def activations(widths: Sequence[int], block: int, rows: int = BLOCK, offset: float = 1.0) -> list[list[Tensor]]:
    """Make one block of samples for both networks: two lists of float32 samples x units.

    All layers see the same latent variables, each a different band of them, and noise of their own. `offset` is the
    mean of a unit over its standard deviation; a seed per weight matrix and per block of samples fixes everything.
    """
    latent = torch.randn(rows, LATENT, generator=_generator(1, block))
    place = torch.arange(LATENT) / LATENT
    networks = []
    for network in range(2):
        layers = []
        for depth, width in enumerate(widths):
            band = torch.exp(-20 * (place - depth / len(widths)) ** 2) + 0.05
            weights = (
                torch.randn(LATENT, width, generator=_generator(2, network, depth)) * (band / band.norm())[:, None]
            )
            noise = torch.randn(rows, width, generator=_generator(3, network, depth, block))
            mean = offset * (1 + 0.1 * torch.randn(width, generator=_generator(4, network, depth)))
            layers.append((latent @ weights + 0.5 * noise) / 1.25**0.5 + mean)
        networks.append(layers)
    return networks


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(part * 1009**place for place, part in enumerate(key)))


# Two networks and their images


def networks(data_dir: str | None, depths: Sequence[int]) -> tuple[list[nn.Module], str]:
    """Build the published ResNets where their weights are found, else random ones of the same shape."""
    folder = Path(data_dir or os.environ.get("ISTHMUS_DATA") or SHARED) / "resnet_cifar10"
    models: list[nn.Module] = []
    source = "trained"
    for depth in depths:
        model = zoo.resnet(depth=depth, shortcut="pad", seed=depth)
        file = folder / CHECKPOINTS.get(depth, "")
        if file.is_file():
            state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
            model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
        else:
            source = "random weights"
        models.append(model.eval())
    return models, source


def images(data_dir: str | None, count: int) -> tuple[Tensor, str]:
    """Read CIFAR-10 where it is found, else smooth random images of that shape."""
    try:
        data = zoo.load_data("cifar10", "test", data_dir=data_dir or (SHARED if SHARED.exists() else None), limit=count)
        return data.inputs(), f"{data.name}, {data.source}"
    except DataFileError:
        coarse = torch.randn(count, 3, 8, 8, generator=_generator(5, count))
        return F.interpolate(coarse, scale_factor=4, mode="bilinear"), "smooth random images"


def chosen_layers(model: nn.Module, count: int) -> list[str]:
    """Choose layers evenly spaced in execution order, without the shortcuts, whose place in it is not their name's."""
    with torch.no_grad(), capture(model) as found:
        model(torch.zeros(2, 3, 32, 32))
        names = [name for name in found if not name.endswith(("shortcut", "flatten"))]
    return [names[i] for i in torch.linspace(0, len(names) - 1, count).round().long().tolist()]


# What the values should be


def true_values(task: str, layers_a: Layers, layers_b: Layers) -> Tensor:
    """Compute all pairs from dense float64 kernels with explicit centring; slow, and the same code for no tool."""
    kernels = [[_kernel(x, task) for x in layers] for layers in (layers_a, layers_b)]
    return _aligned(*(torch.stack([k.flatten() for k in side]) for side in kernels))


def _aligned(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1))


def _kernel(x: Tensor, task: str) -> Tensor:
    x = x.double()
    x = x - x.mean(0)
    kernel = x @ x.T
    if task == "rbf":
        squares = kernel.diagonal()
        distances = (squares[:, None] + squares - 2 * kernel).clamp_(min=0).fill_diagonal_(0)
        # Over all n² entries, the zero diagonal included: Kornblith et al. 2019
        median = distances.flatten().quantile(0.5) if distances.numel() < 1 << 24 else distances.median()
        kernel = torch.exp(-distances / (2 * BANDWIDTH**2 * median))
    return _u_centred(kernel) if task == "debiased" else _centred(kernel)


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def _u_centred(kernel: Tensor) -> Tensor:
    """Centre such that plain inner products are the U-statistic of Song et al. 2012, up to n(n − 3)."""
    n = len(kernel)
    kernel = kernel.clone().fill_diagonal_(0)
    sums = kernel.sum(0) / (n - 2)
    return (kernel - sums - sums[:, None] + kernel.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0)


def true_model_values(
    models: Sequence[nn.Module], layers: Sequence[Sequence[str]], batches: Sequence[Tensor], minibatch: bool
) -> Tensor:
    """Compute debiased CKA of flattened features from dense float64 kernels.

    Of all samples together, or from HSIC₁ averaged over the batches (Nguyen et al. 2021).
    """
    found = ([_features(model, names, x) for model, names in zip(models, layers, strict=True)] for x in batches)
    if not minibatch:
        sides = zip(*found, strict=True)
        return true_values("debiased", *([torch.cat(parts) for parts in zip(*side, strict=True)] for side in sides))
    kernels = ([torch.stack([_kernel(x, "debiased").flatten() for x in side]) for side in batch] for batch in found)
    parts = [(a @ b.T, a.square().sum(1), b.square().sum(1)) for a, b in kernels]
    cross, own_a, own_b = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
    return cross / (own_a[:, None] * own_b).sqrt()


def _features(model: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    with torch.no_grad(), capture(model, names) as found:
        model(x)
        return [found[name].flatten(1) for name in names]
