"""How close the units of two layers are to each other, within each and between them, in one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.arrays import as_matrix
from ...metrics.moments import Moments
from .between import left_out, named

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Kind = Literal["absolute", "positive"]

_SYMMETRIC = 1e-6  # of the largest affinity: what products in float32 leave


@dataclass(frozen=True, eq=False)
class JointAffinity:
    """How close units are to each other, those of layer a and those of layer b in one graph.

    Attributes:
        values: (m x m) in float64, symmetric, not negative; units of a that vary come first, then those of b.
        units_a: Places of the first rows among all units of a, rising.
        units_b: Places of the other rows among all units of b, rising.
        shape: Numbers of all units of a and of b.
        kind: "absolute" or "positive" correlation, or "given".
    """

    values: Tensor
    units_a: Tensor
    units_b: Tensor
    shape: tuple[int, int]
    kind: str

    @property
    def joint(self) -> Tensor:
        """Places of the rows among all units, (m,): units of a from 0, units of b from the number of units of a."""
        return torch.cat([self.units_a, self.units_b + self.shape[0]])

    @property
    def constant_a(self) -> tuple[int, ...]:
        """Units of a that do not vary."""
        return left_out(self.shape[0], self.units_a)

    @property
    def constant_b(self) -> tuple[int, ...]:
        """Units of b that do not vary."""
        return left_out(self.shape[1], self.units_b)


def joint_affinity(moments: Moments, a: str, b: str, *, kind: Kind = "absolute") -> JointAffinity:
    """Compute the correlations of all units of two layers with each other (Li et al. 2015, many-to-many mappings).

    s_ij = |r_ij| or max(r_ij, 0), within a, within b and between them. Units that do not vary are left out.

    Args:
        moments: With the pairs (a, a), (b, b) and (a, b), which `Moments("all")` keeps.
        a: Name of the first layer.
        b: Name of the second layer.
        kind: "absolute", or "positive", where opposite units are as far apart as unrelated ones.

    Returns:
        The affinities, on the device of the moments.

    Raises:
        DataError: `kind` is none of these, or no unit of a layer varies.
        LayerNotFoundError: The moments lack a layer, or a pair was not kept.

    >>> x = torch.tensor([[1.0, 0.0, 5.0], [2.0, 1.0, 5.0], [3.0, 0.0, 5.0]])
    >>> moments = Moments()
    >>> moments.update({"a": x, "b": -x[:, :1]})
    >>> found = joint_affinity(moments, "a", "b")
    >>> found.values.round(decimals=3).tolist(), found.constant_a
    ([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], (2,))
    """
    check_choice("affinity", kind, Kind)
    units = []
    for name, layer in (("a", a), ("b", b)):
        varying = moments.variance(layer) > 0
        units.append(varying.nonzero().flatten())
        if not len(units[-1]):
            raise DataError(
                f"none of the {len(varying)} units of {name} ({layer!r}) varies: there is nothing to cluster"
            )
    blocks = [[_rows_columns(moments.correlation(x, y), units[i], units[j]) for j, y in enumerate((a, b))]
              for i, x in enumerate((a, b))]  # fmt: skip
    values = torch.cat([torch.cat(row, 1) for row in blocks])
    values = (values + values.T) / 2
    # Rounding can leave more than 1.
    values = (values.abs() if kind == "absolute" else values.clamp(min=0)).clamp_(max=1)
    shape = (len(moments.mean(a)), len(moments.mean(b)))
    return JointAffinity(values, units[0].cpu(), units[1].cpu(), shape, kind)


def read_affinity(
    affinity: Moments | JointAffinity | Tensor | ArrayLike,
    a: str | None,
    b: str | None,
    kind: Kind,
    sizes: tuple[int, int] | None,
) -> JointAffinity:
    """Read affinities of units: from moments, as they are, or from a square matrix.

    Raises:
        DataError: A matrix is not square, symmetric and not negative, or `sizes` does not add up to its units; layers
            were named for a matrix, or not for moments.
        NotFiniteError: A matrix holds NaN or infinity.
    """
    if isinstance(affinity, Moments):
        if sizes is not None:
            raise DataError(
                f"sizes={sizes} was given beside Moments, which know how many units a layer has; leave it out"
            )
        return joint_affinity(affinity, *named(affinity, a, b), kind=kind)
    if a is not None or b is not None:
        raise DataError(f"layers {a!r} and {b!r} were named beside a matrix; name layers with Moments only")
    if isinstance(affinity, JointAffinity):
        return affinity
    values = as_matrix(affinity, "affinity").to(torch.float64)
    shape = tuple(values.shape)
    if sizes is None or len(sizes) != 2 or min(sizes) < 0 or shape != (sum(sizes), sum(sizes)):
        raise DataError(
            f"affinity has shape {shape}, sizes is {sizes}; expected a square matrix over the units of a and then "
            "those of b, with sizes=(units of a, units of b)"
        )
    if (values < 0).any():
        raise DataError(
            f"affinity of shape {shape} has a negative entry {float(values.min()):g}; take abs() or clamp it"
        )
    unequal = float((values - values.T).abs().max())
    if unequal > _SYMMETRIC * float(values.max()):
        raise DataError(
            f"affinity of shape {shape} is not symmetric: entries differ by {unequal:g}; take (S + S.T) / 2"
        )
    return JointAffinity(
        (values + values.T) / 2, torch.arange(sizes[0]), torch.arange(sizes[1]), (sizes[0], sizes[1]), "given"
    )


def check_choice(name: str, choice: str, known: Any) -> None:
    """Refuse what is not one of the choices of a `Literal`.

    Raises:
        DataError: With the known ones.
    """
    if choice not in get_args(known):
        raise DataError(f"{name} is {choice!r}; expected one of {', '.join(get_args(known))}")


def _rows_columns(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return values[rows][:, columns]
