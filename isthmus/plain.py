"""Results as plain text: JSON that every reader takes, numbers that a person takes in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from isthmus.base.plain import plain


def dumps(content: Any, indent: int | None = None) -> str:
    """Write JSON; NaN and infinity, which JSON lacks, become null; arrays and tensors become lists.

    >>> dumps({"barrier": float("nan"), "sizes": (1, 2)})
    '{"barrier": null, "sizes": [1, 2]}'
    """
    return json.dumps(plain(content), indent=indent, allow_nan=False, ensure_ascii=False)


def number(value: float | None) -> str:
    """Write a number with the digits that carry meaning in a table.

    >>> [number(x) for x in (None, 0.0, 0.0001, 0.0123, 0.984, 12.34, float("inf"))]
    ['–', '0', '< 0.001', '0.012', '0.98', '12.3', 'not finite']
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size < 5e-16:  # rounding of a difference that is zero
        return "0"
    if size < 0.001:
        return "< 0.001" if value > 0 else "> −0.001"
    return f"{value:.2g}" if size < 0.1 else f"{value:.2f}" if size < 10 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Write a share of one as a percentage.

    >>> percent(0.9721)
    '97.2 %'
    """
    return "–" if value is None else f"{100 * value:.1f} %"


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lay out columns: the first flush left, the others flush right.

    >>> print(table(["network", "loss"], [["a", "0.1"], ["merged", "0.12"]]))
    network  loss
    a         0.1
    merged   0.12
    """
    lines = [list(map(str, row)) for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
