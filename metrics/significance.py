"""Chance level and uncertainty of an index: permutation null and jackknife over prepared layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import DataError
from .index import Index

# Fewer groups make the t quantile, more make the work, grow without gain (Efron & Tibshirani 1993, chapter 11).
_GROUPS = 20
_LEVEL = 0.95


@dataclass(frozen=True)
class Null:
    """What an index gives when the samples of one side are shuffled.

    Attributes:
        mean: Mean over the shuffles, (layers of a x layers of b).
        p_values: (1 + shuffles at least as alike as the true order) / (1 + shuffles), the estimate that is never zero
            (Phipson & Smyth 2010); NaN where the index is undefined.
    """

    mean: np.ndarray
    p_values: np.ndarray


def permutation_null(
    index: Index,
    states_a: Sequence[Any],
    states_b: Sequence[Any],
    values: Tensor,
    samples: int,
    *,
    shuffles: int = 200,
    seed: int = 0,
) -> Null:
    """Compare each layer of one network with each of another whose samples are shuffled.

    The layers are prepared once; a shuffle reorders what was prepared. All layers of b are shuffled alike. Where the
    index is a product of samples x samples matrices (CKA, HSIC, RSA), shuffles are cyclic shifts of a random order, of
    which `shifted_products` gives as many as there are samples for little more than one. Shifts are a group, so the
    test is as exact as with any permutations (Hemerik & Goeman 2018, theorem 2).

    Args:
        index: The index.
        states_a: What `index.prepare` gave for each layer of a.
        states_b: Likewise of b.
        values: The index in the true order, (layers of a x layers of b).
        samples: Their number.
        shuffles: How many.
        seed: Of the shuffles.

    Raises:
        DataError: There is no shuffle.

    >>> from isthmus.metrics.cka import CKA
    >>> x, y = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0))
    >>> index = CKA()
    >>> a, b = [index.prepare(x)], [index.prepare(y)]
    >>> null = permutation_null(index, a, b, index.scores(a, b), 40, shuffles=50)
    >>> bool(null.mean[0, 0] > 0.3), bool(null.p_values[0, 0] > 0.05)  # large, and yet chance
    (True, True)
    """
    if shuffles < 1:
        raise DataError(f"shuffles is {shuffles}; a null needs at least one, 200 say")
    generator = torch.Generator().manual_seed(seed)
    total, alike = torch.zeros_like(values), torch.zeros_like(values)
    # Rounding differs from way to way; a shuffle that changes nothing must count as alike.
    slack = 1e-9 * values.abs()
    for null in _shuffled(index, states_a, states_b, samples, shuffles, generator):
        null = null.to(values.device)
        total += null.sum(0)
        alike += ((null <= values + slack) if index.distance else (null >= values - slack)).sum(0)
    p_values = ((1 + alike) / (1 + shuffles)).masked_fill(values.isnan(), math.nan)
    return Null((total / shuffles).cpu().numpy(), p_values.cpu().numpy())


def _shuffled(
    index: Index, a: Sequence[Any], b: Sequence[Any], samples: int, shuffles: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Give the index of shuffled samples, (some shuffles x len(a) x len(b)) at a time."""
    while shuffles:
        order = torch.randperm(samples, generator=generator)
        null = index.shifted(a, b, order)
        if null is None:
            null = index.scores(a, [index.taken(state, order) for state in b])[None]
        else:
            chosen = 1 + torch.randperm(samples - 1, generator=generator)[:shuffles]
            null = null[chosen.to(null.device)]
        shuffles -= len(null)
        yield null


def jackknife_interval(
    index: Index,
    states_a: Sequence[Any],
    states_b: Sequence[Any],
    values: Tensor,
    samples: int,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Give the 95 % interval of the delete-a-group jackknife (Efron & Tibshirani 1993, section 11.5).

    The samples are dealt into 20 groups at random; each is left out once. The interval is the value ± t · standard
    error with Student's t of 19 degrees of freedom. It tells how the value would vary over samples like these; it does
    not remove the bias of an estimator, for which see `permutation_null`.

    Args:
        index: The index.
        states_a: What `index.prepare` gave for each layer of a.
        states_b: Likewise of b.
        values: The index of all samples, (layers of a x layers of b).
        samples: Their number.
        seed: Of the groups.

    Returns:
        (2, layers of a, layers of b): lower and upper ends.

    Raises:
        DataError: So few samples that leaving a group out leaves too few, or fewer than two in a group.
    """
    from scipy.stats import t as student

    groups = list(_remainders(samples, seed))
    if samples < 2 * _GROUPS or min(map(len, groups)) < index.least:
        raise DataError(f"{samples} samples are too few for a jackknife of {_GROUPS} groups; it needs {2 * _GROUPS}")
    left_out = torch.stack(
        [
            index.scores([index.taken(state, rows) for state in states_a], [index.taken(s, rows) for s in states_b])
            for rows in groups
        ]
    )
    deviations = left_out - left_out.mean(0)
    error = ((_GROUPS - 1) / _GROUPS * deviations.square().sum(0)).sqrt().to(values.device)
    half = error * float(student.ppf((1 + _LEVEL) / 2, _GROUPS - 1))
    return torch.stack([values - half, values + half]).cpu().numpy()


def _remainders(samples: int, seed: int) -> Iterator[Tensor]:
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    group = torch.arange(samples) % _GROUPS
    for left_out in range(_GROUPS):
        yield order[group != left_out].sort().values
