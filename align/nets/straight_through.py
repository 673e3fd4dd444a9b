"""Matching by the loss halfway, with weights as latent variables: the straight-through estimator."""

from __future__ import annotations

import torch
from torch import nn

from ...base.batches import Data
from ...base.evaluation import Measure
from ...base.progress import progress as bar
from ..permutation import Permutation
from ..symmetry import Symmetry
from .functional import Best, Passes, Refined, check_search, open_line
from .search import Problem, Search


def straight_through(
    symmetry: Symmetry,
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    steps: int = 300,
    lr: float = 0.01,
    sweeps: int = 1,
    start: Permutation | None = None,
    held: int = 8,
    every: int = 10,
    seed: int = 0,
    loss: Measure | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Refined:
    """Find the permutation of b that makes the loss halfway low, by the straight-through estimator.

    The latent variables are a third set of weights, at first those of a. In each step b is brought as close to them as
    a sweep of weight matching from the previous permutation can; the network halfway between a and the permuted b
    meets one batch, and the gradient of its loss with respect to the permuted weights moves the latent ones instead.
    Every few steps the permutation is compared by the loss halfway on batches held back; the best one is
    returned, and the start is among them.

    Dropout is off, and batch norms take the statistics of the batch (see `Line`).

    Args:
        symmetry: Of both networks.
        model_a: The reference.
        model_b: The network to be permuted; neither is changed.
        data: Batches with labels, read many times.
        steps: Steps of Adam, one batch each.
        lr: Its learning rate, in units of the weights: far larger than in training, for weights must come out of order.
        sweeps: Sweeps of weight matching over all groups in each step.
        start: Where the first sweep begins, such as what another method has found; None: the identity.
        held: Batches held back, the first ones of the data, by which permutations are compared.
        every: Steps between two comparisons.
        seed: Of the order in which groups are visited.
        loss: Function (outputs, targets) → mean over the batch, differentiable; None: cross entropy.
        device: Where to compute; None: where `model_a` is.
        progress: Show a bar; None: on a terminal.

    Returns:
        The permutation; its objective <A, p(B)>; `losses` of the steps; `candidates`, the losses halfway that were
        compared, and as history their objectives.

    Raises:
        ArchitectureError: The networks do not belong to the symmetry.
        DataError: A number is not positive, or the data is an iterator or has no labels.
        NotFiniteError: A parameter, an input or the loss is NaN or infinite.

    Reference:
        Ainsworth, Hayase, Srinivasa. Git Re-Basin: Merging Models modulo Permutation Symmetries. ICLR 2023, §3.3.
        https://arxiv.org/abs/2209.04836

    >>> from isthmus import symmetry
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    >>> planted = symmetry(net, x).random(torch.Generator().manual_seed(1))
    >>> data = (x, net(x).argmax(1))
    >>> straight_through(planted.symmetry, net, planted.apply(net), data, steps=5).permutation == planted.inverse()
    True
    """
    check_search(steps, lr, sweeps=sweeps, held=held, every=every)
    line = open_line(symmetry, model_a, model_b, loss, device)
    passes = Passes(data, line.device, held)
    permutation = start or symmetry.identity()
    best = Best(line, passes.held, permutation)
    b = line.of(line.b)
    latent = {name: tensor.clone().requires_grad_() for name, tensor in line.of(line.a).items()}
    generator = torch.Generator().manual_seed(seed)
    descent = torch.optim.Adam(latent.values(), lr=lr)
    losses = []
    for step, batch in zip(bar(range(steps), "straight through", show=progress), passes, strict=False):
        # made anew, for a problem remembers products with the weights that have moved since
        problem = Problem.between(symmetry, {name: tensor.detach() for name, tensor in latent.items()}, b)
        permutation = _projected(problem, permutation, generator, sweeps)
        if step % every == 0:
            best.offer(permutation)
        permuted = line.permuted(permutation)
        through = {name: permuted[name] + (tensor - tensor.detach()) for name, tensor in latent.items()}
        value = line.loss_at(0.5, permuted | through, batch, step)
        descent.zero_grad()
        value.backward()
        descent.step()
        losses.append(float(value.detach()))
    best.offer(permutation)
    return best.refined(losses)


def _projected(problem: Problem, permutation: Permutation, generator: torch.Generator, sweeps: int) -> Permutation:
    """Bring the second network closer to the first than it is in a given order."""
    search = Search(problem, permutation)
    search.descend(generator, sweeps)
    return search.permutation
