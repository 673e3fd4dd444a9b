"""Batches that are kept while they are read, so that they can be run again, and all at once."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .batches import Batch, Data, batches, model_device, require_repeatable
from .running import evaluating

MEMORY = 2 * 2**30
"""Bytes of inputs that are kept, and bytes of activations that one run may hold: 2 GiB."""


class Held:
    """Data that is read once, if its inputs fit into memory; else every iteration reads it again.

    Args:
        data: Batches of inputs; labels are not kept.
        memory: Bytes of inputs to keep, and of activations that are alive at a time when batches are joined.

    Attributes:
        count: Number of batches, once they have been read.

    >>> held = Held(iter([torch.zeros(3, 2), torch.ones(2, 2)]))
    >>> [len(batch) for batch in held], [len(batch) for batch in held]
    ([3, 2], [3, 2])
    """

    def __init__(self, data: Data, memory: int = MEMORY) -> None:
        self.data = data
        self.memory = memory
        self.kept: list[Batch] | None = None
        self.count = 0

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches, without labels, where the data has them.

        Raises:
            DataError: There is no batch; or the data is an iterator, was read before, and was too large to be kept.
        """
        if self.kept is not None:
            yield from self.kept
            return
        kept: list[Batch] | None = []
        size = count = 0
        for batch in batches(self.data):
            count += 1
            inputs = Batch(batch.args, batch.kwargs)
            size += sum(tensor.nbytes for tensor in inputs.tensors())
            if size > self.memory:
                if kept is not None:
                    require_repeatable(self.data, f"it is read again, as more than {self.memory} bytes are not kept")
                kept = None
            elif kept is not None:
                kept.append(inputs)
            yield inputs
        self.kept, self.count = kept, count

    def groups(self, model: nn.Module) -> list[Batch] | Held:
        """Join batches into as few as the memory allows, if a network treats each sample by itself.

        Args:
            model: What they are for.

        Returns:
            Batches on the device where they were, of nearly the same number of samples; the data as it is where inputs
            do not fit together, or outputs depend on what else is in a batch.
        """
        if self.kept is None:
            for _ in self:
                pass
        if self.kept is None or not _alike(self.kept):
            return self
        if len(self.kept) == 1:
            return self.kept
        peak = _peak_per_sample(model, self.kept[0])
        if peak is None:
            return self
        total = sum(map(len, self.kept))
        count = min(len(self.kept), max(1, -(-total * peak // max(self.memory, 1))))
        bounds = [round(index * len(self.kept) / count) for index in range(count + 1)]
        return [_join(self.kept[start:stop]) for start, stop in itertools.pairwise(bounds)]


def _alike(kept: list[Batch]) -> bool:
    return all(_form(batch) == _form(kept[0]) for batch in kept)


def _form(batch: Batch) -> Any:
    """Say what two batches must share to be joined."""

    def form(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return ("value", repr(value))
        if value.ndim and len(value) == len(batch):
            return ("rows", value.shape[1:], value.dtype, value.device)
        return ("tensor", value.shape, repr(value.tolist()) if value.numel() < 100 else id(value))

    return [form(value) for value in batch.args], {name: form(value) for name, value in batch.kwargs.items()}


def _join(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]

    def joined(values: list[Any]) -> Any:
        rows = isinstance(values[0], Tensor) and values[0].ndim and len(values[0]) == len(first)
        return torch.cat(values) if rows else values[0]

    args = tuple(joined([part.args[index] for part in parts]) for index in range(len(first.args)))
    return Batch(args, {name: joined([part.kwargs[name] for part in parts]) for name in first.kwargs})


def _rows(batch: Batch, count: int) -> Batch:
    def cut(value: Any) -> Any:
        return value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == len(batch) else value

    return Batch(tuple(map(cut, batch.args)), {name: cut(value) for name, value in batch.kwargs.items()})


def _peak_per_sample(model: nn.Module, batch: Batch) -> int | None:
    """Measure the bytes that are alive at most; None if a sample's output depends on the others."""
    few = _rows(batch, 4).to(model_device(model))
    half = len(few) // 2
    if not half:
        return None
    with evaluating(model), torch.no_grad():
        with _Peak(model) as peak:
            whole = _first(few.call(model))
        part = _first(_rows(few, half).call(model))
    if (
        whole is None
        or part is None
        or not part.isfinite().all()
        or whole.shape[1:] != part.shape[1:]
        or len(part) != half
    ):
        return None
    if not torch.allclose(whole[:half], part, rtol=1e-3, atol=1e-4 * float(part.abs().mean())):
        return None
    # What repairs each layer keeps its output twice for a moment.
    return max(1, int(1.5 * peak.most / len(few)))


def _first(output: Any) -> Tensor | None:
    values = output.values() if isinstance(output, Mapping) else [output]
    found = (value for value in tree_leaves(list(values)) if isinstance(value, Tensor) and value.ndim)
    return next((value.double() for value in found if value.is_floating_point()), None)


class _Peak(TorchDispatchMode):
    """Adds up the bytes of what operators give, while it is alive; views of parameters are nothing new."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        owned = (*model.parameters(), *model.buffers())
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in owned if not is_lazy(tensor)}
        self.now = self.most = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it torch imports it first, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)
