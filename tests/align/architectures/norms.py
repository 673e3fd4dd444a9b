"""Norms of activations and of weights, as modules, as parametrisations and as the older hooks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import Architecture, vectors


class Chain(nn.Module):
    """A convolution to 6 channels, the layer in question from 6 to 8, ReLU, a head on the mean over places."""

    def __init__(self, layer: nn.Module, out: int = 8) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(2, 6, 3), layer, nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(F.relu(self.stem(x)))).mean((2, 3)))


class Standardised(nn.Conv2d):
    """Each filter has mean 0 and variance 1; a learned gain for each, as in NFNets."""

    def __init__(self, way: str) -> None:
        super().__init__(6, 8, 3)
        self.gain, self.way = nn.Parameter(torch.zeros(8, 1, 1, 1)), way

    def forward(self, input: Tensor) -> Tensor:
        if self.way == "batch norm":  # as in timm: filters as channels of a batch of one
            weight = F.batch_norm(
                self.weight.reshape(1, 8, -1), None, None, self.gain.view(-1), training=True, eps=1e-6
            )
            weight = weight.reshape_as(self.weight)
        elif self.way == "var_mean":
            variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
            weight = (self.weight - mean) * (self.gain * torch.rsqrt(variance + 1e-6))
        else:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            weight = self.gain * weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(input, weight, self.bias)


def _old(name: str) -> Callable[[nn.Module], nn.Module]:
    def wrap(module: nn.Module) -> nn.Module:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(nn.utils, name)(module)

    return wrap


def _conv() -> nn.Conv2d:
    return nn.Conv2d(6, 8, 3)


_IMAGES = vectors(3, 2, 7, 7)
_GROUPS: dict[str, tuple[int | str, ...]] = {"stem": (6, "free"), "out": (8, "free")}
_ENDS = {"stem.weight": "stem, 2, 3, 3", "head.weight": "4, out"}


def _chain(
    wrap: Callable[[nn.Module], nn.Module], layout: dict[str, str], **groups: tuple[int | str, ...]
) -> Architecture:
    return Architecture(
        lambda: Chain(wrap(_conv())),
        _IMAGES,
        _GROUPS | groups,
        _ENDS | {f"layer.{name}": axes for name, axes in layout.items()},
    )


class Lines(nn.Module):
    """The same on vectors, without places: 6 -> 12 -> 8 -> 4."""

    def __init__(self, *norms: nn.Module, wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.first, self.second, self.head = wrap(nn.Linear(6, 12)), wrap(nn.Linear(12, 8)), nn.Linear(8, 4)
        self.norms = nn.Sequential(*norms)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.norms(self.first(x))))))


class RootMeanSquare(nn.Module):
    """Spelled out, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class ResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt v2, on channels behind places."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, 8)), nn.Parameter(torch.zeros(1, 1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        size = x.norm(p=2, dim=(1, 2), keepdim=True)
        return (self.gamma * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta + x).permute(0, 3, 1, 2)


_VECTORS = vectors(9, 6)
_LINES: dict[str, tuple[int | str, ...]] = {"first": (12, "free"), "second": (8, "free")}
_BLOCKS: dict[str, tuple[int | str, ...]] = {
    "blocks": (4, "blocks"),
    "inside": (3, "within", "blocks"),
    "second": (8, "free"),
}


def _lines(norm: Callable[[], nn.Module], **layout: str) -> Architecture:
    layout = {f"norms.0.{name}": axes for name, axes in layout.items()}
    return Architecture(
        lambda: Lines(norm()),
        _VECTORS,
        _LINES,
        {"first.weight": "first, 6", "second.weight": "second, first", **layout},
    )


