"""Convolutional networks: the blocks of the well-known families, each small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import Architecture, vectors


def conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU; the weight is `0.weight`, the norm `1`."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Headed(nn.Module):
    """A stem of `width` channels, a body, and a head on the mean over places."""

    def __init__(self, body: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(2, width, 3), body, nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (in groups), 1 x 1, beside a shortcut: the identity, a convolution, or padding with zeros."""

    def __init__(self, width: int, inner: int, out: int, groups: int = 1, shortcut: str = "identity") -> None:
        super().__init__()
        stride = 1 if shortcut == "identity" else 2
        self.down, self.mid = conv(width, inner), conv(inner, inner, 3, groups, stride)
        self.up, self.norm = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(width, out, 1, 2) if shortcut == "convolution" else nn.Identity()
        self.pad = (out - width) // 2 if shortcut == "zeros" else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.up(self.mid(self.down(x))))
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else self.short(x)
        return F.relu(x + y)


def shuffled(x: Tensor, groups: int) -> Tensor:
    B, C, H, W = x.shape
    return x.view(B, groups, C // groups, H, W).transpose(1, 2).contiguous().view(B, C, H, W)


class ShuffleV1(nn.Module):
    """Two 1 x 1 convolutions in two groups, channels shuffled between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depth, self.second = conv(6, 8, groups=2), conv(8, 8, 3, 8), conv(8, 10, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.depth(shuffled(self.first(x), 2)))


class ShuffleV2(nn.Module):
    """Units that pass one half on and work on the other, then shuffle both."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.work = nn.ModuleList(nn.Sequential(conv(4, 5), conv(5, 5, 3, 5), conv(5, 4)) for _ in range(units))

    def forward(self, x: Tensor) -> Tensor:
        for work in self.work:
            kept, worked = x.chunk(2, dim=1)
            x = shuffled(torch.cat((kept, work(worked)), dim=1), 2)
        return x


class SqueezeExcite(nn.Module):
    """An inverted residual of MobileNet v3, channels scaled by a small network of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.depth = conv(6, 10), conv(10, 10, 3, 10)
        self.squeeze, self.excite, self.down = nn.Conv2d(10, 3, 1), nn.Conv2d(3, 10, 1), nn.Conv2d(10, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.up(x))
        scale = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.down(scale * y)


class EfficientChannelAttention(nn.Module):
    """A convolution over the channels' means: each channel is weighted by its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.over = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.over(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * y.transpose(1, 2).unsqueeze(-1)


IMAGES = vectors(3, 2, 8, 8)


def free(**sizes: int) -> dict[str, tuple[int | str, ...]]:
    return {label: (size, "free") for label, size in sizes.items()}


CONVOLUTION = {
    # The stream and the two inner layers of the block.
    "bottleneck": Architecture(
        lambda: Headed(Bottleneck(8, 5, 8), 8, 8),
        IMAGES,
        free(stream=8, down=5, mid=5),
        {
            "stem.0.weight": "stream, 2, 3, 3",
            "stem.1.running_var": "stream",
            "body.down.0.weight": "down, stream, 1, 1",
            "body.mid.0.weight": "mid, down, 3, 3",
            "body.up.weight": "stream, mid, 1, 1",
            "body.norm.weight": "stream",
            "head.weight": "4, stream",
        },
    ),
    # A convolution in the shortcut: a new stream, that both write.
    "bottleneck, shortcut by convolution": Architecture(
        lambda: Headed(Bottleneck(6, 5, 9, shortcut="convolution"), 6, 9),
        IMAGES,
        free(stream=6, down=5, mid=5, wide=9),
        {
            "body.down.0.weight": "down, stream, 1, 1",
            "body.short.weight": "wide, stream, 1, 1",
            "body.up.weight": "wide, mid, 1, 1",
            "head.weight": "4, wide",
        },
    ),
    # Option A: zeros before and behind the narrow stream. The two channels before it and the two behind it are written
    # by the branch alone and read by the same layers: four channels of one group, two of them at either end.
    "bottleneck, shortcut padded with zeros": Architecture(
        lambda: Headed(Bottleneck(4, 5, 8, shortcut="zeros"), 4, 8),
        IMAGES,
        free(stream=4, down=5, mid=5, around=4),
        {
            "stem.0.weight": "stream, 2, 3, 3",
            "body.down.0.weight": "down, stream, 1, 1",
            "body.mid.0.weight": "mid, down, 3, 3",
            "body.up.weight": "at(around + stream, 0, 1, 4, 5, 6, 7, 2, 3), mid, 1, 1",
            "head.weight": "4, at(around + stream, 0, 1, 4, 5, 6, 7, 2, 3)",
        },
    ),
    # Four groups move as wholes through the grouped convolution; three channels inside each before, three behind.
    "resnext": Architecture(
        lambda: Headed(Bottleneck(8, 12, 8, groups=4), 8, 8),
        IMAGES,
        {
            "stream": (8, "free"),
            "blocks": (4, "blocks"),
            "before": (3, "within", "blocks"),
            "behind": (3, "within", "blocks"),
        },
        {
            "body.down.0.weight": "blocks*before, stream, 1, 1",
            "body.down.1.running_mean": "blocks*before",
            "body.mid.0.weight": "blocks*behind, before, 3, 3",
            "body.mid.1.bias": "blocks*behind",
            "body.up.weight": "stream, blocks*behind, 1, 1",
        },
    ),
    # Channel (i, J, j) is the j-th of those that group i of the first convolution sends to group J of the second.
    # Groups move as wholes on each side; what lies inside both has an order for every pair of them.
    "shufflenet v1": Architecture(
        lambda: Headed(ShuffleV1(), 6, 10),
        IMAGES,
        {
            "i": (2, "blocks"),
            "J": (2, "blocks"),
            "before": (3, "within", "i"),
            "j": (2, "within", "i", "J"),
            "behind": (5, "within", "J"),
        },
        {
            "stem.0.weight": "i*before, 2, 3, 3",
            "body.first.0.weight": "i*J*j, before, 1, 1",
            "body.first.1.weight": "i*J*j",
            "body.depth.0.weight": "J*j*i, 1, 3, 3",
            "body.second.0.weight": "J*behind, j*i, 1, 1",
            "head.weight": "4, J*behind",
        },
    ),
    # One unit: the half that is passed on, the other half, and what is made of it; nothing is equated by the shuffle,
    # which only moves channels.
    "shufflenet v2": Architecture(
        lambda: Headed(ShuffleV2(1), 8, 8),
        IMAGES,
        free(kept=4, worked=4, up=5, made=4),
        {
            "stem.0.weight": "kept + worked, 2, 3, 3",
            "body.work.0.0.0.weight": "up, worked, 1, 1",
            "body.work.0.1.0.weight": "up, 1, 3, 3",
            "body.work.0.2.0.weight": "made, up, 1, 1",
            "head.weight": "4, at(kept + made, 0, 4, 1, 5, 2, 6, 3, 7)",
        },
    ),
    # Two units: of what is passed on (a) and what is made (f), alternating, the second unit passes on the first two of
    # each and works on the last two of each.
    "shufflenet v2, two units": Architecture(
        lambda: Headed(ShuffleV2(2), 8, 8),
        IMAGES,
        free(a1=2, a2=2, f1=2, f2=2, worked=4, up=5, up2=5, made=4),
        {
            "stem.0.weight": "a1 + a2 + worked, 2, 3, 3",
            "body.work.0.0.0.weight": "up, worked, 1, 1",
            "body.work.0.2.0.weight": "f1 + f2, up, 1, 1",
            "body.work.1.0.0.weight": "up2, at(a2 + f2, 0, 2, 1, 3), 1, 1",
            "body.work.1.2.0.weight": "made, up2, 1, 1",
            "head.weight": "4, at(a1 + f1 + made, 0, 4, 2, 5, 1, 6, 3, 7)",
        },
    ),
    "mobilenet v2": Architecture(
        lambda: Headed(nn.Sequential(conv(6, 10), conv(10, 10, 3, 10), nn.Conv2d(10, 7, 1), nn.BatchNorm2d(7)), 6, 7),
        IMAGES,
        free(stem=6, inner=10, out=7),
        {
            "body.0.0.weight": "inner, stem, 1, 1",
            "body.1.0.weight": "inner, 1, 3, 3",
            "body.2.weight": "out, inner, 1, 1",
            "body.3.running_var": "out",
            "head.weight": "4, out",
        },
    ),
    # The scales stand in the order of the channels that they scale; the 3 units between are free.
    "squeeze and excite": Architecture(
        lambda: Headed(SqueezeExcite(), 6, 6),
        IMAGES,
        free(stream=6, inner=10, squeezed=3),
        {
            "body.up.0.weight": "inner, stream, 1, 1",
            "body.squeeze.weight": "squeezed, inner, 1, 1",
            "body.excite.weight": "inner, squeezed, 1, 1",
            "body.down.weight": "stream, inner, 1, 1",
        },
    ),
    # Channels have neighbours: they stay, while the 5 of the layer before are free.
    "convolution over channels": Architecture(
        lambda: Headed(nn.Sequential(conv(5, 6), EfficientChannelAttention()), 5, 6),
        IMAGES,
        free(stem=5),
        {"stem.0.weight": "stem, 2, 3, 3", "body.0.0.weight": "6, stem, 1, 1"},
    ),
}
