"""SLERP: the way between two networks along a circle instead of a line."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ...base.architecture import State
from ...base.errors import DataError, nearest
from ...base.interpolation import normalised, varying, weighted_mean
from ..states import accumulator, statistics_in

NORMS = ("interpolated", "as_given")
PARALLEL = 1e-6  # below this angle a chord and its arc differ by less than float64 resolves


def slerp(
    states: Sequence[State],
    *,
    weights: Sequence[float] | None = None,
    whole: bool = False,
    norm: str = "interpolated",
    statistics: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Interpolate two networks spherically (Shoemake 1985): sin((1-t)Ω)/sin Ω · u + sin(tΩ)/sin Ω · v.

    Ω is the angle between the two, and t the share of the second. The straight mean of two vectors that are not
    parallel is shorter than both; this is not. Where the two are parallel, opposite or one of them is zero, there is
    no such circle, and the straight mean is taken: a network and itself give itself, bit for bit. Running statistics
    are averaged.

    Args:
        states: Two networks of the same names and shapes, their units in the same order.
        weights: Two non-negative numbers; t is the share of the second, 1/2 by default.
        whole: Whether all weights are one vector; else each tensor is a vector of its own.
        norm: "interpolated": u and v are the directions, and the length is that between the lengths of the two;
            "as_given": u and v are the vectors as they are, so that the length is in between only roughly.
        statistics: Names of tensors to be averaged; by default those called running_mean or running_var.

    Returns:
        Tensors by name, of the types and on the devices of the first network, whose integers and flags they hold.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A tensor holds NaN or infinity.
        DataError: There are not two networks, an option or the weights do not fit, or a tensor is complex.

    Reference:
        Shoemake. Animating rotation with quaternion curves. SIGGRAPH 1985. https://doi.org/10.1145/325334.325242

    >>> slerp([{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])}])
    {'w': tensor([2.1213, 2.1213])}
    """
    if len(states) != 2:
        raise DataError(f"slerp goes from one network to another, and there are {len(states)}; use method='mean'")
    if norm not in NORMS:
        raise DataError(f"norm is {norm!r}{nearest(norm, NORMS)}; choose 'interpolated' or 'as_given'")
    shares = normalised(weights, 2)
    floating = varying(states)
    names = [name for name in floating if name not in statistics_in(floating, statistics)]
    for name in names:
        if states[0][name].is_complex():
            raise DataError(f"{name} is complex; slerp is for real tensors: use method='mean'")
    a, b = states
    with torch.no_grad():
        merged = weighted_mean(states, shares)
        for own in [names] if whole else [[name] for name in names]:
            factors = _factors(_products(a, b, own), shares[1], norm)
            if factors is not None:
                merged |= {name: _blend(a[name], b[name], factors) for name in own}
    return merged


def _products(a: State, b: State, names: Sequence[str]) -> tuple[float, float, float]:
    """Give |a|², |b|² and a·b over some tensors, in float64."""

    def total(one: State, other: State) -> float:
        return math.fsum(
            float((one[name].double() * other[name].to(one[name].device).double()).sum()) for name in names
        )

    return total(a, a), total(b, b), total(a, b)


def _factors(products: tuple[float, float, float], t: float, norm: str) -> tuple[float, float] | None:
    """Give what to multiply the two with; None: there is no circle through them."""
    length_a, length_b = math.sqrt(products[0]), math.sqrt(products[1])
    if not (length_a and length_b):
        return None
    angle = math.acos(min(1.0, max(-1.0, products[2] / length_a / length_b)))
    if min(angle, math.pi - angle) < PARALLEL:
        return None
    of_a, of_b = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    if norm == "as_given":
        return of_a, of_b
    length = (1 - t) * length_a + t * length_b
    return of_a * length / length_a, of_b * length / length_b


def _blend(a: Tensor, b: Tensor, factors: tuple[float, float]) -> Tensor:
    wide = accumulator(a, b)
    return (a.to(wide) * factors[0] + b.to(a.device, wide) * factors[1]).to(a.dtype)
