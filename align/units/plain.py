"""Results as plain numbers and lists, for JSON."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor


def plain(values: Any) -> Any:
    """Give tensors, arrays and tuples as lists; NaN and infinity, which JSON lacks, become None.

    Args:
        values: A tensor, array, number, string, None, or tuples, lists and mappings of these.

    >>> import torch
    >>> plain({"r": torch.tensor([0.5, float("nan")]), "units": (1, 2)})
    {'r': [0.5, None], 'units': [1, 2]}
    """
    if isinstance(values, (Tensor, np.ndarray, np.generic)):
        values = values.tolist()
    if isinstance(values, dict):
        return {name: plain(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
