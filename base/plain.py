"""Results as plain numbers and lists, for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """Give tensors, arrays and tuples as lists; NaN and infinity, which JSON lacks, become None.

    Args:
        value: A tensor, array, number, string, None, or tuples, lists and mappings of these; anything else as text.

    >>> import torch
    >>> plain({"r": torch.tensor([0.5, float("nan")]), "units": (1, 2)})
    {'r': [0.5, None], 'units': [1, 2]}
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
