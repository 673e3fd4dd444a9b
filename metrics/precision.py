"""In which precision matrix products of float32 tensors are taken, set around them and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from ..base.errors import DataError

Precision = Literal["float32", "float64", "bf16", "tf32"]

_MODES = {
    # precision: (CUDA, CPU, the one setting of torch before 2.9)
    "float64": ("ieee", "ieee", "highest"),
    "float32": ("ieee", "ieee", "highest"),
    "tf32": ("tf32", "ieee", "high"),
    # On CUDA TensorFloat32 holds bfloat16 exactly, and its products come out in float32.
    "bf16": ("tf32", "bf16", "medium"),
}


def check_precision(precision: str) -> None:
    """Refuse an unknown precision.

    Raises:
        DataError: With the known ones.
    """
    if precision not in _MODES:
        raise DataError(f"precision is {precision!r}; expected one of {', '.join(get_args(Precision))}")


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Take products of float32 matrices in a precision, whatever the process has set; sums are float32 in each.

    "float32" and "float64" forbid the faster roundings that a user may have allowed; "tf32" rounds factors to
    TensorFloat32 on a CUDA device and nothing on a CPU; "bf16" uses the bfloat16 units of a CPU that has them, with
    results in float32: exact products of factors that are bfloat16 numbers already.

    Raises:
        DataError: It is none of these.

    >>> with products_in("bf16"):
    ...     product = torch.ones(2, 3) @ torch.ones(3, 2)
    >>> product.dtype
    torch.float32
    """
    check_precision(precision)
    cuda, cpu, highest = _MODES[precision]
    cpu_products = getattr(torch.backends.mkldnn, "matmul", None)
    backends: list[tuple[Any, str]] = [(torch.backends.cuda.matmul, cuda), (cpu_products, cpu)]
    if all(hasattr(backend, "fp32_precision") for backend, _ in backends):
        before = [backend.fp32_precision for backend, _ in backends]
        try:
            for backend, mode in backends:
                backend.fp32_precision = mode
            yield
        finally:
            for (backend, _), mode in zip(backends, before, strict=True):
                backend.fp32_precision = mode
        return
    legacy = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(highest)
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
