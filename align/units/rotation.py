"""Whether a code is local or distributed: matched units against the same after random rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from ...metrics.moments import Moments
from .between import left_out, warn_few_samples
from .joint import check_choice
from .pictures import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Statistic = Literal["bipartite", "semi"]

_ROUNDING = 1e-12  # of the largest variance, as in `cluster_scores`
_TIE = 1e-9


@dataclass(frozen=True, eq=False)
class RotationTest:
    """Correlations of matched units as they are, and after random rotations of the units.

    Attributes:
        observed: Mean correlation of the matched units.
        rotated: (rotations,), the same after each rotation, in float64.
        p_value: (1 + number of rotations that reach `observed`) / (1 + rotations), one-sided.
        effect: (observed - mean of rotated) / standard deviation of rotated; NaN where they do not differ.
        units: (units of a,), correlation of each unit of a with its partner; NaN for none.
        curve: (matched units,), these in falling order.
        rotated_curves: (rotations x matched units), the same after each rotation.
        statistic: "bipartite" or "semi".
        whiten: Whether the units of both networks were whitened.
        both: Whether the units of a were rotated too.
        constant_a: Units of a that do not vary, left out.
        constant_b: Units of b that do not vary, left out.
    """

    observed: float
    rotated: Tensor
    p_value: float
    effect: float
    units: Tensor
    curve: Tensor
    rotated_curves: Tensor
    statistic: str
    whiten: bool
    both: bool
    constant_a: tuple[int, ...]
    constant_b: tuple[int, ...]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the correlations of matched units in falling order, as they are and after each rotation.

        Args:
            ax: Where to draw. Default: a new figure.

        Returns:
            The axes.
        """
        ax = new_axes(ax)
        for i, curve in enumerate(self.rotated_curves.tolist()):
            ax.plot(curve, color="grey", linewidth=0.8, label=None if i else "after random rotations")
        ax.plot(self.curve.tolist(), color="tab:blue", label="units as they are")
        ax.set_xlabel("units of a, best matched first")
        ax.set_ylabel("correlation with the partner")
        ax.legend()
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give the content as plain lists and numbers for JSON; NaN becomes None."""
        return plain({name: getattr(self, name) for name in self.__dataclass_fields__})


def rotation_test(
    moments: Moments,
    a: str,
    b: str,
    *,
    rotations: int = 20,
    seed: int = 0,
    statistic: Statistic = "bipartite",
    whiten: bool = False,
    both: bool = False,
) -> RotationTest:
    """Test whether single units of b are what units of a correspond to, or whether any basis of b would do.

    Li et al. (2015) saw a mix of local and distributed codes; that a rotation lowers the matched correlations is the
    test for privileged axes of Khosla et al. (2024, "Privileged representational axes").

    The units of b, standardised, are rotated by R from the Haar measure on O(q), and the units of a matched anew. With
    correlations C between a and b and Σ inside b, those with rotated units are (C R)_ij / √(Rᵀ Σ R)_jj, so that
    moments are all that is needed. Where the units of b are what is shared (a local code), no rotation reaches their
    matched correlation; where only the subspace is shared (a distributed code), they are one basis like any other.

    With "whiten" both networks are first whitened by Σ^(-1/2), the basis closest to the units in which no direction has
    more variance than another. Under the hypothesis that b's whitened basis is a random one the p-value is then exact:
    P(p ≤ k / (1 + rotations)) = k / (1 + rotations).

    Args:
        moments: With the pair (a, b), and (b, b); (a, a) for `whiten` or `both`.
        a: Name of the layer whose units are matched.
        b: Name of the layer whose units are rotated.
        rotations: How many.
        seed: Of the rotations. They are drawn on the CPU: the same on every device.
        statistic: "bipartite", mean correlation of the best one-to-one matching; or "semi", mean over units of a of the
            best correlation.
        whiten: Whiten first. Needs clearly more samples than units.
        both: Rotate the units of a too, by another rotation.

    Returns:
        The test. Of a layer of one unit only the sign can change: it can hardly be significant.

    Raises:
        DataError: There are fewer than one rotation; the statistic is unknown; no unit of a layer varies.
        LayerNotFoundError: The moments lack a layer, or a pair was not kept.

    >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).relu()
    >>> moments = Moments()
    >>> moments.update({"a": x, "b": x.flip(1)})
    >>> found = rotation_test(moments, "a", "b")
    >>> round(found.observed, 3), bool(found.rotated.max() < 0.8), round(found.p_value, 3)
    (1.0, True, 0.048)
    """
    check_choice("statistic", statistic, Statistic)
    if rotations < 1:
        raise DataError(f"rotations is {rotations}; expected at least 1, 20 say")
    units_a, units_b = (_varying(moments, layer) for layer in (a, b))
    cross, inside_a, inside_b = _correlations(moments, a, b, units_a, units_b, whiten, both)
    match = _one_to_one if statistic == "bipartite" else _best
    generator = torch.Generator().manual_seed(seed)
    matched = match(cross)
    curves = torch.stack(
        [_curve(match(_rotated(cross, inside_a if both else None, inside_b, generator))) for _ in range(rotations)]
    )
    rotated = curves.mean(1)
    observed, spread = float(_curve(matched).mean()), float(rotated.std()) if rotations > 1 else 0.0
    units = matched.new_full((len(moments.mean(a)),), torch.nan).index_copy_(0, units_a, matched)
    return RotationTest(
        observed=observed,
        rotated=rotated.cpu(),
        p_value=(1 + int((rotated >= observed - _TIE).sum())) / (1 + rotations),
        effect=(observed - float(rotated.mean())) / spread if spread > 0 else torch.nan,
        units=units.cpu(),
        curve=_curve(matched).cpu(),
        rotated_curves=curves.cpu(),
        statistic=statistic,
        whiten=whiten,
        both=both,
        constant_a=left_out(len(moments.mean(a)), units_a),
        constant_b=left_out(len(moments.mean(b)), units_b),
    )


def _varying(moments: Moments, layer: str) -> Tensor:
    varying = moments.variance(layer) > 0
    if not varying.any():
        raise DataError(f"none of the {len(varying)} units of layer {layer!r} varies: there is nothing to match")
    return varying.nonzero().flatten()


def _correlations(
    moments: Moments, a: str, b: str, units_a: Tensor, units_b: Tensor, whiten: bool, both: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    # Those inside a only where they are needed: (a, a) may not have been kept.
    cross = moments.correlation(a, b)[units_a][:, units_b]
    inside_a = moments.correlation(a, a)[units_a][:, units_a] if whiten or both else None
    inside_b = moments.correlation(b, b)[units_b][:, units_b]
    if not whiten or inside_a is None:
        return cross, inside_a, inside_b
    for layer, inside in ((a, inside_a), (b, inside_b)):
        meaning = "whitened, they correlate by chance as far as they can"
        warn_few_samples(moments.count(layer), len(inside), layer, meaning, stacklevel=4)
    root_a, root_b = _inverse_root(inside_a, moments), _inverse_root(inside_b, moments)
    # The identity, or the projection onto the span of units that depend on each other.
    inside_a, inside_b = root_a @ inside_a @ root_a, root_b @ inside_b @ root_b
    return _divided(root_a @ cross @ root_b, inside_a.diagonal(), inside_b.diagonal()), inside_a, inside_b


def _inverse_root(inside: Tensor, moments: Moments) -> Tensor:
    values, axes = torch.linalg.eigh((inside + inside.T) / 2)
    tolerance = max(len(values) * torch.finfo(moments.product_dtype).eps, _ROUNDING) * values[-1]
    scale = values.clamp(min=float(tolerance)).rsqrt().where(values > tolerance, 0.0)
    return (axes * scale) @ axes.T


def _rotated(cross: Tensor, inside_a: Tensor | None, inside_b: Tensor, generator: torch.Generator) -> Tensor:
    by = _haar(len(inside_b), generator).to(cross)
    cross, variance_b = cross @ by, ((inside_b @ by) * by).sum(0)
    if inside_a is None:
        return _divided(cross, cross.new_ones(len(cross)), variance_b)
    by = _haar(len(inside_a), generator).to(cross)
    return _divided(by.T @ cross, ((inside_a @ by) * by).sum(0), variance_b)


def _divided(cross: Tensor, variance_a: Tensor, variance_b: Tensor) -> Tensor:
    return cross / variance_a.sqrt()[:, None] / variance_b.sqrt()


def _haar(size: int, generator: torch.Generator) -> Tensor:
    # Mezzadri (2007): the factor of a Gaussian matrix is uniform once the signs of the triangle are made positive.
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _one_to_one(correlation: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    rows, columns = (torch.from_numpy(i) for i in linear_sum_assignment(correlation.cpu().numpy(), maximize=True))
    rows, columns = rows.to(correlation.device), columns.to(correlation.device)
    return correlation.new_full((len(correlation),), torch.nan).index_copy_(0, rows, correlation[rows, columns])


def _best(correlation: Tensor) -> Tensor:
    return correlation.amax(1)


def _curve(matched: Tensor) -> Tensor:
    return matched[~matched.isnan()].sort(descending=True).values
