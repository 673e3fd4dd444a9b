"""Mean activations of two layers: as distributions, and unit by unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from ...metrics.moments import Moments
from .pictures import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_FEWEST = 3  # pairs, for a correlation to mean anything
_EXACT = 1000
_TIE = 1e-9
_UNDEFINED = (torch.nan, torch.nan, torch.nan, torch.nan)


@dataclass(frozen=True, eq=False)
class MeanActivations:
    """How the mean activations of the units of two layers compare.

    Attributes:
        means_a: (units of a,) in float64, NaN for units that do not vary.
        means_b: (units of b,), the same.
        curve_a: Means of the units of a that vary, in falling order.
        curve_b: Means of the units of b that vary, in falling order.
        ks: Kolmogorov-Smirnov statistic, the largest difference of the two distribution functions.
        ks_p_value: Of `ks`, for units that are independent draws.
        wasserstein: Wasserstein-1 distance of the two distributions, in units of the activations.
        pairs: (pairs, 2) int64, matched units that both vary; None without a matching.
        pearson: Correlation of the means of matched units; NaN with fewer than 3 pairs or where one side is constant.
        spearman: Rank correlation of the same.
        p_value: (1 + number of random pairings that reach `pearson`) / (1 + permutations), one-sided.
        spearman_p_value: The same for `spearman`.
        constant_a: Units of a that do not vary, left out.
        constant_b: Units of b that do not vary, left out.
    """

    means_a: Tensor
    means_b: Tensor
    curve_a: Tensor
    curve_b: Tensor
    ks: float
    ks_p_value: float
    wasserstein: float
    pairs: Tensor | None
    pearson: float
    spearman: float
    p_value: float
    spearman_p_value: float
    constant_a: tuple[int, ...]
    constant_b: tuple[int, ...]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the means of each layer in falling order; dots are the partners of the units of a, at their places.

        Args:
            ax: Where to draw. Default: a new figure.

        Returns:
            The axes.
        """
        ax = new_axes(ax)
        for curve, label in ((self.curve_a, "units of a"), (self.curve_b, "units of b")):
            ax.plot(_places(len(curve)), curve.tolist(), label=label)
        if self.pairs is not None:
            rank = self.means_a.nan_to_num(-torch.inf).argsort(descending=True, stable=True).argsort()
            places = _places(len(self.curve_a))[rank[self.pairs[:, 0]].numpy()]
            ax.plot(places, self.means_b[self.pairs[:, 1]].tolist(), ".", markersize=3, label="partners in b")
        ax.set_xlabel("share of units, highest mean first")
        ax.set_ylabel("mean activation")
        ax.legend()
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give the content as plain lists and numbers for JSON; NaN becomes None."""
        return plain({name: getattr(self, name) for name in self.__dataclass_fields__})


def mean_activations(
    moments: Moments,
    a: str,
    b: str,
    matching: Tensor | ArrayLike | None = None,
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> MeanActivations:
    """Compare the mean activations of two layers, as distributions and, for matched units, one by one.

    Li et al. (2015) found that mean activations differ much between the units of a network, while their distributions
    are almost the same in different networks. Equal distributions (`ks`, `wasserstein`, the two curves) do not say that
    matched units have equal means: that is what the correlations over pairs are for. Units that do not vary are left
    out.

    Args:
        moments: Means and variances suffice, as `Moments("none")` keeps.
        a: Name of the first layer.
        b: Name of the second layer.
        matching: (units of a,), the partner of each unit in b, -1 for none. Partners may repeat.
        permutations: Random pairings of the same means, for the p-values.
        seed: Of the pairings.

    Returns:
        The comparison.

    Raises:
        DataError: No unit of a layer varies; the matching has another shape, is not of whole numbers, or names units
            that b does not have; there are fewer than one permutation.
        LayerNotFoundError: The moments lack a layer.

    >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8.0)
    >>> moments = Moments("none")
    >>> moments.update({"a": x, "b": x.flip(1)})
    >>> found = mean_activations(moments, "a", "b", torch.arange(8))
    >>> found.ks, round(found.wasserstein, 6), found.pearson < -0.99, found.p_value
    (0.0, 0.0, True, 1.0)
    """
    from scipy.stats import ks_2samp, wasserstein_distance

    if permutations < 1:
        raise DataError(f"permutations is {permutations}; expected at least 1, 1000 say")
    means_a, means_b = _means(moments, a), _means(moments, b)
    pairs = None if matching is None else _pairs(matching, means_a, means_b)
    curves = [means[~means.isnan()].sort(descending=True).values for means in (means_a, means_b)]
    x, y = (curve.numpy() for curve in curves)
    # Beyond, the exact p-value takes long, and may leave float64.
    test: Any = ks_2samp(x, y, method="exact" if max(len(x), len(y)) <= _EXACT else "asymp")
    names = ("pearson", "spearman", "p_value", "spearman_p_value")
    correlations = _UNDEFINED
    if pairs is not None:
        correlations = _one_by_one(means_a[pairs[:, 0]].numpy(), means_b[pairs[:, 1]].numpy(), permutations, seed)
    return MeanActivations(
        means_a=means_a,
        means_b=means_b,
        curve_a=curves[0],
        curve_b=curves[1],
        ks=float(test.statistic),
        ks_p_value=float(test.pvalue),
        wasserstein=float(wasserstein_distance(x, y)),
        pairs=pairs,
        **dict(zip(names, correlations, strict=True)),
        constant_a=tuple(means_a.isnan().nonzero().flatten().tolist()),
        constant_b=tuple(means_b.isnan().nonzero().flatten().tolist()),
    )


def _means(moments: Moments, layer: str) -> Tensor:
    varying = moments.variance(layer) > 0
    if not varying.any():
        raise DataError(f"none of the {len(varying)} units of layer {layer!r} varies: there is nothing to compare")
    return moments.mean(layer).where(varying, torch.nan).cpu()


def _pairs(matching: Tensor | ArrayLike, means_a: Tensor, means_b: Tensor) -> Tensor:
    partners = torch.as_tensor(matching).cpu()
    if partners.shape != means_a.shape or partners.is_floating_point() or partners.dtype == torch.bool:
        raise DataError(
            f"matching of shape {tuple(partners.shape)} is {partners.dtype}; expected whole numbers of shape "
            f"{tuple(means_a.shape)}: the partner of each unit of a, -1 for none"
        )
    partners = partners.long()
    if not ((partners >= -1) & (partners < len(means_b))).all():
        raise DataError(
            f"matching of shape {tuple(partners.shape)} holds numbers from {int(partners.min())} to "
            f"{int(partners.max())}; b has units 0 to {len(means_b) - 1}, and -1 stands for none"
        )
    # Number -1 reads the last unit of b, and is left out.
    kept = (partners >= 0) & ~means_a.isnan() & ~means_b[partners].isnan()
    return torch.stack([kept.nonzero().flatten(), partners[kept]], 1)


def _one_by_one(x: np.ndarray, y: np.ndarray, permutations: int, seed: int) -> tuple[float, float, float, float]:
    from scipy.stats import rankdata

    if len(x) < _FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return _UNDEFINED
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(x)) for _ in range(permutations)]
    pearson, p_value = _against(x, y, orders)
    spearman, spearman_p_value = _against(rankdata(x), rankdata(y), orders)
    return pearson, spearman, p_value, spearman_p_value


def _against(x: np.ndarray, y: np.ndarray, orders: list[np.ndarray]) -> tuple[float, float]:
    x, y = (z - z.mean() for z in (x, y))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    found = float(x @ y)
    reached = sum(float(x @ y[order]) >= found - _TIE for order in orders)
    return found, (1 + reached) / (1 + len(orders))


def _places(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count
