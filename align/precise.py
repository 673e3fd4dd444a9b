"""Arithmetic in float64 throughout, also where a network asks for less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# It reads the same bits as another type, so that a wider one would read other numbers.
_BITCASTS = {torch.ops.aten.view.dtype}


def raised(dtype: torch.dtype) -> torch.dtype:
    """Give the type of full precision that takes the place of another; types of integers stand for themselves.

    >>> raised(torch.bfloat16), raised(torch.complex64), raised(torch.int32)
    (torch.float64, torch.complex128, torch.int32)
    """
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


class Precise(TorchDispatchMode):
    """While it is active, every operator computes in float64, or complex128, whatever type it is asked for.

    Networks cast inside (`x.to(torch.float32)`, `softmax(dtype=...)`, `torch.zeros(dtype=...)`), so that doubling their
    parameters does not double their precision. It acts below autograd, which works as ever. What is written in place
    keeps its type.

    >>> x = torch.tensor([1.0], dtype=torch.float64)
    >>> with Precise():
    ...     print((x / 3).half().dtype, torch.zeros(2).dtype)
    torch.float64 torch.float64
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on raised tensors, with raised types in its arguments, and raise what it returns."""
        del types
        if func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        if func not in _BITCASTS:
            args, kwargs = tree_map(_raise, (args, kwargs))
        return tree_map(_raise, func(*args, **(kwargs or {})))


def _raise(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return raised(value)
    if isinstance(value, Tensor) and (dtype := raised(value.dtype)) != value.dtype:
        return value.to(dtype)
    return value
