"""Residual networks of the CIFAR family (He et al. 2016, section 4.2)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import ArchitectureError
from .checks import check_choice, check_positive
from .norms import norm_layer
from .seeding import seeded

ResNetNorm = Literal["batch", "layer", "group"]
Shortcut = Literal["conv", "pad"]


class PadShortcut(nn.Module):
    """Shortcut without weights to more channels: every `stride`-th position, channels of zeros around (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (channels - in_channels) // 2
        self.after = channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, channels, ⌈h / stride⌉, ⌈w / stride⌉)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: ResNetNorm, shortcut: Shortcut) -> None:
        super().__init__()
        # The norms keep the names bn1 and bn2 whatever their kind, as published checkpoints have them.
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(norm, channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm_layer(norm, channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = (
                PadShortcut(in_channels, channels, stride)
                if shortcut == "pad"
                else nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm_layer(norm, channels))
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, channels, ⌈h / stride⌉, ⌈w / stride⌉)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small images; made by `resnet`."""

    def __init__(
        self, blocks: int, width: int, norm: ResNetNorm, in_channels: int, classes: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16 * width, 3, padding=1, bias=False)
        self.bn1 = norm_layer(norm, 16 * width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks, 16 * width, 16 * width, 1, norm, shortcut)
        self.layer2 = _stage(blocks, 16 * width, 32 * width, 2, norm, shortcut)
        self.layer3 = _stage(blocks, 32 * width, 64 * width, 2, norm, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, in_channels, h, w) to class scores (n, classes)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(self.flatten(self.pool(out)))


def _stage(
    blocks: int, in_channels: int, channels: int, stride: int, norm: ResNetNorm, shortcut: Shortcut
) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, norm, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1, norm, shortcut) for _ in range(blocks - 1)))


def resnet(
    depth: int = 20,
    width: int = 1,
    norm: ResNetNorm = "batch",
    in_channels: int = 3,
    classes: int = 10,
    shortcut: Shortcut = "conv",
    *,
    seed: int | None = None,
) -> ResNet:
    """Make a residual network of the CIFAR family (He et al. 2016, section 4.2).

    With `norm="batch"`, `width=1` and `shortcut="pad"` the parameters are named and shaped like those of the usual
    published CIFAR-10 checkpoints.

    Args:
        depth: Layers with weights, 6n + 2: 8, 14, 20, 32, 44, 56, 110, …
        width: Multiplies the channels 16, 32 and 64 of the three stages.
        norm: `"batch"`, `"layer"` (over the channels of an image) or `"group"`.
        in_channels: Channels of the images; their size is free.
        classes: Outputs.
        shortcut: Where the channels change, `"conv"` for a 1x1 convolution and a norm (option B), `"pad"` for zeros
            (option A).
        seed: Seed of the initial weights; None draws them from torch's global generator.

    Raises:
        ArchitectureError: The depth is not 6n + 2, a size is not a positive integer, or there is no such norm or
            shortcut.

    >>> import torch
    >>> resnet(8, norm="group", seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_positive("resnet", depth=depth, width=width, in_channels=in_channels, classes=classes)
    check_choice("resnet", "shortcut", shortcut, ("conv", "pad"))
    if depth < 8 or depth % 6 != 2:
        raise ArchitectureError(f"resnet: depth is {depth}; it must be 6n + 2, such as 8, 14, 20, 32, 56")
    with seeded(seed):
        return ResNet((depth - 2) // 6, width, norm, in_channels, classes, shortcut)
