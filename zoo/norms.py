"""Normalisation layers of the reference networks, by name."""

from __future__ import annotations

from typing import Literal

from torch import nn

from .checks import check_choice

Norm = Literal["batch", "layer", "group"] | None


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Make a normalisation of feature maps.

    Args:
        norm: `"batch"`; `"layer"`, over all channels and positions of an image (one group); or `"group"`, up to eight
            groups of at least two channels (Wu & He 2018).
        channels: Channels of the feature map.

    Raises:
        ArchitectureError: There is no such norm.

    >>> norm_layer("group", 12).num_groups
    6
    """
    check_choice("norm_layer", "norm", norm, ("batch", "layer", "group"))
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    most = max(1, min(8, channels // 2))
    return nn.GroupNorm(max(groups for groups in range(1, most + 1) if channels % groups == 0), channels)
