"""The last linear layer of a network, which turns features into class scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...base.batches import Batch
from ...base.errors import DataError, LayerNotFoundError, NotFiniteError, nearest
from ...base.evaluation import find_logits
from ...base.finite import all_finite
from ..capture import capture

_CLOSE = 1e-4


@dataclass(frozen=True, eq=False)
class Head:
    """A linear layer that gives class scores.

    Attributes:
        name: Of the module.
        weight: (classes x units).
        bias: (classes,), or None.
        pooled: Whether it is a convolution of kernel size 1, whose features are averages over the places of its input.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    pooled: bool = False


def find_classifier(model: nn.Module, batch: Batch) -> Head:
    """Find the linear layer whose outputs are the network's own.

    That is an `nn.Linear`, or a convolution of kernel size 1 whose outputs are averaged over all places (as in
    All-CNN), which is a linear layer on averages.

    Args:
        model: The network, in the mode in which it is to run.
        batch: Inputs to run it on once, without gradients.

    Raises:
        LayerNotFoundError: No layer is of this kind, with the linear layers that there are.
        NotFiniteError: The outputs hold NaN or infinity.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> find_classifier(model, Batch((torch.zeros(2, 4),))).name
    '2'
    """
    names = [name for name, module in model.named_modules() if name and _is_linear(module)]
    found = []
    if names:
        with torch.no_grad(), capture(model, names) as outputs:
            logits = _logits(batch.call(model))
        if logits is not None and not all_finite(logits):
            raise NotFiniteError(
                f"{type(model).__name__}: outputs of shape {tuple(logits.shape)} hold NaN or infinity; a training that "
                "diverged?"
            )
        found = [name for name in names if logits is not None and name in outputs and _gives(outputs[name], logits)]
    if isinstance(model, nn.Linear):
        found = [""]
    if not found:
        raise LayerNotFoundError(
            f"{type(model).__name__}: no linear layer gives the network's outputs, so its classifier is not known; "
            "name it with classifier=, or name layers= and classes= to measure features without one. "
            f"Linear layers: {', '.join(names) or 'none'}"
        )
    return read_classifier(model, found[-1])


def read_classifier(model: nn.Module, name: str) -> Head:
    """Read the weights of a classifier.

    Args:
        model: The network.
        name: Of an `nn.Linear`, another module with a weight of two axes, or a convolution of kernel size 1.

    Raises:
        DataError: It is no linear layer.
        LayerNotFoundError: The network has no such module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        linear = [key for key, module in modules.items() if _is_linear(module)]
        raise LayerNotFoundError(f"{type(model).__name__} has no layer {name!r}{nearest(name, linear)}")
    module = modules[name]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or not (weight.ndim == 2 or _is_pointwise(module)):
        raise DataError(
            f"layer {name!r} is a {type(module).__name__} without a weight of classes x units; name the linear layer "
            "that gives the class scores"
        )
    # Copies: a network may be trained further.
    weight = weight.detach().flatten(1).clone()
    return Head(name, weight, None if bias is None else bias.detach().clone(), _is_pointwise(module))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_pointwise(module)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and set(module.kernel_size) == {1} and module.groups == 1


def _logits(outputs: Any) -> Tensor | None:
    found = find_logits(outputs)
    return found if found is not None and found.is_floating_point() else None


def _gives(output: Tensor, logits: Tensor) -> bool:
    if output.ndim > 3 and logits.ndim == 2:
        output = output.flatten(2).mean(2)
    if output.shape != logits.shape:
        return False
    scale = float(logits.abs().max())
    return bool((output - logits).abs().max() <= _CLOSE * scale)