NORMS = {
    "weight norm": _chain(
        nn.utils.parametrizations.weight_norm,
        {"parametrizations.weight.original0": "out, 1, 1, 1", "parametrizations.weight.original1": "out, stem, 3, 3"},
    ),
    "weight norm, old hook": _chain(_old("weight_norm"), {"weight_g": "out, 1, 1, 1", "weight_v": "out, stem, 3, 3"}),
    "spectral norm": _chain(
        nn.utils.parametrizations.spectral_norm,
        {
            "parametrizations.weight.original": "out, stem, 3, 3",
            "parametrizations.weight.0._u": "out",
            "parametrizations.weight.0._v": "stem*9",
        },
    ),
    "spectral norm, old hook": _chain(
        _old("spectral_norm"), {"weight_orig": "out, stem, 3, 3", "weight_u": "out", "weight_v": "stem*9"}
    ),
    # Of vectors: the norm of each row, of each column, and of the whole.
    **{
        f"weight norm of vectors, dim={dim}": Architecture(
            lambda dim=dim: Lines(wrap=lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=dim)),
            _VECTORS,
            _LINES,
            {
                "first.parametrizations.weight.original1": "first, 6",
                "second.parametrizations.weight.original1": "second, first",
                "second.parametrizations.weight.original0": shape,
            },
        )
        for dim, shape in ((0, "second, 1"), (1, "1, first"))
    },
    "spectral norm of vectors": Architecture(
        lambda: Lines(wrap=nn.utils.parametrizations.spectral_norm),
        _VECTORS,
        _LINES,
        {
            "second.parametrizations.weight.original": "second, first",
            "second.parametrizations.weight.0._u": "second",
            "second.parametrizations.weight.0._v": "first",
        },
    ),
    **{
        f"weight standardisation by {way}": Architecture(
            lambda way=way: Chain(Standardised(way)),
            _IMAGES,
            _GROUPS,
            _ENDS | {"layer.weight": "out, stem, 3, 3", "layer.gain": "out, 1, 1, 1"},
        )
        for way in ("batch norm", "var_mean", "std")
    },
    "response norm": Architecture(
        lambda: Chain(nn.Sequential(_conv(), ResponseNorm())),
        _IMAGES,
        _GROUPS,
        _ENDS | {"layer.0.weight": "out, stem, 3, 3", "layer.1.gamma": "1, 1, 1, out"},
    ),
    # Each channel by itself.
    "instance norm": Architecture(
        lambda: Chain(nn.Sequential(_conv(), nn.InstanceNorm2d(8, affine=True, track_running_stats=True))),
        _IMAGES,
        _GROUPS,
        _ENDS | {"layer.0.weight": "out, stem, 3, 3", "layer.1.weight": "out", "layer.1.running_var": "out"},
    ),
    "instance norm of the input": Architecture(
        lambda: Chain(nn.Sequential(_conv(), nn.InstanceNorm2d(8, affine=True))),
        _IMAGES,
        _GROUPS,
        _ENDS | {"layer.0.weight": "out, stem, 3, 3", "layer.1.bias": "out"},
    ),
    # Channels are compared with their neighbours in number: they stay.
    "local response norm": Architecture(
        lambda: Chain(nn.Sequential(_conv(), nn.LocalResponseNorm(3))),
        _IMAGES,
        {"stem": (6, "free")},
        {"layer.0.weight": "8, stem, 3, 3"},
    ),
    "group norm": Architecture(
        lambda: Lines(nn.GroupNorm(4, 12)),
        _VECTORS,
        _BLOCKS,
        {
            "first.weight": "blocks*inside, 6",
            "norms.0.weight": "blocks*inside",
            "second.weight": "second, blocks*inside",
        },
    ),
    "layer norm": _lines(lambda: nn.LayerNorm(12), weight="first", bias="first"),
    "rms norm": _lines(lambda: nn.RMSNorm(12), weight="first"),
    "rms norm, spelled out": _lines(RootMeanSquare, weight="first"),
    "batch norm": _lines(lambda: nn.BatchNorm1d(12), weight="first", running_mean="first"),
    # A slope for each channel.
    "prelu": _lines(lambda: nn.PReLU(12), weight="first"),
}
