"""DARE: drop most of each task vector at random, rescale what is left, and merge it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ...base.architecture import State
from ...base.errors import DataError, nearest
from .arithmetic import summed
from .ties import check_ties, elected
from .vectors import Base, TaskVectors, check_scale, check_share

COMBINE = ("arithmetic", "ties")


def dare(
    states: Sequence[State],
    base: Base,
    *,
    drop: float = 0.5,
    rescale: bool = True,
    combine: str = "arithmetic",
    scale: float | Sequence[float] | None = None,
    density: float = 1.0,
    weights: Sequence[float] | None = None,
    statistics: Collection[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Thin task vectors out at random before they are merged: DARE (Yu et al. 2024, section 3).

    Each entry of a task vector is dropped with probability p, independently of all others and of other networks, and
    what is left is multiplied by 1/(1-p), so that the expectation stays. Then the task vectors are added up
    (`task_arithmetic`) or merged by `ties`. Random numbers are drawn on the CPU, tensor by tensor in the order of their
    names: the same on every device.

    Args:
        states: The fine-tuned networks, of the same names and shapes, their units in the same order.
        base: Their common parent; or one for each, of which the first is what is added to.
        drop: p, from 0 up to but not including 1. Large language models bear 0.9; small networks bear less.
        rescale: Whether to multiply by 1/(1-p).
        combine: "arithmetic" or "ties".
        scale: λ; for "arithmetic" also one for each network. By default 0.4 for "arithmetic" and 1 for "ties".
        density: For "ties": share of each thinned vector that is kept.
        weights: One non-negative number for each network: see `task_arithmetic` and `ties`.
        statistics: Names of tensors to be averaged instead; by default those called running_mean or running_var.
        seed: Of what is dropped; same seed, same result.

    Returns:
        Tensors by name, of the types and on the devices of the first network, whose integers and flags they hold.

    Raises:
        ArchitectureError: A name or a shape differs.
        NotFiniteError: A tensor holds NaN or infinity.
        DataError: An option, the weights or the parents do not fit.

    Reference:
        Yu, Yu, Yu, Huang, Li. Language models are super Mario: absorbing abilities from homologous models as a free
        lunch. ICML 2024. https://arxiv.org/abs/2311.03099

    >>> dare([{"w": torch.ones(6)}], {"w": torch.zeros(6)}, drop=0.5, scale=1.0)
    {'w': tensor([0., 2., 0., 0., 0., 2.])}
    """
    check_share("drop", drop, low=True)
    if combine not in COMBINE:
        raise DataError(f"combine is {combine!r}{nearest(combine, COMBINE)}; choose 'arithmetic' or 'ties'")
    scale = (0.4 if combine == "arithmetic" else 1.0) if scale is None else scale
    scales = check_scale(scale, len(states)) if combine == "arithmetic" else [check_ties(density, scale)]
    vectors = TaskVectors.between(states, base, weights, statistics)
    masks = _masks(vectors, drop, seed)
    factor = 1 / (1 - drop) if rescale else 1.0

    def thinned(task: int, name: str) -> Tensor:
        whole = vectors.of(task, name)
        return whole * masks[task][name].to(whole.device) * factor

    if combine == "arithmetic":
        return vectors.added(summed(vectors, thinned, scales))
    return vectors.added(elected(vectors, thinned, density, scales[0]))


def _masks(vectors: TaskVectors, drop: float, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: vectors.states[0][name].shape for name in vectors.names}
    return [
        {name: torch.rand(shape, generator=generator) >= drop for name, shape in shapes.items()}
        for _ in range(len(vectors))
    ]
