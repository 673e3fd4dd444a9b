"""The weighted mean of networks, with weights that may differ from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from ...base.architecture import State
from ...base.errors import DataError, nearest
from ...base.interpolation import normalised, varying, weighted_mean
from ..states import tied

ByLayer = Mapping[str, Sequence[float]]


def mean(
    states: Sequence[State], weights: Sequence[float] | None = None, *, by_layer: ByLayer | None = None
) -> dict[str, Tensor]:
    """Give the weighted mean of state dicts, layer by layer: Σ wᵢ sᵢ / Σ wᵢ.

    Integers and flags are those of the first. Entries that are equal in all networks stay exactly as they are.

    Args:
        states: At least one state dict; all of the same names and shapes, their units in the same order.
        weights: One non-negative number each; equal by default.
        by_layer: Other weights for some tensors, by pattern: `"layer1.*"`, `"*.bias"`, or the name of a module, which
            stands for all that is in it. Where several patterns fit, the last one counts.

    Returns:
        Tensors by name, of the types and on the devices of the first state.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A tensor holds NaN or infinity.
        DataError: Weights do not fit, a pattern fits no tensor, or tied tensors would get different weights.

    >>> import torch
    >>> states = [{"a": torch.zeros(1), "b": torch.zeros(1)}, {"a": torch.ones(1), "b": torch.ones(1)}]
    >>> mean(states, by_layer={"b": [1, 3]})
    {'a': tensor([0.5000]), 'b': tensor([0.7500])}
    """
    shares = shares_by_name(list(states[0]), len(states), weights, by_layer)
    names = varying(states)
    _check_ties(states, names, shares)
    alike: dict[tuple[float, ...], list[str]] = {}
    for name in states[0]:
        alike.setdefault(shares[name], []).append(name)
    means: dict[str, Tensor] = {}
    for given, own in alike.items():
        means |= weighted_mean([{name: state[name] for name in own} for state in states], given)
    return {name: means[name] for name in states[0]}


def shares_by_name(
    names: Sequence[str], count: int, weights: Sequence[float] | None, by_layer: ByLayer | None
) -> dict[str, tuple[float, ...]]:
    """Give the weights of each tensor, adding up to one.

    Raises:
        DataError: Weights do not fit, or a pattern fits no tensor.
    """
    shares = dict.fromkeys(names, tuple(normalised(weights, count)))
    for pattern, given in (by_layer or {}).items():
        own = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not own:
            raise DataError(f"by_layer: no tensor fits {pattern!r}{nearest(pattern, names)}")
        try:
            shares |= dict.fromkeys(own, tuple(normalised(given, count)))
        except DataError as error:
            raise DataError(f"by_layer[{pattern!r}]: {error}") from None
    return shares


def _check_ties(states: Sequence[State], names: Sequence[str], shares: Mapping[str, tuple[float, ...]]) -> None:
    if len(set(shares.values())) == 1:
        return
    for name, first in tied(states, names).items():
        if shares[name] != shares[first]:
            raise DataError(
                f"by_layer gives {name} and {first} different weights, and they are one tensor under two names; "
                "let one pattern name both"
            )
