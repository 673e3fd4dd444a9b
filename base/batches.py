"""Batches: one shape for what a user may pass as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DataError, NotFiniteError
from .finite import all_finite

TARGET_KEYS = ("labels", "label", "targets", "target", "y")

Data = Tensor | Mapping[str, Any] | tuple | Iterable[Any]


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward call and, where there are any, its targets.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        targets: Labels, or None.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    targets: Tensor | None = None

    def __len__(self) -> int:
        return next(tensor.shape[0] for tensor in self.tensors() if tensor.ndim)

    def tensors(self) -> list[Tensor]:
        """List the input tensors, positional ones first."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Move to a device; `dtype` changes floating-point inputs only."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        targets = None if self.targets is None else self.targets.to(device=device)
        return Batch(tuple(map(move, self.args)), {k: move(v) for k, v in self.kwargs.items()}, targets)

    def call(self, model: nn.Module) -> Any:
        """Run the model on a copy of this batch, so that an in-place operation at its start leaves the data alone."""

        def copy(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        return model(*map(copy, self.args), **{name: copy(value) for name, value in self.kwargs.items()})


def as_batch(item: Any, index: int = 0) -> Batch:
    """Read one batch: `x`, `(x, y)` or a mapping of keyword inputs (its labels under `labels`, `targets`, …).

    Raises:
        DataError: It is none of these.
        NotFiniteError: An input holds NaN or infinity.
    """
    match item:
        case Batch():
            batch = item
        case Tensor():
            batch = Batch((item,))
        case Mapping():
            key = next((key for key in TARGET_KEYS if key in item), None)
            batch = Batch((), {k: v for k, v in item.items() if k != key}, None if key is None else item[key])
        case (Tensor() as x,):
            batch = Batch((x,))
        case (Tensor() as x, Tensor() as y):
            batch = Batch((x,), targets=y)
        case _:
            raise DataError(
                f"batch {index} is a {_describe(item)}; expected x, (x, y) or a mapping of keyword inputs, as tensors"
            )
    _check(batch, index)
    return batch


def _describe(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"{type(item).__name__} of {', '.join(type(part).__name__ for part in item) or 'nothing'}"
    return type(item).__name__


def _check(batch: Batch, index: int) -> None:
    tensors = [tensor for tensor in batch.tensors() if tensor.ndim]
    if not tensors:
        raise DataError(f"batch {index} holds no input tensor with a batch axis")
    for tensor in tensors:
        if tensor.is_floating_point() and not all_finite(tensor):
            raise NotFiniteError(f"batch {index}: an input of shape {tuple(tensor.shape)} holds NaN or infinity")
    if batch.targets is not None and batch.targets.shape[:1] != (len(batch),):
        raise DataError(
            f"batch {index}: {len(batch)} inputs of shape {tuple(tensors[0].shape)} beside targets of shape "
            f"{tuple(batch.targets.shape)}; the first axis must be the same"
        )


def batches(data: Data, device: torch.device | str | None = None) -> Iterator[Batch]:
    """Iterate over batches, whatever the data came as.

    Args:
        data: An iterable of batches (a `DataLoader`, a list), or one batch: a tensor, a tuple `(x, y)`, a mapping.
        device: Where to move them; None leaves them.

    Raises:
        DataError: There is no batch, or one cannot be read.
        NotFiniteError: An input holds NaN or infinity.

    >>> [len(batch) for batch in batches([torch.zeros(3, 2), (torch.zeros(2, 2), torch.zeros(2))])]
    [3, 2]
    >>> next(batches((torch.zeros(4, 2), torch.ones(4)))).targets
    tensor([1., 1., 1., 1.])
    """
    whole = isinstance(data, (Tensor, Mapping, Batch)) or _is_one_pair(data)
    items: Iterable[Any] = (data,) if whole else _iterable(data)
    empty = True
    for index, item in enumerate(items):
        batch = as_batch(item, index)
        if len(batch):
            empty = False
            yield batch if device is None else batch.to(device)
    if empty:
        raise DataError("the data holds no batch; a loader that was used up, an empty list, or drop_last=True?")


def _is_one_pair(data: Any) -> bool:
    pair = isinstance(data, tuple) and len(data) in (1, 2) and all(isinstance(part, Tensor) for part in data)
    if pair and len(data) == 2 and data[1].is_floating_point() and data[1].ndim > 1 and data[0].shape == data[1].shape:
        # Half of the data would be taken for targets, without a word.
        raise DataError(
            f"data is a tuple of two tensors of shape {tuple(data[0].shape)}: pass [(x, y)] if the second holds "
            "targets, or a list if they are two batches, as from x.split()"
        )
    return pair


def _iterable(data: Any) -> Iterable[Any]:
    if isinstance(data, (str, bytes)) or not hasattr(data, "__iter__"):
        raise DataError(f"data is a {type(data).__name__}; expected an iterable of batches, such as a DataLoader")
    return data


def require_repeatable(data: Data, why: str) -> None:
    """Refuse a one-shot iterator where the data is read more than once.

    Raises:
        DataError: `data` is an iterator.
    """
    if isinstance(data, Iterator):
        raise DataError(f"the data is an iterator, which can be read once, but {why}; pass a list or a DataLoader")


def model_device(model: nn.Module) -> torch.device:
    """Give the device of a model's first parameter or buffer; the CPU for a model that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
