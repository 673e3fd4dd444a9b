"""Forward passes whose course does not depend on data: what a model is set to while it is traced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules but not its tensors, so that what a forward pass stores in them is not left behind."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Choose, of forward passes that compute the same, those that can be followed.

    Fused attention of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` is switched off. Mixtures of experts of
    transformers, which send each expert the tokens that chose it, gather each token's experts instead.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    chosen = {key: c._experts_implementation for key, c in configs.items() if hasattr(c, "_experts_implementation")}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for key in chosen:
            configs[key]._experts_implementation = "batched_mm"
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        for key, value in chosen.items():
            configs[key]._experts_implementation = value
