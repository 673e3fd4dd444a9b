"""Layers of a network in the order in which it runs them, and the tensors that belong to each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ...base.architecture import full_state
from ...base.batches import Batch
from ...base.errors import DataError, LayerNotFoundError, nearest
from ...base.running import evaluating
from ...metrics.reading import without_fast_path

_WHOLE = (nn.MultiheadAttention,)  # its projection is never called


def layers_in_order(model: nn.Module, batch: Batch, layers: str | Iterable[str] | None = None) -> dict[str, list[str]]:
    """List layers in the order of their first call, each with its tensors.

    Args:
        model: The network.
        batch: What it is run on, once, in evaluation mode.
        layers: Names of modules; of a block, all that is in it belongs to it. Default: every module that has parameters
            of its own, or saved statistics; a parametrised layer and `nn.MultiheadAttention` are one.

    Returns:
        Names of parameters and buffers by layer. Layers that were not called, whose parameters some function may use,
        come last.

    Raises:
        DataError: A layer has neither parameters nor buffers, or is named twice, or there is none.
        LayerNotFoundError: The network has no such layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    state = list(full_state(model))
    if layers is None:
        found = _with_own_tensors(model)
        groups = {name: [] for name in found}
        for tensor in state:
            owner = _owner(tensor, groups)
            if owner is not None:
                groups[owner].append(tensor)
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        groups = {name: _inside(name, names, modules, state, model) for name in names}
    if not groups:
        raise DataError(f"{type(model).__name__} has no layer with parameters; there is nothing to interpolate")
    calls = _calls(model, modules, batch)
    order = sorted(groups, key=lambda name: calls.get(name, len(calls)))
    return {name: groups[name] for name in order}


def _inside(
    name: str, names: Sequence[str], modules: dict[str, nn.Module], state: Iterable[str], model: nn.Module
) -> list[str]:
    if name not in modules:
        raise LayerNotFoundError(f"{type(model).__name__} has no layer {name!r}{nearest(str(name), modules)}")
    if names.count(name) > 1:
        raise DataError(f"layer {name!r} is named twice; name each layer once")
    found = [tensor for tensor in state if not name or tensor.startswith(f"{name}.")]
    if not found:
        raise DataError(f"layer {name!r} has neither parameters nor buffers; name one that has, or a block around it")
    return found


def _with_own_tensors(model: nn.Module) -> list[str]:
    modules = dict(model.named_modules())
    wholes = [name for name, module in modules.items() if isinstance(module, _WHOLE)]
    found = []
    for name, module in modules.items():
        parts = name.split(".")
        if "parametrizations" in parts or any(name.startswith(f"{whole}.") for whole in wholes):
            continue
        own = any(parameter is not None for parameter in module._parameters.values())
        kept = (tensor for key, tensor in module._buffers.items() if key not in module._non_persistent_buffers_set)
        own = own or any(tensor is not None and tensor.is_floating_point() for tensor in kept)
        if own or name in wholes or "parametrizations" in dict(module.named_children()):
            found.append(name)
    return found


def _owner(tensor: str, groups: Iterable[str]) -> str | None:
    fitting = [name for name in groups if not name or tensor.startswith(f"{name}.")]
    return max(fitting, key=len, default=None)


def _calls(model: nn.Module, modules: dict[str, nn.Module], batch: Batch) -> dict[str, int]:
    order: dict[str, int] = {}

    def noted(name: str) -> None:
        order.setdefault(name, len(order))

    handles = [module.register_forward_pre_hook(lambda *_, name=name: noted(name)) for name, module in modules.items()]
    try:
        with evaluating(model), torch.no_grad(), without_fast_path():
            batch.call(model)
    finally:
        for handle in handles:
            handle.remove()
    return order
