"""Tensors whose values are known although no data flows: those that depend neither on inputs nor on parameters.

Networks ask such tensors for numbers (`int(torch.tensor(n).sqrt())`) or build tables of positions from them. They are
computed beside the run without data, as far as they are small, so that their values can be told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

# Entries of the largest tensor that is computed; numbers that steer a forward pass are few.
_LARGEST = 2**16

_RANDOM = frozenset({torch.Tag.nondeterministic_seeded})


class Constants:
    """Known values, by tensor without data."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def value(self, tensor: Tensor) -> Tensor | None:
        """Give the values of a tensor; None: they depend on data, or are many."""
        if not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
            return tensor
        return self._known.get(id(tensor), (None, None))[1]

    def numbers(self, tensor: Tensor) -> Any:
        """Give the values of a tensor as nested lists; None: they are not known."""
        known = self.value(tensor)
        with _disable_current_modes():
            return None if known is None else known.tolist()

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Compute an operator on known values, if all that it takes is known."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        small = all(tensor.numel() <= _LARGEST for tensor in inputs + outputs)
        if not (small and all(self.value(t) is not None for t in inputs)) or _RANDOM & set(func.tags):
            if func._schema.is_mutable and any(id(tensor) in self._known for tensor in inputs):
                self._known.clear()  # and with it every view of what has been overwritten
            return
        with _disable_current_modes():
            known = func(*tree_map(self._real, args), **tree_map(self._real, dict(kwargs)))
        for tensor, values in zip(outputs, (v for v in tree_leaves(known) if isinstance(v, Tensor)), strict=True):
            self._known[id(tensor)] = (tensor, values)

    def _real(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self.value(leaf)
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
