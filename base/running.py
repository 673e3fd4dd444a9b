"""Running somebody else's network: where it is told to, and without leaving a trace in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .architecture import full_state


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Hold a network in evaluation mode; each module's own mode is restored on the way out, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


def on_device(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Give the network itself if it is there already (or `device` is None), else a copy on the device."""
    if device is None:
        return model
    wanted = torch.device(device)
    found = {tensor.device for tensor in full_state(model).values()}
    if all(d.type == wanted.type and wanted.index in (None, d.index) for d in found):
        return model
    return copied(model).to(device)


def copied(model: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """Copy a network, also one that keeps a tensor that it has computed, as hooks for weight normalisation do.

    Args:
        model: The network.
        memo: Objects to share with the copy, by id; as `copy.deepcopy` takes it.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # which torch refuses to copy
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, memo)
