"""Soft matching: how well the single units of two representations can be put beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..base.errors import DataError
from .arrays import centred, rescaled
from .coupling import soft_coupling
from .index import Index, Invariances, check_moments

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .moments import Moments

Kind = Literal["correlation", "distance"]


@dataclass(frozen=True)
class SoftMatching(Index):
    """Soft matching of units (Khosla & Williams 2024, "Soft Matching Distance").

    Units are matched by the optimal transport between their responses with equal masses, 1/p for each unit of x and 1/q
    for each of y: max over couplings T of Σ T_ij s_ij, see `soft_coupling`. With equal counts this is the best
    one-to-one matching. Responses are centred; then

    * "correlation": each unit has norm 1, s_ij is Pearson's correlation, and the score is Σ T_ij s_ij, at most 1. A
      unit that does not vary correlates with nothing: it counts as 0.
    * "distance": the whole representation is scaled to ‖X‖²_F = p (on average a unit has norm 1), and the distance is
      √(Σ T_ij ‖x_i - y_j‖²), a metric between 0 and 2. With p = q this is min over permutations P of ‖XP - Y‖_F at unit
      Frobenius norms. Read off `Moments` it is 2 - 2 Σ T_ij s_ij before the root, which resolves 1e-8.

    NaN where no unit of a representation varies.

    Attributes:
        kind: "correlation" or "distance".

    Raises:
        DataError: `kind` is none of these.

    >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    >>> round(SoftMatching()(x, x[:, [2, 0, 3, 1]]), 6), round(SoftMatching("distance")(x, 2 * torch.cat([x, x], 1)), 6)
    (1.0, 0.0)
    """

    name: ClassVar[str] = "soft_matching"
    invariances: ClassVar[Invariances] = Invariances(
        orthogonal=False, scaling=True, linear=False, permutation=True, translation=True
    )
    from_moments: ClassVar[bool] = True

    kind: Kind = "correlation"

    def __post_init__(self) -> None:
        if self.kind not in ("correlation", "distance"):
            raise DataError(f"kind is {self.kind!r}; expected 'correlation' or 'distance'")

    @property
    def distance(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether 0 means equal."""
        return self.kind == "distance"

    @property
    def estimator(self) -> str:
        """Say in a few words what the values are."""
        what = "mean correlation of matched units" if self.kind == "correlation" else "distance at unit scale"
        return f"soft matching by optimal transport, {what}"

    def prepare(self, x: Tensor) -> Tensor:
        """Centre and scale the units."""
        if self.kind == "distance":
            x = rescaled(centred(x))
            return x * (math.sqrt(x.shape[1]) / x.norm())
        x = centred(x)
        x = _divided(x, x.abs().amax(0))  # its squares then stay within float64
        x = _divided(x, x.norm(dim=0))
        return x if x.any() else x + math.nan

    def score(self, a: Tensor, b: Tensor) -> float:
        """Match the units of two prepared representations."""
        if bool(a.isnan().any() or b.isnan().any()):
            return math.nan
        similarity = a.T @ b
        coupling = soft_coupling(similarity)
        if self.kind == "correlation":
            return float((coupling * similarity).sum())
        units_a, units_b = coupling.nonzero().T
        # From the differences: 2 - 2 Σ T s would leave 1e-8 of equal units.
        squares = (a[:, units_a] - b[:, units_b]).square_().sum(0)
        return math.sqrt(float(coupling[units_a, units_b] @ squares))

    def taken(self, state: Tensor, rows: Tensor) -> Tensor:
        """Give the state of x[rows]; centring and scaling do not remember those of the whole."""
        return self.prepare(state[rows.to(state.device)])

    def scores_from_moments(self, moments: Moments, layers_a: Sequence[str], layers_b: Sequence[str]) -> Tensor:
        """Compare layers by their cross-covariances: (len(a) x len(b)) in float64.

        Raises:
            LayerNotFoundError: A pair was not kept.
            DataError: A layer has fewer than two samples.
        """
        check_moments(moments, (*layers_a, *layers_b), self.name, self.least)
        values = [[self._from_moments(moments, a, b) for b in layers_b] for a in layers_a]
        return torch.tensor(values, dtype=torch.float64)

    def _from_moments(self, moments: Moments, a: str, b: str) -> float:
        variances = [moments.variance(name) for name in (a, b)]
        if not all(variance.any() for variance in variances):
            return math.nan
        if self.kind == "correlation":
            similarity = moments.correlation(a, b).nan_to_num(0.0)
        else:
            similarity = moments.covariance(a, b) / (variances[0].mean().sqrt() * variances[1].mean().sqrt())
        matched = float((soft_coupling(similarity) * similarity).sum())
        # Σ T s is at most 1 but for rounding.
        return matched if self.kind == "correlation" else math.sqrt(max(0.0, 2 - 2 * matched))


def soft_matching(x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, kind: Kind = "correlation") -> float:
    """Match the units of two representations by optimal transport (Khosla & Williams 2024), see `SoftMatching`.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        kind: "correlation", the mean correlation of matched units; or "distance", a metric.

    Returns:
        The score, at most 1, or the distance, from 0 to 2; NaN, with a warning, where a representation does not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least two; or an unknown kind.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    >>> round(soft_matching(x, x.relu()), 4), round(soft_matching(x, x.relu()[:, :3], kind="distance"), 4)
    (0.8722, 0.8455)
    """
    return SoftMatching(kind)(x, y, stacklevel=3)


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.where(scale > 0, scale, 1.0)
