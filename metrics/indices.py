"""The indices by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..base.errors import DataError, nearest
from .cca import CCA, PWCCA, SVCCA
from .cka import CKA, HSIC
from .index import Index
from .neighbours import MutualKNN
from .procrustes import Bures, Procrustes
from .regression import LinearRegression
from .rsa import RSA
from .soft_matching import SoftMatching

INDICES: dict[str, type[Index]] = {
    kind.name: kind
    for kind in (CKA, HSIC, CCA, SVCCA, PWCCA, LinearRegression, Procrustes, Bures, RSA, MutualKNN, SoftMatching)
}


def as_index(index: str | Index, parameters: Mapping[str, Any] | None = None) -> Index:
    """Make an index of its name and parameters; one that is made already is taken as it is.

    Args:
        index: A key of `INDICES`, or an index such as `CKA(debiased=True)`.
        parameters: Keyword arguments of the index.

    Raises:
        DataError: There is no such index or parameter, or a value is wrong.

    >>> as_index("svcca", {"threshold": 0.95})
    SVCCA(threshold=0.95, squared=False)
    """
    parameters = dict(parameters or {})
    if isinstance(index, Index):
        if parameters:
            raise DataError(f"the index {index} is made already; give {', '.join(parameters)} where you make it")
        return index
    if not isinstance(index, str) or index not in INDICES:
        raise DataError(f"unknown index {index!r}{nearest(str(index), INDICES)}")
    kind = INDICES[index]
    known = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    for name in parameters:
        if name not in known:
            raise DataError(f"the index {index!r} has no parameter {name!r}{nearest(name, known)}")
    try:
        return kind(**parameters)
    except TypeError as error:
        raise DataError(f"the index {index!r} does not take {parameters}: {error}") from error
