"""Forward passes whose course does not depend on data: what a model is set to while it is traced."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..base.running import copied


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules but not its tensors, so that what a forward pass stores in them is not left behind."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copied(model, memo)


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Choose, of forward passes that compute the same, those that can be followed.

    Fused attention of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` and whole recurrent layers of cuDNN are
    switched off. Mixtures of experts of transformers, which send each expert the tokens that chose it, gather each
    token's experts instead. What functions and methods beside the model's classes remember (`functools.lru_cache`) is
    forgotten before and after, so that no tensor of one run is handed to another.
    """
    caches = list(caches_beside(model))
    before = torch.backends.mha.get_fastpath_enabled()
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    chosen = {key: c._experts_implementation for key, c in configs.items() if hasattr(c, "_experts_implementation")}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for key in chosen:
            configs[key]._experts_implementation = "batched_mm"
        forget(caches)
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        forget(caches)
        torch.backends.mha.set_fastpath_enabled(before)
        for key, value in chosen.items():
            configs[key]._experts_implementation = value


def forget(caches: Iterable[Any]) -> None:
    """Empty caches of functions."""
    for cache in caches:
        cache.cache_clear()


def caches_beside(model: nn.Module) -> Iterator[Any]:
    """Find the caches of functions that stand where the model's classes are defined."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    names = {cls.__module__ for cls in classes if not cls.__module__.startswith("torch.")}
    for namespace in (*(vars(sys.modules[name]) for name in names if name in sys.modules), *map(vars, classes)):
        for function in list(namespace.values()):
            yield from _cache_of(function)


def _cache_of(function: Any) -> Iterator[Any]:
    """A cache may be wrapped once more, by a function that decides whether to ask it."""
    function = getattr(function, "__func__", function)  # of a static or class method
    for found in (function, *map(_content, getattr(function, "__closure__", None) or ())):
        if isinstance(found, functools._lru_cache_wrapper):
            yield found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing has been put in it
        return None
