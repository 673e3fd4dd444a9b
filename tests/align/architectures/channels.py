"""Convolutional networks whose channels are put together, taken apart, or made into places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import IMAGES, Headed, conv, free
from .spec import Architecture, vectors


class Dense(nn.Module):
    """Two layers of DenseNet and a transition."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1)
        self.n2, self.c2 = nn.BatchNorm2d(9), nn.Conv2d(9, 4, 3, padding=1)
        self.n3, self.c3 = nn.BatchNorm2d(13), nn.Conv2d(13, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.c1(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.c2(F.relu(self.n2(x)))], 1)
        return F.avg_pool2d(self.c3(F.relu(self.n3(x))), 2)


class Inception(nn.Module):
    """Four branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(6, 3), nn.Sequential(conv(6, 5), conv(5, 4, 3))
        self.c, self.d = conv(6, 2, 5), conv(6, 7)
        self.last = conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, 1, 1)
        return self.last(torch.cat([self.a(x), self.b(x), self.c(x), self.d(pooled)], 1))


class Fire(nn.Module):
    """Squeeze, then two expansions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.one, self.three = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class Ghost(nn.Module):
    """Half of the channels, and the rest from a depthwise convolution of them; a few are left out."""

    def __init__(self, each: int = 1, kept: int = 8) -> None:
        super().__init__()
        self.primary, self.cheap, self.kept = conv(6, 4), conv(4, 4 * each, 3, 4), kept
        self.last = conv(kept, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return self.last(torch.cat([x, self.cheap(x)], 1)[:, : self.kept])


class SubPixels(nn.Module):
    """Channels become places and places channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mid, self.last = conv(6, 16, 3), conv(4, 3, 3), conv(12, 5, 3)
        self.up, self.down = nn.PixelShuffle(2), nn.PixelUnshuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.down(self.mid(self.up(self.wide(x)))))


class UNet(nn.Module):
    """Two steps down, two steps up, what was seen on the way down put beside what comes up."""

    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.d3 = conv(6, 5, 3), conv(5, 7, 3), conv(7, 8, 3)
        self.u2, self.c2 = nn.ConvTranspose2d(8, 4, 2, stride=2), conv(11, 6, 3)
        self.u1, self.c1 = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=2), conv(11, 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        c = self.d3(F.max_pool2d(b, 2))
        y = self.c2(torch.cat([self.u2(c), b], 1))
        return self.c1(torch.cat([self.u1(y), a], 1))


class Flattened(nn.Module):
    """Places are kept until the perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 6, 3), nn.Linear(54, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.head(F.relu(self.fc(x.reshape(len(x), -1))))


class OtherDimensions(nn.Module):
    """A convolution over time, then one over space and time."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.space = nn.Conv1d(2, 6, 3, padding=1), nn.Conv3d(6, 4, 3, padding=1, groups=2)
        self.up, self.head = nn.ConvTranspose3d(4, 5, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        B, C, T, H, W = x.shape
        y = self.time(x.permute(0, 3, 4, 1, 2).reshape(-1, C, T))
        y = F.relu(y).reshape(B, H, W, 6, T).permute(0, 3, 4, 1, 2)
        return self.head(F.relu(self.up(F.relu(self.space(y)))).mean((2, 3, 4)))


class SplitAttention(nn.Module):
    """ResNeSt: two parts of each channel, weighted by a softmax over the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = conv(6, 10, 3, groups=2), nn.Conv2d(5, 3, 1), nn.Conv2d(3, 10, 1)
        self.last = nn.Conv2d(5, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).unflatten(1, (2, 5))
        scale = self.fc2(F.relu(self.fc1(y.sum(1).mean((2, 3), keepdim=True)))).unflatten(1, (2, 5)).softmax(1)
        return x + self.last((y * scale).sum(1))


class StochasticDepth(nn.Module):
    """Branches that training drops at random, all of them there in evaluation; a learned scale for each."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(conv(6, 5), nn.Conv2d(5, 6, 1)) for _ in range(2))
        self.drop = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            y = self.drop(branch(x))
            if self.training:
                y = y * torch.rand(len(x), 1, 1, 1).gt(0.5)
            x = x + y
        return x


CHANNELS = {
    "densenet": Architecture(
        lambda: Headed(Dense(), 6, 5),
        IMAGES,
        free(a=6, b=3, c=4, d=5),
        {
            "body.n2.running_mean": "a + b",
            "body.c2.weight": "c, a + b, 3, 3",
            "body.n3.weight": "a + b + c",
            "body.c3.weight": "d, a + b + c, 1, 1",
        },
    ),
    "inception": Architecture(
        lambda: Headed(Inception(), 6, 5),
        IMAGES,
        free(stem=6, a=3, inner=5, b=4, c=2, d=7, last=5),
        {
            "body.b.1.0.weight": "b, inner, 3, 3",
            "body.d.0.weight": "d, stem, 1, 1",
            "body.last.0.weight": "last, a + b + c + d, 1, 1",
        },
    ),
    "squeezenet": Architecture(
        lambda: Headed(Fire(), 6, 9),
        IMAGES,
        free(stem=6, squeezed=3, one=4, three=5),
        {"body.squeeze.weight": "squeezed, stem, 1, 1", "head.weight": "4, one + three"},
    ),
    # Each cheap channel is made of one of the primary: one group in two places.
    "ghostnet": Architecture(
        lambda: Headed(Ghost(), 6, 5),
        IMAGES,
        free(stem=6, primary=4, last=5),
        {
            "body.primary.0.weight": "primary, stem, 1, 1",
            "body.cheap.0.weight": "primary, 1, 3, 3",
            "body.last.0.weight": "last, primary + primary, 1, 1",
        },
    ),
    # Two cheap channels of each: they change places inside their block.
    "ghostnet, two of each": Architecture(
        lambda: Headed(Ghost(2, 12), 6, 5),
        IMAGES,
        {
            "stem": (6, "free"),
            "primary": (4, "blocks"),
            "cheap": (2, "within", "primary"),
            "last": (5, "free"),
        },
        {
            "body.primary.0.weight": "primary, stem, 1, 1",
            "body.cheap.0.weight": "primary*cheap, 1, 3, 3",
            "body.last.0.weight": "last, primary + primary*cheap, 1, 1",
        },
    ),
    # The last cheap channel is cut off; its primary channel differs from the other three.
    "ghostnet, one left out": Architecture(
        lambda: Headed(Ghost(1, 7), 6, 5),
        IMAGES,
        free(stem=6, primary=3, last=5),
        {
            "body.primary.0.weight": "primary + 1, stem, 1, 1",
            "body.cheap.0.weight": "primary + 1, 1, 3, 3",
            "body.last.0.weight": "last, primary + 1 + primary, 1, 1",
        },
    ),
    # 16 channels are 4 channels of 2 x 2 places; 3 channels of 2 x 2 places become 12 channels.
    "pixel shuffle": Architecture(
        lambda: Headed(SubPixels(), 6, 5),
        IMAGES,
        free(stem=6, wide=4, mid=3, last=5),
        {
            "body.wide.0.weight": "wide*4, stem, 3, 3",
            "body.wide.1.weight": "wide*4",
            "body.mid.0.weight": "mid, wide, 3, 3",
            "body.last.0.weight": "last, mid*4, 3, 3",
        },
    ),
    # The last step up reads 2 blocks of 3 channels and writes 2 of 3, each with its own order.
    "u-net": Architecture(
        lambda: Headed(UNet(), 6, 9),
        IMAGES,
        {
            **free(stem=6, d1=5, d2=7, d3=8, u2=4, c1=9),
            "blocks": (2, "blocks"),
            "c2": (3, "within", "blocks"),
            "u1": (3, "within", "blocks"),
        },
        {
            "body.d1.0.weight": "d1, stem, 3, 3",
            "body.d3.0.weight": "d3, d2, 3, 3",
            "body.u2.weight": "d3, u2, 2, 2",
            "body.c2.0.weight": "blocks*c2, u2 + d2, 3, 3",
            "body.u1.weight": "blocks*c2, u1, 2, 2",
            "body.u1.bias": "blocks*u1",
            "body.c1.0.weight": "c1, blocks*u1 + d1, 3, 3",
        },
    ),
    # 54 = 6 channels of 3 x 3 places.
    "convolution and perceptron": Architecture(
        Flattened,
        IMAGES,
        free(conv=6, fc=7),
        {"conv.weight": "conv, 2, 3, 3", "fc.weight": "fc, conv*9", "head.weight": "4, fc"},
    ),
    "one and three dimensions": Architecture(
        OtherDimensions,
        vectors(3, 2, 5, 4, 4),
        {
            "blocks": (2, "blocks"),
            "before": (3, "within", "blocks"),
            "behind": (2, "within", "blocks"),
            "up": (5, "free"),
        },
        {
            "time.weight": "blocks*before, 2, 3",
            "space.weight": "blocks*behind, before, 3, 3, 3",
            "up.weight": "blocks*behind, up, 2, 2, 2",
        },
    ),
    # Two parts of five channels. The grouped convolution makes part r of the r-th half of the stream, so that parts,
    # with their halves, may change places. Channels have one order in both parts, whose sum is read.
    "split attention": Architecture(
        lambda: Headed(SplitAttention(), 6, 6),
        IMAGES,
        {
            "parts": (2, "blocks"),
            "half": (3, "within", "parts"),
            "channels": (5, "free"),
            "squeezed": (3, "free"),
        },
        {
            "stem.0.weight": "parts*half, 2, 3, 3",
            "body.conv.0.weight": "parts*channels, half, 3, 3",
            "body.fc1.weight": "squeezed, channels, 1, 1",
            "body.fc2.weight": "parts*channels, squeezed, 1, 1",
            "body.last.weight": "parts*half, channels, 1, 1",
        },
    ),
    "stochastic depth": Architecture(
        lambda: Headed(StochasticDepth(), 6, 6),
        IMAGES,
        free(stream=6, a=5, b=5),
        {"body.branches.0.1.weight": "stream, a, 1, 1", "body.branches.1.0.0.weight": "b, stream, 1, 1"},
    ),
}
