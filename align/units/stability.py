"""How often units find the same partner when only a part of the data is seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError, LayerNotFoundError
from ...metrics.moments import Moments
from .one_to_one import UnitMatching, bipartite_matching

Matcher = Callable[[Moments, str, str], UnitMatching]
"""Matches two layers of moments; only their pair is kept in these."""


@dataclass(frozen=True, eq=False, repr=False)
class Stability:
    """A matching on all data, beside matchings of the same layers on parts of the data.

    Attributes:
        matching: On all parts.
        frequency: (units of a,) share of the draws in which the unit has the partner that it has on all parts, float64;
            NaN for units without partner on all parts.
        partners: (draws, units of a) int64, the partner in each draw; -1 for none.
        drawn: (draws, parts of a draw) int64, which parts each draw has, rising.
    """

    matching: UnitMatching
    frequency: Tensor
    partners: Tensor
    drawn: Tensor

    def __repr__(self) -> str:
        return (
            f"Stability({len(self.drawn)} draws of {self.drawn.shape[1]} parts: mean frequency {self.mean:.3g}, "
            f"{int(self.reliable().sum())} of {len(self.frequency)} units reliable)"
        )

    @property
    def mean(self) -> float:
        """Mean frequency over the units with a partner on all parts; NaN without any."""
        return float(self.frequency.nanmean())

    def reliable(self, level: float = 0.95) -> Tensor:
        """Tell which units have their partner in at least this share of the draws, (units of a,) of bool.

        Raises:
            DataError: `level` is not between 0 and 1.
        """
        if not 0 <= level <= 1:
            raise DataError(f"level is {level}; expected a share from 0 to 1")
        return self.frequency >= level


def matching_stability(
    parts: Sequence[Moments],
    a: str,
    b: str,
    *,
    draws: int = 50,
    share: float = 0.5,
    seed: int = 0,
    matcher: Matcher = bipartite_matching,
) -> Stability:
    """Match again and again on random parts of the data, and count how often each unit finds the same partner.

    Subsampling without replacement, as in stability selection (Meinshausen & Bühlmann 2010), but of whole parts, whose
    moments are only added up. The draws share samples with the whole and, above one half, all with each other: the
    frequency says how much a partner depends on which samples were seen, it is no probability on new data.

    Args:
        parts: Moments of disjoint parts of the data, as of ten folds, each with both layers and their pair. They are
            left as they are.
        a: Name of the first layer.
        b: Name of the second layer.
        draws: How many draws of parts, no two the same. If there are fewer such draws, each is taken once.
        share: Of the parts, in each draw; between 0 and 1, rounded to at least one part and at most all but one.
        seed: Of the draws.
        matcher: Called with moments (of the two layers and their pair only), a and b. Default: one-to-one;
            `semi_matching`, or either with a minimum by `functools.partial`, is as good.

    Raises:
        DataError: Fewer than two parts, or one given twice; parts with other numbers of units; `draws` below 1; `share`
            outside (0, 1); no unit of a layer varies.
        LayerNotFoundError: A part lacks a layer, the pair, or samples.

    >>> x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    >>> parts = [Moments() for _ in range(6)]
    >>> for part, rows in zip(parts, x.split(10)):
    ...     part.update({"x": rows, "y": rows[:, [2, 0, 1]].relu()})
    >>> stability = matching_stability(parts, "x", "y")
    >>> stability.matching.partner, stability.frequency, len(stability.drawn)
    (tensor([1, 2, 0]), tensor([1., 1., 1.], dtype=torch.float64), 20)
    """
    _check(parts, draws, share)
    slim = [_pair_only(part, a, b, index) for index, part in enumerate(parts)]
    _check_units(slim)
    matching = matcher(_merged(slim, range(len(slim)), a, b), a, b)
    drawn = _draw(len(slim), min(max(round(share * len(slim)), 1), len(slim) - 1), draws, seed)
    partners = torch.stack([_partners(_merged(slim, chosen, a, b), a, b, matcher) for chosen in drawn.tolist()])
    frequency = (partners == matching.partner).to(torch.float64).mean(0)
    return Stability(matching, frequency.masked_fill_(matching.partner < 0, math.nan), partners, drawn)


def _check(parts: Sequence[Moments], draws: int, share: float) -> None:
    if len(parts) < 2:
        raise DataError(f"there are {len(parts)} parts of the data; stability needs at least 2, better 10")
    if draws < 1:
        raise DataError(f"draws is {draws}; expected at least 1")
    if not 0 < share < 1:
        raise DataError(f"share is {share}; expected a share of the parts between 0 and 1")
    if len({id(part) for part in parts}) < len(parts):
        raise DataError("a part of the data is given twice; parts must be disjoint")


def _pair_only(part: Moments, a: str, b: str, index: int) -> Moments:
    # Layers and pairs beside those asked for would be merged in every draw.
    slim = Moments([(a, b)])
    try:
        slim._products = {(a, b): part._product(a, b)}
        slim._sums = {name: part._layer(name) for name in dict.fromkeys((a, b))}
    except LayerNotFoundError as error:
        raise LayerNotFoundError(f"part {index} of the data: {error}") from error
    return slim


def _check_units(parts: Sequence[Moments]) -> None:
    for index, part in enumerate(parts):
        units = [{name: len(moments.mean(name)) for name in moments.names} for moments in (parts[0], part)]
        if units[0] != units[1]:
            raise DataError(f"part 0 of the data has units {units[0]}, part {index} has {units[1]}")


def _merged(parts: Sequence[Moments], chosen: Sequence[int], a: str, b: str) -> Moments:
    moments = Moments([(a, b)])
    for index in chosen:
        moments.merge(parts[index])
    return moments


def _draw(parts: int, size: int, draws: int, seed: int) -> Tensor:
    if math.comb(parts, size) <= draws:
        return torch.tensor(list(combinations(range(parts), size)))
    generator = np.random.default_rng(seed)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < draws:
        drawn[tuple(sorted(generator.permutation(parts)[:size].tolist()))] = None
    return torch.tensor(list(drawn))


def _partners(moments: Moments, a: str, b: str, matcher: Matcher) -> Tensor:
    if not all(bool(moments.variance(name).any()) for name in (a, b)):
        return torch.full((len(moments.mean(a)),), -1)  # a layer may be still in a draw that is not in all data
    return matcher(moments, a, b).partner
