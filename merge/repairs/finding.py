"""Which places of a network a repair can restore, module by module."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm

from ...base.architecture import shared_parameters
from ...base.batch_norm import batch_norms
from ...base.errors import ArchitectureError
from .sites import (
    AttentionSite,
    ColumnSite,
    ElementSite,
    LayerSite,
    OwnNormSite,
    ProjectionSite,
    TransposedSite,
    UnitSite,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, nn.Embedding)
_ELEMENT_NORMS = (nn.LayerNorm, nn.RMSNorm)
_CHANNEL_NORMS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)


def unit_sites(model: nn.Module, batch_norm_outputs: bool = False) -> list[UnitSite]:
    """List the places at which units can be scaled; those where nothing can be fused say why.

    Args:
        model: The network.
        batch_norm_outputs: Include the outputs of batch norms with running statistics, which are only to be looked at.

    Raises:
        ArchitectureError: A weight is computed from others in a way that no scale can be fused into.
    """
    inside = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    reset = {id(norm) for norm in batch_norms(model).values()}
    shared = shared_parameters(model)
    found: list[UnitSite] = []
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if id(module) in reset:
            found += _batch_norm(name, module) if batch_norm_outputs else []
            continue
        sites = list(_sites(name, module))
        if any(id(parameter) in shared for parameter in module.parameters(recurse=False)):
            for site in sites:
                site.fixed = "its weight is shared"
        found += sites
    return found


def _sites(name: str, module: nn.Module) -> Iterator[UnitSite]:
    if isinstance(module, nn.MultiheadAttention):
        yield from (ProjectionSite(name, module, index) for index in range(3))
        out = module.out_proj
        yield AttentionSite(f"{name}.out_proj", module, -1, out.weight, out.bias)
    elif isinstance(module, _WEIGHTED):
        weight, bias = _weight(name, module), getattr(module, "bias", None)
        if isinstance(module, nn.Embedding):
            if module.max_norm is None:
                yield ColumnSite(name, module, -1, weight, None)
        elif isinstance(module, _TRANSPOSED):
            yield TransposedSite(name, module, 1 - weight.ndim, weight, bias)
        else:
            yield LayerSite(name, module, 1 - weight.ndim, weight, bias)
    elif isinstance(module, (*_ELEMENT_NORMS, *_CHANNEL_NORMS)):
        yield from _norm(name, module)
    elif _is_conv1d(module):
        yield ColumnSite(name, module, -1, module.get_parameter("weight"), module.get_parameter("bias"))
    elif _is_own_norm(module):
        own = dict(module.named_parameters())
        yield OwnNormSite(name, module, -1, own["weight"], own.get("bias"), norm=True)


def _weight(name: str, module: nn.Module) -> Tensor:
    """Find what is to be scaled: the weight or, under weight normalisation, the lengths of its rows."""
    weight = module._parameters.get("weight")
    if weight is not None:
        return weight
    listed = getattr(getattr(module, "parametrizations", None), "weight", ())
    alone = len(listed) == 1 and isinstance(listed[0], _WeightNorm) and listed[0].dim == 0
    if alone and not isinstance(module, (nn.Embedding, *_TRANSPOSED)):
        return module.get_parameter("parametrizations.weight.original0")
    raise ArchitectureError(
        f"the weight of {name} is computed from other parameters, and no scale can be fused into it; remove "
        "its parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
    )


def _norm(name: str, norm: nn.Module) -> Iterator[UnitSite]:
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if weight is None:
        return
    if isinstance(norm, _ELEMENT_NORMS):
        yield ElementSite(name, norm, -weight.ndim, weight, bias, norm=True)
    else:
        yield _ChannelSite(name, norm, 1, weight, bias, norm=True)


def _batch_norm(name: str, norm: nn.Module) -> list[UnitSite]:
    assert isinstance(norm.running_mean, Tensor)
    weight = norm.running_mean if norm._parameters.get("weight") is None else norm.get_parameter("weight")
    site = _ChannelSite(name, norm, 1, weight, norm._parameters.get("bias"), norm=True)
    site.fixed = "its statistics are reset"
    return [site]


class _ChannelSite(LayerSite):
    """The output of a norm with a weight for each channel, (N, channels, …)."""

    def cuts(self, values: Tensor) -> bool:
        """Whether there is an axis of samples before that of the channels."""
        return True

    def column(self, units: Tensor) -> Tensor:
        """Shape a value of each channel such that it fits the output."""
        return units.view([-1] + [1] * (self.dims - 2))

    def samples(self, values: Tensor) -> Tensor:
        """Read an output as samples x channels."""
        self.dims = values.ndim
        return values.movedim(1, -1).flatten(0, -2)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in `transformers`, which is (inputs, units)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_own_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters())
    alone = not any(True for _ in module.children())
    return alone and "Norm" in type(module).__name__ and own.keys() <= {"weight", "bias"} and _is_row(own.get("weight"))


def _is_row(weight: Tensor | None) -> bool:
    return weight is not None and weight.ndim == 1
