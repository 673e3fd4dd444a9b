"""TIES: trim the task vectors, elect a sign for each parameter, average those that agree with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ...base.architecture import State
from ...base.errors import DataError
from .vectors import Base, Read, TaskVectors, check_scale, check_share


def ties(
    states: Sequence[State],
    base: Base,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    statistics: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Merge task vectors without those entries that interfere: TIES (Yadav et al. 2023, algorithm 1).

    1. *Trim*: of each task vector as a whole, over all its tensors, the share `density` of largest magnitude is kept,
       and with it whatever is as large as the least of these; the rest is set to zero.
    2. *Elect*: the sign of a parameter is that of the sum of the trimmed vectors, sgn Σ τ̂ᵢ.
    3. *Merge*: the mean over those vectors whose entry has this sign, 0 where there is none or the sum is zero.

    The parent plus λ times that is the result. A tied tensor counts once. Running statistics are averaged.

    Args:
        states: The fine-tuned networks, of the same names and shapes, their units in the same order.
        base: Their common parent; or one for each, of which the first is what is added to.
        density: Share of each task vector that is kept, above 0 and up to 1.
        scale: λ.
        weights: One non-negative number for each network: how much it counts in the election and in the mean.
        statistics: Names of tensors to be averaged instead; by default those called running_mean or running_var.

    Returns:
        Tensors by name, of the types and on the devices of the first network, whose integers and flags they hold.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A tensor holds NaN or infinity.
        DataError: An option, the weights or the parents do not fit, or a tensor is complex.

    Reference:
        Yadav, Tam, Choshen, Raffel, Bansal. TIES-Merging: resolving interference when merging models. NeurIPS 2023.
        https://arxiv.org/abs/2306.01708

    >>> base = {"w": torch.zeros(4)}
    >>> tasks = [{"w": torch.tensor([4.0, 3.0, -2.0, 0.1])}, {"w": torch.tensor([2.0, -1.0, -6.0, 0.2])}]
    >>> ties(tasks, base, density=0.75)
    {'w': tensor([ 3.,  3., -4.,  0.])}
    """
    scale = check_ties(density, scale)
    vectors = TaskVectors.between(states, base, weights, statistics)
    return vectors.added(elected(vectors, vectors.of, density, scale))


def check_ties(density: float, scale: float | Sequence[float]) -> float:
    """Refuse options that do not fit, and give the scale.

    Raises:
        DataError: One does not.
    """
    check_share("density", density)
    if not isinstance(scale, (int, float)):
        raise DataError(f"scale is {scale!r}; ties merges before it scales, so it takes one number")
    return check_scale(scale, 1)[0]


def elected(vectors: TaskVectors, read: Read, density: float, scale: float) -> Callable[[str], Tensor]:
    """Give the function that merges the tensors of a name, which `read` gives task by task."""
    for name in vectors.names:
        if vectors.states[0][name].is_complex():
            raise DataError(f"{name} is complex and has no sign to elect; use method='task_arithmetic'")
    tasks = range(len(vectors))
    thresholds = [_threshold([read(task, name) for name in vectors.names], density) for task in tasks]

    def change(name: str) -> Tensor:
        trimmed = [_trimmed(read(task, name), thresholds[task]) for task in tasks]
        return _disjoint_mean(torch.stack(trimmed), vectors.shares) * scale

    return change


def _threshold(parts: list[Tensor], density: float) -> float:
    magnitudes = torch.cat([part.detach().abs().flatten() for part in parts]) if parts else torch.zeros(0)
    kept = max(1, round(density * len(magnitudes)))
    if kept >= len(magnitudes):
        return 0.0
    return float(magnitudes.kthvalue(len(magnitudes) - kept + 1).values)


def _trimmed(tensor: Tensor, threshold: float) -> Tensor:
    return torch.where(tensor.abs() >= threshold, tensor, torch.zeros_like(tensor))


def _disjoint_mean(stacked: Tensor, shares: Sequence[float]) -> Tensor:
    # The mean is taken relative to the shares, so that a sole agreeing entry stays exactly as it is.
    weights = torch.tensor(shares, dtype=stacked.dtype, device=stacked.device)
    weights = (weights / weights.max()).view(-1, *[1] * (stacked.ndim - 1))
    sign = (weights * stacked).sum(0).sign()
    agreeing = weights * ((stacked.sign() == sign) & (sign != 0))
    total = agreeing.sum(0)
    return torch.where(total > 0, (agreeing * stacked).sum(0) / total.where(total > 0, torch.ones_like(total)), 0.0)
