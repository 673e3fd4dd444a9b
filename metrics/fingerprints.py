"""Which samples were seen, and in what order: one number per sample, to tell loaders that shuffle differently."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import DataError

Samples = Tensor | np.ndarray[Any, Any] | Sequence[Any]


def fingerprints(samples: Samples) -> Tensor:
    """Give one number per sample: an integer as it is, of anything else 64 bits of its BLAKE2b digest.

    Equal contents have equal numbers in every process and on every device.

    Args:
        samples: Identities (integers, strings, paths), one per sample, or the inputs themselves: a tensor or array with
            samples first, or a sequence of tensors. A vector of integers holds identities.

    Returns:
        (samples,) in int64, in main memory.

    Raises:
        DataError: It is none of these, or empty.

    >>> fingerprints([7, 8])
    tensor([7, 8])
    >>> images = torch.zeros(2, 3, 4, 4)
    >>> images[1] += 1
    >>> first, second = fingerprints(images)
    >>> bool(first == second), bool(first == fingerprints(images[:1])[0])
    (False, True)
    """
    if isinstance(samples, np.ndarray):
        try:
            samples = torch.as_tensor(samples)
        except TypeError:  # strings, objects
            samples = samples.tolist()
    if isinstance(samples, Tensor):
        if samples.ndim == 0 or not samples.numel():
            raise DataError(f"samples has shape {tuple(samples.shape)}; expected one identity or input per sample")
        if samples.ndim == 1 and not (samples.is_floating_point() or samples.is_complex()):
            return samples.detach().to("cpu", torch.int64, copy=True)
        rows = samples.detach().cpu().contiguous().reshape(len(samples), -1).view(torch.uint8).numpy()
        return torch.tensor([_digest(row.data) for row in rows], dtype=torch.int64)
    return _of_sequence(samples)


def _of_sequence(samples: Any) -> Tensor:
    if isinstance(samples, (str, bytes)) or not isinstance(samples, Sequence) or not len(samples):
        raise DataError(
            f"samples is {type(samples).__name__} {samples!r:.60}; expected identities or inputs, not empty"
        )
    return torch.tensor([_of_one(sample) for sample in samples], dtype=torch.int64)


def _of_one(sample: Any) -> int:
    match sample:
        case Tensor():
            return _digest(sample.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        case np.ndarray() | np.floating() | float():
            return _digest(np.ascontiguousarray(sample).reshape(-1).view(np.uint8).data)
        case int() | np.integer() if -(2**63) <= int(sample) < 2**63:
            return int(sample)
        case str():
            return _digest(sample.encode("utf-8", "surrogatepass"))
        case os.PathLike():
            return _of_one(os.fspath(sample))
        case bytes():
            return _digest(sample)
    raise DataError(
        f"a sample is a {type(sample).__name__} {sample!r:.60}; expected an integer of 64 bits, a string, or a tensor"
    )


def _digest(content: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def check_same(first: Tensor, second: Tensor, a: str, b: str) -> None:
    """Refuse two lists of fingerprints that differ.

    Raises:
        DataError: They do; names the first sample that differs, and the remedy.
    """
    if len(first) != len(second):
        raise DataError(
            f"{a} has seen {len(first)} samples, {b} {len(second)}; run the same data through both, in the same order"
        )
    differ = torch.nonzero(first != second)
    if len(differ):
        at = int(differ[0])
        raise DataError(
            f"{a} and {b} saw different samples: sample {at} is {int(first[at])} in one and {int(second[at])} in the "
            f"other, {len(differ)} of {len(first)} differ; use a loader that does not shuffle (shuffle=False), or one "
            "with the same generator seed for each pass"
        )
