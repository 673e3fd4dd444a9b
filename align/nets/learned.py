"""Matching by the loss between the networks, through soft permutations."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from ...base.batches import Data
from ...base.errors import DataError, nearest
from ...base.evaluation import Measure
from ...base.progress import progress as bar
from ..permutation import Permutation
from ..soft import soft_apply
from ..symmetry import Symmetry
from .functional import Best, Passes, Refined, check_search, open_line
from .sinkhorn_matching import Logits
from .weights import weight_matching

Points = Literal["midpoint", "uniform"]

_RANGES: dict[str, tuple[float, float]] = {"midpoint": (0.4, 0.6), "uniform": (0.0, 1.0)}


def learned(
    symmetry: Symmetry,
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    steps: int = 300,
    lr: float = 0.1,
    temperature: tuple[float, float] = (1.0, 0.3),
    sharpness: float = 0.5,
    start: Permutation | None = None,
    points: Points = "midpoint",
    held: int = 8,
    every: int = 10,
    polish: bool = False,
    seed: int = 0,
    loss: Measure | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Refined:
    """Find the permutation of b that makes the loss between the networks low, by gradient descent on that loss.

    Every group has logits, of which the Sinkhorn operator makes a doubly stochastic matrix P (one for each position of
    the groups that it lies within). In each step a place alpha is drawn, the network (1 - alpha) a + alpha P(b) meets
    one batch, and Adam follows the gradient of its loss through the operator's fixed point to the logits. Every few
    steps these are rounded by assignment to a permutation, which is compared by the loss halfway on batches held back;
    the best one is returned, and the start is among them.

    Dropout is off, and batch norms take the statistics of the batch (see `Line`).

    Args:
        symmetry: Of both networks.
        model_a: The reference.
        model_b: The network to be permuted; neither is changed.
        data: Batches with labels, read many times.
        steps: Steps of Adam, one batch each.
        lr: Its learning rate, in units of the logits.
        temperature: Of the Sinkhorn operator in the first and in the last step; it changes geometrically.
        sharpness: Share of `start` in the first matrices, the rest being undecided; in (0, 1).
        start: Where to begin, such as what another method has found; None: the identity.
        points: Where alpha is drawn: "midpoint", from [0.4, 0.6], where the loss is highest; "uniform", from [0, 1] as
            published.
        held: Batches held back, the first ones of the data, by which permutations are compared.
        every: Steps between two comparisons.
        polish: Compare also what weight matching finds from the last permutation.
        seed: Of alpha and of the noise on the first logits.
        loss: Function (outputs, targets) → mean over the batch, differentiable; None: cross entropy.
        device: Where to compute; None: where `model_a` is.
        progress: Show a bar; None: on a terminal.

    Returns:
        The permutation; its objective <A, p(B)>; `losses` of the steps; `candidates`, the losses halfway that were
        compared, and as history their objectives.

    Raises:
        ArchitectureError: The networks do not belong to the symmetry.
        DataError: A number is not positive, the data is an iterator or has no labels, or there is no such `points`.
        NotFiniteError: A parameter, an input or the loss is NaN or infinite.

    Reference:
        Peña, Medeiros, Dubail, Aminbeidokhti, Granger, Pedersoli. Re-basin via implicit Sinkhorn differentiation.
        CVPR 2023 (their cost C_Rnd, with "uniform"). https://arxiv.org/abs/2212.12042

    >>> from isthmus import symmetry
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    >>> moved = symmetry(net, x).random(torch.Generator().manual_seed(1)).apply(net)
    >>> result = learned(symmetry(net, x), net, moved, (x, net(x).argmax(1)), steps=20)
    >>> min(result.candidates) <= result.candidates[0]
    True
    """
    check_search(steps, lr, held=held, every=every)
    if points not in _RANGES:
        raise DataError(f"there are no points {points!r} to draw{nearest(str(points), get_args(Points))}")
    line = open_line(symmetry, model_a, model_b, loss, device)
    passes = Passes(data, line.device, held)
    start = start or symmetry.identity()
    logits = Logits(symmetry, start, line.a, steps, temperature, sharpness, seed)
    best = Best(line, passes.held, start)
    if not symmetry.groups:
        return best.refined([])
    generator = torch.Generator().manual_seed(seed)
    low, high = _RANGES[points]
    descent = torch.optim.Adam(logits.tensors.values(), lr=lr)
    losses = []
    for step, batch in zip(bar(range(steps), "learning a matching", show=progress), passes, strict=False):
        alpha = low + (high - low) * float(torch.rand((), generator=generator))
        value = line.loss_at(alpha, soft_apply(symmetry, line.b, logits.matrices(step)), batch, step)
        descent.zero_grad()
        value.backward()
        descent.step()
        losses.append(float(value.detach()))
        if (step + 1) % every == 0 or step + 1 == steps:
            best.offer(logits.rounded())
    if polish:
        a, b = line.of(line.a), line.of(line.b)
        best.offer(
            weight_matching(symmetry, a, b, restarts=1, seed=seed, start=best.last, progress=progress).permutation
        )
    return best.refined(losses)
