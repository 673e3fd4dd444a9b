"""Reference networks without residual connections: multilayer perceptron, All-CNN-C, VGG; and networks by name."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import nn

from ..base.errors import ArchitectureError, nearest
from .checks import check_choice, check_positive
from .data import Dataset
from .norms import Norm, norm_layer
from .resnet import resnet
from .seeding import seeded
from .text import Text
from .transformer import transformer, vit

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)

# Output channels of each 3x3 convolution, "M" for a pool (Simonyan & Zisserman 2015, Table 1, A, B, D, E).
_VGG: dict[int, tuple[int | str, ...]] = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"),
    19: (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"),
}


def mlp(
    in_features: int = 784,
    widths: Sequence[int] = (512, 512, 512),
    classes: int = 10,
    init: Literal["torch", "he"] = "torch",
    *,
    seed: int | None = None,
) -> nn.Sequential:
    """Make a multilayer perceptron with ReLU; it flattens its input itself.

    Args:
        in_features: Numbers in one input, channels x height x width for an image.
        widths: Units of each hidden layer; empty for a linear classifier.
        classes: Outputs.
        init: `"torch"`, PyTorch's own, small weights from which networks grow whose units are easy to match; or `"he"`
            (He et al. 2015), without which networks of ten hidden layers do not start to learn.
        seed: Seed of the initial weights; None draws them from torch's global generator.

    Raises:
        ArchitectureError: A size is not a positive integer, or there is no such initialisation.

    >>> import torch
    >>> mlp(widths=(512, 512, 512), seed=0)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    check_positive("mlp", in_features=in_features, classes=classes)
    check_positive("mlp", **{f"widths[{i}]": width for i, width in enumerate(widths)})
    check_choice("mlp", "init", init, ("torch", "he"))
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    with seeded(seed):
        for i, width in enumerate(widths, 1):
            layers[f"fc{i}"] = _linear(in_features, width, init)
            layers[f"relu{i}"] = nn.ReLU()
            in_features = width
        layers[f"fc{len(widths) + 1}"] = _linear(in_features, classes, init)
    return nn.Sequential(layers)


def _linear(inputs: int, outputs: int, init: str) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    return _he(layer) if init == "he" else layer


