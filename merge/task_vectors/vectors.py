"""Task vectors: what fine-tuning has added to a parent, and how something is added to it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.architecture import State
from ...base.errors import DataError
from ...base.interpolation import normalised, varying, weighted_mean
from ..states import accumulator, statistics_in, tied

Base = State | Sequence[State]
Read = Callable[[int, str], Tensor]


@dataclass(frozen=True)
class TaskVectors:
    """The differences between fine-tuned networks and their parents, tensor by tensor.

    Attributes:
        states: The fine-tuned networks.
        bases: The parent of each.
        names: Tensors of which there are differences, sorted; of tied ones the first.
        copies: For each further name of a tied tensor the first one.
        shares: One for each network, adding up to one.
    """

    states: Sequence[State]
    bases: Sequence[State]
    names: list[str]
    copies: dict[str, str]
    shares: list[float]

    @classmethod
    def between(
        cls,
        states: Sequence[State],
        base: Base,
        weights: Sequence[float] | None = None,
        statistics: Collection[str] | None = None,
    ) -> TaskVectors:
        """Take the differences, after the check that all fit.

        Raises:
            ArchitectureError: A name or a shape differs.
            NotFiniteError: A tensor holds NaN or infinity.
            DataError: There is no network, or the number of parents or weights does not fit.
        """
        shares = normalised(weights, len(states))
        bases = bases_of(base, len(states))
        distinct = list({id(parent): parent for parent in bases}.values())
        labels: Any = [*map(str, range(len(states))), *_labels(len(distinct))]
        everything = [*states, *distinct]
        floating = varying(everything, labels)
        names = sorted(set(floating) - statistics_in(floating, statistics))
        copies = tied(everything, names)
        return cls(states, bases, [name for name in names if name not in copies], copies, shares)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def factors(self) -> list[float]:
        """The shares, as numbers of which one is the mean: ones where all weigh the same."""
        return [share * len(self) for share in self.shares]

    def of(self, task: int, name: str) -> Tensor:
        """Give one tensor of a task vector, in float32 or better, on the device of the first network."""
        home = self.states[0][name].device
        wide = accumulator(*(state[name] for state in (*self.states, *self.bases)))
        return self.states[task][name].to(home, wide) - self.bases[task][name].to(home, wide)

    def added(self, change: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Add something to the parent of the first network.

        Args:
            change: What to add to the tensor of a name.

        Returns:
            Tensors by name, of the types of the first network. Statistics are the weighted mean of the networks';
            integers, flags and masks those of the first.
        """
        merged: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in self.names:
                place = self.states[0][name]
                added = change(name)
                merged[name] = (self.bases[0][name].to(added.device, added.dtype) + added).to(place.dtype)
            merged |= {name: merged[first].clone() for name, first in self.copies.items()}
            rest = [{name: state[name] for name in state if name not in merged} for state in self.states]
            merged |= weighted_mean(rest, self.shares)
        return {name: merged[name] for name in self.states[0]}


def task_vector(state: State, base: State) -> dict[str, Tensor]:
    """Give what fine-tuning has added to a parent: θ - θ₀ (Ilharco et al. 2023).

    Args:
        state: The fine-tuned network.
        base: Its parent.

    Returns:
        The difference of each floating-point tensor, in float32 or better.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A tensor holds NaN or infinity.

    Reference:
        Ilharco et al. Editing models with task arithmetic. ICLR 2023. https://arxiv.org/abs/2212.04089

    >>> task_vector({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.5])})
    {'w': tensor([0.0000, 1.5000])}
    """
    labels: Any = ["0", "base"]
    names = set(varying([state, base], labels))
    vectors = TaskVectors([state], [base], sorted(names), {}, [1.0])
    return {name: vectors.of(0, name) for name in state if name in names}


def bases_of(base: Base, count: int) -> list[State]:
    """Give the parent of each network: one for all, or a list of them.

    Raises:
        DataError: Their number does not fit.
    """
    if isinstance(base, Mapping):
        return [base] * count
    if len(base) not in (1, count):
        raise DataError(f"{len(base)} bases for {count} networks; pass one for all of them, or one for each")
    return list(base) * (count if len(base) == 1 else 1)


def check_scale(scale: float | Sequence[float], count: int) -> list[float]:
    """Give the scale of each task: one number for all, or one for each.

    Raises:
        DataError: Their number does not fit, or one is not finite.
    """
    scales = [scale] * count if isinstance(scale, (int, float)) else list(scale)
    if len(scales) != count:
        raise DataError(f"scale holds {len(scales)} numbers for {count} networks; pass one number, or one for each")
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in scales):
        raise DataError(f"scale is {scale}; expected finite numbers")
    return [float(value) for value in scales]


def check_share(name: str, value: float, low: bool = False) -> None:
    """Refuse a share that is not one.

    Args:
        name: Of the option.
        value: Its value.
        low: Whether 0 is allowed and 1 is not, or the other way round.

    Raises:
        DataError: It is not.
    """
    fits = isinstance(value, (int, float)) and (0 <= value < 1 if low else 0 < value <= 1)
    if not fits:
        expected = "0 ≤ {} < 1" if low else "0 < {} ≤ 1"
        raise DataError(f"{name} is {value!r}; expected a number, {expected.format(name)}")


def _labels(count: int) -> list[str]:
    return ["base"] if count == 1 else [f"base {index}" for index in range(count)]
