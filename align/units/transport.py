"""Soft matching: units of layers of unequal size share each other, by optimal transport."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.coupling import soft_coupling
from ...metrics.moments import Moments
from .between import between
from .one_to_one import UnitMatching, matching_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_ROUNDING = 1e-9
_SMALLEST = 1e-10
_SCALE_STEP = 4
_STAGE_TOLERANCE = 1e-6
_SCALINGS = 20
_NEWTON_FROM = 1e-2
_RIDGE = 1e-14

_State = tuple[Tensor, Tensor, Tensor]
"""Potentials of the units of a and of b, and the coupling that they make."""


@dataclass(frozen=True, eq=False, repr=False)
class SoftMatch:
    """A coupling of the units of two layers, and what it is worth.

    Attributes:
        coupling: (units of a x units of b) T in float64, on the device of the similarity. Over the p and q units that
            vary rows sum to 1/p and columns to 1/q; rows and columns of units that do not vary are zero.
        value: Σ T_ij s_ij, the mean similarity of matched units.
        distance: √(2 - 2 Σ T_ij s_ij), the soft-matching distance (Khosla & Williams 2024) of units that are centred
            and of unit norm; None if a similarity is not within -1 … 1, as correlations are.
        regularisation: ε, or None if the coupling is exact.
        marginal_error: Σ_i |Σ_j T_ij - 1/p| + Σ_j |Σ_i T_ij - 1/q|.
        iterations: Of Sinkhorn's algorithm, Newton's steps included; 0 if the coupling is exact.
        constant_a: Units of a that do not vary.
        constant_b: Units of b that do not vary.
    """

    coupling: Tensor
    value: float
    distance: float | None
    regularisation: float | None
    marginal_error: float
    iterations: int
    constant_a: tuple[int, ...]
    constant_b: tuple[int, ...]
    _hard: UnitMatching = field(repr=False)

    def __repr__(self) -> str:
        p, q = self.coupling.shape
        how = "exact" if self.regularisation is None else f"regularisation {self.regularisation:g}"
        return f"SoftMatch({p} x {q} units, {how}: mean similarity {self.value:.3g})"

    @property
    def doubly_stochastic(self) -> Tensor:
        """The coupling times p: the rows of units that vary sum to 1, the columns to p/q, so to 1 for p = q.

        With equal counts and exact it is a permutation matrix; p and q count the units that vary.
        """
        return self.coupling * (len(self.coupling) - len(self.constant_a))

    def hard(self) -> UnitMatching:
        """Give each unit of a the unit of b that gets most of its mass, the first of several; repeats allowed."""
        return self._hard


def soft_matching(
    similarity: Moments | Tensor | ArrayLike,
    a: str | None = None,
    b: str | None = None,
    *,
    regularisation: float | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 10_000,
) -> SoftMatch:
    """Match the units of two layers of any sizes by optimal transport (Khosla & Williams 2024).

    max Σ T_ij s_ij + ε H(T) over T ≥ 0 with row sums 1/p and column sums 1/q, H(T) = -Σ T_ij log T_ij. Units that do
    not vary have no mass. (The index `isthmus.metrics.soft_matching` lets them count as similarity 0 instead.)

    Exact (ε = 0): with equal counts the best one-to-one matching. It is found as an assignment of copies where the
    counts have a small common multiple, else by the network simplex of the package POT (`ot`) if that is installed,
    else by `soft_coupling`: equal in value, though of several optima they may find different ones.

    Entropic (ε > 0; Cuturi 2013): Sinkhorn's algorithm in the log domain in float64, with ε-scaling and scalings that
    are absorbed (Schmitzer 2019, section 3), then Newton's steps where they at least halve the error (Brauer et al.
    2017), on the device of the similarity. It is smooth in s, and at most ε log min(p, q) below the exact value.

    Args:
        similarity: (units of a x units of b), NaN for units that do not vary. Or `Moments`, whose correlations are
            taken.
        a: Name of the first layer in the moments; None for a matrix.
        b: Name of the second layer in the moments; None for a matrix.
        regularisation: ε, in units of the similarity; for correlations 0.1 is soft, 0.01 nearly exact. None: exact.
        tolerance: The marginal error at which Sinkhorn's algorithm stops.
        max_iterations: After which it stops, with a warning; each step of the ε-scaling takes one at least.

    Raises:
        DataError: No floating-point matrix, no unit varies, layers are named wrongly; or `regularisation`, `tolerance`
            or `max_iterations` is not positive, or the first too small for float64.
        LayerNotFoundError: The moments lack a layer or the pair.
        NotFiniteError: The similarity holds infinity, or NaN outside whole rows and columns.

    >>> similarity = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.0, 0.7, 0.1, 0.6]])
    >>> found = soft_matching(similarity)
    >>> found.doubly_stochastic
    tensor([[0.5000, 0.0000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.0000, 0.5000]], dtype=torch.float64)
    >>> round(found.value, 6), round(soft_matching(similarity, regularisation=0.1).value, 3)
    (0.75, 0.749)
    """
    _check(regularisation, tolerance, max_iterations)
    found = between(similarity, a, b)
    values = found.values
    if regularisation is None:
        inner, iterations = soft_coupling(values), 0
    else:
        _check_scale(regularisation, values)
        inner, iterations = _sinkhorn(values, regularisation, tolerance, max_iterations)
    error = _marginal_error(inner)
    if iterations and not error <= tolerance:
        _warn(error, tolerance, iterations)
    value = float((inner * values).sum())
    coupling = values.new_zeros(found.shape)
    coupling[found.units_a[:, None], found.units_b] = inner
    hard = matching_of("soft", found, torch.arange(len(inner)), inner.argmax(1).cpu())
    # Beyond -1 … 1 they are no inner products of units of norm 1.
    distance = math.sqrt(max(0.0, 2 - 2 * value)) if float(values.abs().max()) <= 1 + _ROUNDING else None
    constant = found.constant_a, found.constant_b
    return SoftMatch(coupling, value, distance, regularisation, error, iterations, *constant, hard)


def _check(regularisation: float | None, tolerance: float, max_iterations: int) -> None:
    if regularisation is not None and not 0 < regularisation < math.inf:
        raise DataError(f"regularisation is {regularisation}; expected a positive number, or None for the exact one")
    if not tolerance > 0:
        raise DataError(f"tolerance is {tolerance}; expected a positive marginal error")
    if max_iterations < 1:
        raise DataError(f"max_iterations is {max_iterations}; expected at least 1")


def _check_scale(regularisation: float, values: Tensor) -> None:
    spread = float(values.max() - values.min())
    if regularisation < _SMALLEST * spread:
        raise DataError(
            f"regularisation is {regularisation:g}, too small for float64 where similarities differ by {spread:g}; "
            "leave it out for the exact coupling"
        )


def _warn(error: float, tolerance: float, iterations: int) -> None:
    warnings.warn(
        f"soft_matching stopped after {iterations} iterations at a marginal error of {error:.2g}, above the tolerance "
        f"of {tolerance:g}; give a larger regularisation, more max_iterations, or none for the exact coupling",
        UserWarning,
        stacklevel=3,
    )


def _marginal_error(coupling: Tensor) -> float:
    return sum(
        float((coupling.sum(axis) - 1 / size).abs().sum()) for axis, size in zip((1, 0), coupling.shape, strict=True)
    )


def _sinkhorn(values: Tensor, epsilon: float, tolerance: float, most: int) -> tuple[Tensor, int]:
    if len(values) > values.shape[1]:
        coupling, done = _sinkhorn(values.T, epsilon, tolerance, most)  # Newton's system then is the smaller one
        return coupling.T, done
    values = values - values.max()  # what all share would cost digits
    spread, done = -float(values.min()), 0
    state = torch.zeros_like(values[:, 0]), torch.zeros_like(values[0]), values
    for stage in range(math.ceil(math.log(max(spread / epsilon, 1), _SCALE_STEP)), -1, -1):
        scale = epsilon * _SCALE_STEP**stage
        # A stage must be better than the smallest masses, 1 / lcm(p, q), or the next one starts from a wrong vertex.
        stop = max(tolerance, _STAGE_TOLERANCE) if stage else tolerance
        state = _updated(values, state[0], state[1], scale)
        done += 1
        while done < most and _marginal_error(state[2]) > stop:
            state, steps = _advanced(values, state, scale, min(_SCALINGS, most - done - 1))
            done += steps
    return state[2], done


def _advanced(values: Tensor, state: _State, epsilon: float, times: int) -> tuple[_State, int]:
    error = _marginal_error(state[2])
    if error <= _NEWTON_FROM:
        new = _newton(values, state, epsilon)
        if _marginal_error(new[2]) <= error / 2:
            return new, 1
    return _updated(values, *_scaled(state, epsilon, times), epsilon), times + 1


def _updated(values: Tensor, f: Tensor, g: Tensor, epsilon: float) -> _State:
    f = epsilon * (-math.log(len(f)) - torch.logsumexp((values + g) / epsilon, 1))
    g = _other(values, f, epsilon)
    return f, g, ((values + f[:, None] + g) / epsilon).exp_()


def _other(values: Tensor, f: Tensor, epsilon: float) -> Tensor:
    return epsilon * (-math.log(values.shape[1]) - torch.logsumexp((values + f[:, None]) / epsilon, 0))


def _scaled(state: _State, epsilon: float, times: int) -> tuple[Tensor, Tensor]:
    # Products are far cheaper than logarithms. After an update no row sums to less than 1 / (p q), and so few scalings
    # cannot leave the range of float64.
    f, g, coupling = state
    u, v = torch.ones_like(f), torch.ones_like(g)
    for _ in range(times):
        u = 1 / (len(f) * (coupling @ v))
        v = 1 / (len(g) * (u @ coupling))
    return f + epsilon * u.log(), g + epsilon * v.log()


def _newton(values: Tensor, state: _State, epsilon: float) -> _State:
    # The step in f with g always at its best, for which columns are right: the Hessian's Schur complement. Its null
    # space, of potentials that rise together, is filled, and parts that hardly couple are kept from being singular.
    f, g, coupling = state
    rows = coupling.sum(1)
    hessian = rows.diag().addmm_(coupling, coupling.T, alpha=-len(g)).add_(1 / len(f) ** 2)
    hessian.diagonal().add_(_RIDGE / len(f))
    f = f + epsilon * torch.linalg.solve_ex(hessian, 1 / len(f) - rows)[0]
    return _updated(values, f, _other(values, f, epsilon), epsilon)
