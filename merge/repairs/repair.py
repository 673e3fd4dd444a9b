"""Repair of an averaged network's statistics: its units vary too little, most of what a straight path loses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...base.architecture import check_same_architecture, full_state
from ...base.batch_norm import batch_norms, reset_batch_norms
from ...base.batches import Data, batches, model_device, require_repeatable
from ...base.errors import ArchitectureError, DataError
from ...base.interpolation import normalised
from ...base.progress import progress as progress_bar
from ...base.running import evaluating, on_device
from ...metrics import Moments

METHODS = ("auto", "reset", "rescale")

Model = TypeVar("Model", bound=nn.Module)
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class UnitStatistics:
    """Mean and standard deviation of each unit of each hidden layer, by the layer's name.

    Attributes:
        mean: Layer → (units,), float64.
        std: Layer → (units,), float64.
    """

    mean: Mapping[str, Tensor] = field(repr=False)
    std: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def blend(cls, parts: Sequence[UnitStatistics], shares: Sequence[float]) -> UnitStatistics:
        """Give the targets of REPAIR: the weighted means of the means and of the standard deviations."""
        mean = {
            name: _blend([part.mean[name].to(first) for part in parts], shares) for name, first in parts[0].mean.items()
        }
        std = {
            name: _blend([part.std[name].to(first) for part in parts], shares) for name, first in parts[0].std.items()
        }
        return cls(mean, std)


def repair(
    model: Model,
    data: Data,
    *,
    method: str = "auto",
    endpoints: Sequence[nn.Module] | None = None,
    alpha: float = 0.5,
    weights: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Model:
    """Give an averaged network the activation statistics that its parents have: REPAIR (Jordan et al. 2023).

    - `"reset"`, for networks with batch norm: one pass with batch statistics, in which the inputs of every batch norm
      are recorded; its running mean and variance become the exact mean and unbiased variance over all samples.
    - `"rescale"`, for networks without running statistics: the output of each hidden linear or convolutional layer
      is scaled and shifted, unit by unit, to the mean (1 - alpha) mu_a + alpha mu_b and the standard deviation
      (1 - alpha) sigma_a + alpha sigma_b of its parents' units, in one pass with batch statistics; the affine map is
      then fused into weight and bias. A layer without bias is scaled only. A unit that never varies is shifted only.
      Left alone are the layer that is executed last (the logits), weights that two layers share, and transposed
      convolutions.

    The network then has seen `data`, which its parents may not have: repair on training data, measure on test data.
    Large batches are better than small ones; with one batch, the repaired statistics equal the targets in every layer.

    Args:
        model: The averaged network; it is not changed.
        data: Batches of inputs; labels are ignored.
        method: `"reset"`, `"rescale"`, or `"auto"`: reset if there is a batch norm with running statistics.
        endpoints: For `"rescale"`: the parents, with their units in the order of `model`.
        alpha: For `"rescale"` of two parents: the place of `model` on the line between them.
        weights: For `"rescale"`, instead of `alpha`: one weight for each parent.
        device: Where to compute; that of `model` by default. The result comes back to the device of `model`.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        A new network.

    Raises:
        ArchitectureError: The method does not fit the network, or an endpoint has other parameters.
        DataError: There is no batch, or one holds a single value for each unit; or `method`, `alpha` or `weights` is
            not valid.
        NotFiniteError: An input or an activation is NaN or infinite.

    Reference:
        Jordan, Sedghi, Saukh, Entezari, Neyshabur. REPAIR: REnormalizing Permuted Activations for Interpolation
        Repair. ICLR 2023. https://arxiv.org/abs/2211.08403

    >>> layer = nn.BatchNorm1d(1)
    >>> fixed = repair(layer, torch.tensor([[1.0], [2.0], [6.0]]))
    >>> fixed.running_mean, fixed.running_var, layer.running_mean
    (tensor([3.]), tensor([7.]), tensor([0.]))
    """
    method = choose_method(model, method)
    shares: list[float] = []
    if method == "rescale":
        require_repeatable(data, "rescaling reads it once for each endpoint and once for the network itself")
        shares = _shares(model, endpoints, alpha, weights)
    home = model_device(model)
    repaired = copy.deepcopy(model).to(device)
    if method == "reset":
        reset_batch_norms(repaired, data, progress)
    else:
        parts = [unit_statistics(on_device(parent, device), data, progress) for parent in endpoints or ()]
        rescale(repaired, data, UnitStatistics.blend(parts, shares), progress)
    return repaired if device is None else repaired.to(home)


def choose_method(model: nn.Module, method: str) -> str:
    """Settle `"auto"`, and check that the method fits the network.

    Raises:
        ArchitectureError: There is nothing in the network that the method could repair.
        DataError: There is no such method.
    """
    if method not in METHODS:
        raise DataError(f"repair method {method!r} is unknown; choose one of {', '.join(map(repr, METHODS))}")
    normed = bool(batch_norms(model))
    if method == "reset" and not normed:
        raise ArchitectureError(
            "method='reset' needs a batch norm with running statistics, and this network has none; use method='rescale'"
        )
    if method == "auto":
        method = "reset" if normed else "rescale"
    if method == "rescale":
        _rescalable(model)
    return method


def unit_statistics(model: nn.Module, data: Data, show: bool | None = None) -> UnitStatistics:
    """Measure the mean and standard deviation of the units of every hidden layer that can be rescaled."""
    moments: dict[str, Moments] = {}
    last = ""

    def record(name: str, layer: Layer) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            nonlocal last
            last = name
            moments.setdefault(name, Moments(pairs="none")).update(
                {name: _samples(output, _unit_axis(layer, output), name)}
            )

        return hook

    with evaluating(model), ExitStack() as hooks:
        for name, layer in _linear_layers(model).items():
            hooks.callback(layer.register_forward_hook(record(name, layer)).remove)
        _run(model, data, "unit statistics", show)
    usable = _rescalable(model)
    names = [name for name in moments if name in usable and name != last]
    if not names:
        raise ArchitectureError(
            "this network runs no hidden linear or convolutional layer that could be rescaled; pass repair=None"
        )
    return UnitStatistics(
        {name: moments[name].mean(name) for name in names},
        {name: moments[name].variance(name).sqrt() for name in names},
    )


def rescale(model: nn.Module, data: Data, target: UnitStatistics, show: bool | None = None) -> None:
    """Rescale, in place, the units of the layers of `target` to its means and standard deviations."""
    layers = {name: layer for name, layer in _linear_layers(model).items() if name in target.mean}
    moments: dict[str, Moments] = {}

    def affine(name: str, found: Moments) -> tuple[Tensor, Tensor]:
        std = found.variance(name).sqrt()
        return _affine(layers[name], found.mean(name), std, target.mean[name], target.std[name])

    def normalise(name: str, layer: Layer) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            axis = _unit_axis(layer, output)
            batch = Moments(pairs="none")
            batch.update({name: _samples(output, axis, name)})
            moments.setdefault(name, Moments(pairs="none")).merge(batch)
            shape = [-1] + [1] * (output.ndim - axis - 1)
            wide = torch.promote_types(output.dtype, torch.float32)
            scale, shift = (values.view(shape).to(wide) for values in affine(name, batch))
            return torch.addcmul(shift, output.to(wide), scale).to(output.dtype)

        return hook

    with evaluating(model), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(normalise(name, layer)).remove)
        _run(model, data, "rescaling units", show)
    for name, found in moments.items():
        _fuse(layers[name], *affine(name, found))


def _shares(
    model: nn.Module, endpoints: Sequence[nn.Module] | None, alpha: float, weights: Sequence[float] | None
) -> list[float]:
    if not endpoints:
        raise ArchitectureError(
            "method='rescale' takes its targets from the parents; pass endpoints=(model_a, model_b), "
            "with their units in the order of the merged network"
        )
    for index, parent in enumerate(endpoints):
        check_same_architecture(full_state(model), full_state(parent), ("model", f"endpoints[{index}]"))
    if weights is not None or len(endpoints) != 2:
        return normalised(weights, len(endpoints))
    if not 0 <= alpha <= 1:
        raise DataError(f"alpha is {alpha}; expected a number from 0 (the first endpoint) to 1 (the second)")
    return [1 - alpha, alpha]


def _linear_layers(model: nn.Module) -> dict[str, Layer]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def _rescalable(model: nn.Module) -> set[str]:
    """Name the layers whose weight is theirs alone: one that another module shares would be scaled there as well."""
    layers = _linear_layers(model)
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise ArchitectureError(
                f"the weight of {name} is computed from other parameters, and no scale can be fused into it; remove "
                "its parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    names = {name for name, x in layers.items() if all(owners[id(p)] == 1 for p in x.parameters(recurse=False))}
    if not names:
        raise ArchitectureError("this network has no linear or convolutional layer whose units could be rescaled")
    return names


def _run(model: nn.Module, data: Data, what: str, show: bool | None) -> None:
    with torch.no_grad():
        for batch in progress_bar(batches(data, model_device(model)), what, show=show):
            batch.call(model)


def _unit_axis(layer: Layer, output: Tensor) -> int:
    return output.ndim - layer.weight.ndim + 1  # the axes behind that of the units are those of the kernel


def _samples(values: Tensor, axis: int, name: str) -> Tensor:
    samples = values.movedim(axis, -1).flatten(0, -2) if values.ndim > 1 else values[None]
    if len(samples) < 2:
        raise DataError(
            f"a batch gives {name} one value for each unit, of shape {tuple(values.shape)}, which has no variance; "
            "use larger batches, and drop_last=True if the last one is that small"
        )
    return samples


def _affine(layer: Layer, mean: Tensor, std: Tensor, mean_t: Tensor, std_t: Tensor) -> tuple[Tensor, Tensor]:
    """Give the scale s and the shift of y ↦ s y + shift that takes (mean, std) to (mean_t, std_t)."""
    mean_t, std_t = mean_t.to(mean), std_t.to(mean)
    # Rounding makes a constant unit vary a little; scaled up, that would be noise.
    rounding = torch.finfo(layer.weight.dtype).eps * mean.abs()
    varies = std > rounding
    scale = torch.where(varies, std_t / torch.where(varies, std, torch.ones_like(std)), torch.ones_like(std))
    shift = torch.zeros_like(mean) if layer.bias is None else mean_t - scale * mean
    return scale, shift


@torch.no_grad()
def _fuse(layer: Layer, scale: Tensor, shift: Tensor) -> None:
    column = scale.view([-1] + [1] * (layer.weight.ndim - 1))
    layer.weight.copy_(layer.weight * column)
    if layer.bias is not None:
        layer.bias.copy_(layer.bias * scale + shift)


def _blend(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(0)
