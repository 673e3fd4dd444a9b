"""Checks on the arguments of network constructors."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.errors import ArchitectureError


def check_positive(network: str, **values: object) -> None:
    """Refuse sizes that are not positive integers.

    Raises:
        ArchitectureError: With the name of the argument and its value.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArchitectureError(f"{network}: {name} is {value!r}; pass a positive integer")


def check_choice(network: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ArchitectureError: With the choices.
    """
    if value not in choices:
        raise ArchitectureError(f"{network}: {name} is {value!r}; choose from {', '.join(map(repr, choices))}")
