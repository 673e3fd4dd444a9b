"""Task arithmetic: a scaled sum of task vectors, added to the parent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ...base.architecture import State
from .vectors import Base, Read, TaskVectors, check_scale


def task_arithmetic(
    states: Sequence[State],
    base: Base,
    *,
    scale: float | Sequence[float] = 0.4,
    weights: Sequence[float] | None = None,
    statistics: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Add what several fine-tuned networks have learnt to their parent: θ₀ + Σ λᵢ (θᵢ - θ₀).

    A negative scale takes a task away. With one network, a scale between 0 and 1 lies on the line to its parent.
    Running statistics are not weights, and a variance could become negative: they are averaged.

    Args:
        states: The fine-tuned networks, of the same names and shapes, their units in the same order.
        base: Their common parent; or one for each, of which the first is what is added to.
        scale: λ, or one for each network. 0.4 is what the paper recommends where nothing can be tuned.
        weights: One non-negative number for each network, by which λ is multiplied relative to their mean.
        statistics: Names of tensors to be averaged instead; by default those called running_mean or running_var.

    Returns:
        Tensors by name, of the types and on the devices of the first network, whose integers and flags they hold.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A tensor holds NaN or infinity.
        DataError: The scales, weights or parents do not fit.

    Reference:
        Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi. Editing models with task arithmetic.
        ICLR 2023. https://arxiv.org/abs/2212.04089

    >>> base = {"w": torch.tensor([1.0, 1.0])}
    >>> tasks = [{"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 0.0])}]
    >>> task_arithmetic(tasks, base, scale=0.5)
    {'w': tensor([2.0000, 0.5000])}
    >>> task_arithmetic(tasks[:1], base, scale=-0.5)
    {'w': tensor([0., 1.])}
    """
    scales = check_scale(scale, len(states))
    vectors = TaskVectors.between(states, base, weights, statistics)
    return vectors.added(summed(vectors, vectors.of, scales))


def summed(vectors: TaskVectors, read: Read, scales: Sequence[float]) -> Callable[[str], Tensor]:
    """Give the function that adds the scaled tensors of a name, which `read` gives task by task."""

    def change(name: str) -> Tensor:
        total = torch.zeros_like(read(0, name))
        for task, (scale, factor) in enumerate(zip(scales, vectors.factors, strict=True)):
            total.add_(read(task, name), alpha=scale * factor)
        return total

    return change