def all_cnn(
    in_channels: int = 3,
    classes: int = 10,
    width: int = 96,
    norm: Norm = None,
    repeat: int = 1,
    *,
    seed: int | None = None,
) -> nn.Sequential:
    """Make All-CNN-C, a network of convolutions alone (Springenberg et al. 2015, Table 1).

    Without the paper's dropout, padded in every 3x3 convolution so that small images fit, and without a ReLU after the
    class scores.

    Args:
        in_channels: Channels of the images; their size is free.
        classes: Outputs.
        width: Channels of the first three layers, 96 in the paper; the others have twice as many.
        norm: `"batch"`, `"layer"` (over the channels of an image), `"group"`, or None as in the paper.
        repeat: Convolutions in place of each one, for networks of 8, 16, 24, … layers below the classifier; the first
            of them has its stride, and each has a norm and a ReLU of its own.
        seed: Seed of the initial weights; None draws them from torch's global generator.

    Raises:
        ArchitectureError: A size is not a positive integer, or there is no such norm.

    >>> import torch
    >>> all_cnn(width=8, seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_positive("all_cnn", in_channels=in_channels, classes=classes, width=width, repeat=repeat)
    wide = 2 * width
    # Output channels, kernel, stride.
    plan = [(width, 3, 1), (width, 3, 1), (width, 3, 2), (wide, 3, 1), (wide, 3, 1), (wide, 3, 2)]
    plan += [(wide, 3, 1), (wide, 1, 1)]
    plan = [(channels, kernel, 1 if i else stride) for channels, kernel, stride in plan for i in range(repeat)]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(seed):
        for i, (channels, kernel, stride) in enumerate(plan, 1):
            _add_convolution(layers, i, in_channels, channels, norm, kernel, stride)
            in_channels = channels
        layers["classifier"] = _he(nn.Conv2d(in_channels, classes, 1))
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers)


def vgg(
    depth: Literal[11, 13, 16, 19] = 16,
    in_channels: int = 3,
    classes: int = 10,
    width_multiplier: float = 1.0,
    norm: Norm = None,
    image_size: int = 32,
    *,
    seed: int | None = None,
) -> nn.Sequential:
    """Make a VGG network for small images: its convolutions (Simonyan & Zisserman 2015), then one linear classifier.

    Of the five pools, each of which halves the size, those that would meet an odd size are left out: 32x32 ends at 1x1,
    28x28 at 7x7, 8x8 at 1x1. The classifier reads every channel at every position that is left.

    Args:
        depth: Layers with weights as the paper counts them, its three linear layers included: 11, 13, 16 or 19.
        in_channels: Channels of the images.
        classes: Outputs.
        width_multiplier: Scales the channels 64 to 512 of the paper.
        norm: `"batch"`, `"layer"` (over the channels of an image), `"group"`, or None as in the paper.
        image_size: Height and width of the images.
        seed: Seed of the initial weights; None draws them from torch's global generator.

    Raises:
        ArchitectureError: There is no such depth or norm, or a size is not positive.

    >>> vgg(11, in_channels=1, width_multiplier=0.125, image_size=28, seed=0).classifier
    Linear(in_features=3136, out_features=10, bias=True)
    """
    check_choice("vgg", "depth", depth, tuple(_VGG))
    check_positive("vgg", in_channels=in_channels, classes=classes, image_size=image_size)
    if not isinstance(width_multiplier, (int, float)) or not 0 < width_multiplier < float("inf"):
        raise ArchitectureError(f"vgg: width_multiplier is {width_multiplier!r}; pass a number above zero, such as 0.5")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    convolutions = pools = 0
    with seeded(seed):
        for entry in _VGG[depth]:
            if isinstance(entry, int):
                convolutions += 1
                channels = max(1, round(entry * width_multiplier))
                _add_convolution(layers, convolutions, in_channels, channels, norm)
                _make_up_for_padding(layers[f"conv{convolutions}"], image_size)
                in_channels = channels
            elif image_size % 2 == 0:
                pools += 1
                layers[f"pool{pools}"] = nn.MaxPool2d(2)
                image_size //= 2
        layers["flatten"] = nn.Flatten()
        layers["classifier"] = nn.Linear(in_channels * image_size**2, classes)
    return nn.Sequential(layers)


def _add_convolution(
    layers: OrderedDict[str, nn.Module],
    index: int,
    in_channels: int,
    channels: int,
    norm: Norm,
    kernel: int = 3,
    stride: int = 1,
) -> None:
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=norm is None)
    layers[f"conv{index}"] = _he(convolution)
    if norm is not None:
        layers[f"norm{index}"] = norm_layer(norm, channels)
    layers[f"relu{index}"] = nn.ReLU()


def _he(layer: Layer) -> Layer:
    # torch's default halves the signal in each of these layers, and a deep network without norms would not start.
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _make_up_for_padding(convolution: nn.Module, image_size: int) -> None:
    # On a map of 1x1 eight of nine weights meet padding only: the signal would fade as if the width were a ninth.
    inside = (3 * image_size - 2) / (3 * image_size)
    with torch.no_grad():
        convolution.get_parameter("weight").div_(inside)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "all_cnn": all_cnn,
    "vgg": vgg,
    "resnet": resnet,
    "vit": vit,
    "transformer": transformer,
}


def build(name: str, dataset: Dataset | Text | None = None, seed: int | None = None, **kwargs: object) -> nn.Module:
    """Make a network by name, fitted to the images and classes of a data set.

    Args:
        name: A key of `NETWORKS`: `"mlp"`, `"all_cnn"`, `"vgg"`, `"resnet"`, `"vit"` or `"transformer"`.
        dataset: Where the numbers of inputs, channels and classes and the image size, or the vocabulary and the
            context, come from; None for the defaults.
        seed: Seed of the initial weights; None draws them from torch's global generator.
        **kwargs: Further arguments of the network; they go before what the data set says.

    Raises:
        ArchitectureError: There is no such network or argument, or a value is wrong.

    >>> from isthmus.zoo import load_data
    >>> build("mlp", load_data("digits"), seed=0, widths=(32,)).fc1
    Linear(in_features=64, out_features=32, bias=True)
    """
    if name not in NETWORKS:
        raise ArchitectureError(f"no network {name!r}{nearest(name, NETWORKS)}")
    known = inspect.signature(NETWORKS[name]).parameters
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise ArchitectureError(f"{name} has no argument {unknown[0]!r}{nearest(unknown[0], known)}")
    fitted = {} if dataset is None else _shape_arguments(dataset)
    return NETWORKS[name](seed=seed, **{**{k: v for k, v in fitted.items() if k in known}, **kwargs})


def _shape_arguments(dataset: Dataset | Text) -> dict[str, object]:
    if isinstance(dataset, Text):
        return {"vocabulary": len(dataset.classes), "context": dataset.context}
    _, channels, height, width = dataset.images.shape
    if height != width:
        raise ArchitectureError(f"{dataset.name}: images of {height}x{width}; the networks here take square ones")
    return {
        "in_features": channels * height * width,
        "in_channels": channels,
        "image_size": height,
        "classes": len(dataset.classes),
    }
