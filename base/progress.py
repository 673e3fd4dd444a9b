"""Progress: a bar on a terminal, silence when piped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], description: str, total: int | None = None, show: bool | None = None) -> tqdm[T]:
    """Wrap an iterable in a progress bar on standard error.

    Args:
        items: What to iterate over.
        description: What is being done.
        total: How many items, where `items` cannot say.
        show: Always (True), never (False), or on a terminal only (None).
    """
    return tqdm(items, desc=description, total=total, disable=None if show is None else not show, leave=False)
