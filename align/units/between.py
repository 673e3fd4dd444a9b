"""What the unit-level tools work on: a matrix of similarities, or moments and the names of two layers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError, NotFiniteError
from ...metrics.arrays import as_matrix
from ...metrics.moments import Moments

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Between:
    """Similarities of the units of a layer a with those of a layer b, without the units that do not vary.

    Attributes:
        values: (units of a that vary x units of b that vary) in float64, finite.
        units_a: Places of the rows among all units of a, rising.
        units_b: Places of the columns among all units of b, rising.
        shape: Numbers of all units of a and of b.
    """

    values: Tensor
    units_a: Tensor
    units_b: Tensor
    shape: tuple[int, int]

    @property
    def constant_a(self) -> tuple[int, ...]:
        """Units of a that do not vary, which are like nothing."""
        return left_out(self.shape[0], self.units_a)

    @property
    def constant_b(self) -> tuple[int, ...]:
        """Units of b that do not vary, which are like nothing."""
        return left_out(self.shape[1], self.units_b)


def between(similarity: Moments | Tensor | ArrayLike, a: str | None = None, b: str | None = None) -> Between:
    """Read similarities of units, and tell units that do not vary from those that do.

    Args:
        similarity: (units of a x units of b), such as `unit_correlation` or `mutual_information` gives; a unit whose
            row or column is NaN throughout does not vary. Or `Moments`, whose correlations are taken.
        a: Name of the first layer in the moments; None for a matrix.
        b: Name of the second layer in the moments; None for a matrix.

    Raises:
        DataError: No floating-point matrix; layers were named for a matrix, or not for moments; no unit of a layer
            varies.
        LayerNotFoundError: The moments lack a layer, or the pair was not kept.
        NotFiniteError: It holds infinity, or NaN outside rows and columns that are NaN throughout.

    >>> nan = float("nan")
    >>> found = between([[0.5, nan, 0.1], [0.2, nan, 0.9]])
    >>> found.values.tolist(), found.units_b.tolist(), found.constant_b
    ([[0.5, 0.1], [0.2, 0.9]], [0, 2], (1,))
    """
    if isinstance(similarity, Moments):
        values, varying_a, varying_b = _correlations(similarity, a, b)
    elif a is not None or b is not None:
        raise DataError(f"layers {a!r} and {b!r} were named beside a matrix; name layers with Moments only")
    else:
        values, varying_a, varying_b = _checked(similarity)
    units_a, units_b = (varying.nonzero().flatten() for varying in (varying_a, varying_b))
    for name, units, count in (("a", units_a, len(varying_a)), ("b", units_b, len(varying_b))):
        if not len(units):
            raise DataError(f"none of the {count} units of {name} varies over the samples: there is nothing to match")
    shape = (len(varying_a), len(varying_b))
    return Between(values[units_a][:, units_b], units_a.cpu(), units_b.cpu(), shape)


def named(moments: Moments, a: str | None, b: str | None) -> tuple[str, str]:
    """Give the names of two layers, which moments need.

    Raises:
        DataError: One is None.
    """
    if a is None or b is None:
        raise DataError(f"Moments hold {', '.join(moments.names) or 'no layer'}: name two layers, a and b")
    return a, b


def warn_few_samples(samples: int, units: int, layer: str, meaning: str, stacklevel: int = 3) -> None:
    """Warn where there are fewer samples than units, of what that means.

    Args:
        samples: How many samples.
        units: How many units.
        layer: Name of the layer of these units.
        meaning: What follows, as the end of a sentence.
        stacklevel: As for `warnings.warn`, counted from here.
    """
    if samples <= units:
        warnings.warn(
            f"layer {layer!r} has {units} units but {samples} samples: {meaning}", UserWarning, stacklevel=stacklevel
        )


def _correlations(moments: Moments, a: str | None, b: str | None) -> tuple[Tensor, Tensor, Tensor]:
    a, b = named(moments, a, b)
    return moments.correlation(a, b), moments.variance(a) > 0, moments.variance(b) > 0


def _checked(similarity: Tensor | ArrayLike) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(similarity, Tensor):
        array = np.asarray(similarity)
        if array.dtype.kind not in "biuf":
            raise DataError(f"similarity is an array of {array.dtype}; expected numbers, units of a x units of b")
        similarity = torch.from_numpy(np.ascontiguousarray(array))
    missing = similarity.isnan()
    values = as_matrix(similarity.masked_fill(missing, 0), "similarity").to(torch.float64)
    rows, columns = missing.all(1), missing.all(0)
    stray = missing & ~rows[:, None] & ~columns
    if stray.any():
        place = tuple(stray.nonzero()[0].tolist())
        raise NotFiniteError(
            f"similarity of shape {tuple(values.shape)} is NaN at {place}; only units that do not vary may be NaN, in "
            "their whole row or column"
        )
    return values, ~rows, ~columns


def left_out(count: int, units: Tensor) -> tuple[int, ...]:
    """Name the units of a layer of `count` that are not among those given.

    >>> left_out(4, torch.tensor([0, 2]))
    (1, 3)
    """
    return tuple(sorted(set(range(count)) - set(units.tolist())))
