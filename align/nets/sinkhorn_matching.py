"""Weight matching by gradients: doubly stochastic matrices in place of permutations (Peña et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...base.architecture import check_finite
from ...base.errors import DataError
from ...base.progress import progress as bar
from ..assignment import assign_each
from ..permutation import Permutation
from ..soft import one_hot, soft_take
from ..symmetry import Symmetry
from .functional import Refined, check_search, inner_product
from .problem import pairs
from .sinkhorn import sinkhorn
from .weights import weight_matching

# Of the Sinkhorn iterations inside a search: its steps are small beside what this leaves undone.
_ITERATIONS, _TOLERANCE = 100, 1e-3

# Spread of the random part of the logits at the beginning, which tells apart units that are alike.
_NOISE = 0.01


def sinkhorn_matching(
    symmetry: Symmetry,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    steps: int = 200,
    lr: float = 0.1,
    temperature: tuple[float, float] = (1.0, 0.3),
    sharpness: float = 0.5,
    start: Permutation | None = None,
    polish: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Refined:
    """Find the permutation of b that brings its parameters closest to those of a, by gradient descent.

    Every group has logits, of which the Sinkhorn operator makes a doubly stochastic matrix P (one for each position of
    the groups that it lies within). Adam descends ‖A - P(B)‖² over all of them at once, with the gradients of the
    operator's fixed point; at a permutation this is, but for a constant, minus twice the inner product <A, P(B)>. The
    logits are rounded by assignment, and weight matching ends the search in an optimum of single groups.

    Args:
        symmetry: Of both networks.
        a: Parameters of the reference network, by name.
        b: Parameters of the network to be permuted; neither is changed.
        steps: Steps of Adam.
        lr: Its learning rate, in units of the logits.
        temperature: Of the Sinkhorn operator in the first and in the last step; it changes geometrically.
        sharpness: Share of `start` in the first matrices, the rest being undecided; in (0, 1).
        start: Where to begin, and never to fall behind; None: undecided.
        polish: Descend by weight matching from what was found.
        seed: Of the noise on the first logits, and of the order of visits of weight matching.
        device: Where to compute; None: where the parameters of a are.
        progress: Show a bar; None: on a terminal.

    Returns:
        The permutation; its objective <A, p(B)>; as history the objectives of the start (if any), of the rounded
        logits and of the polished permutation; `losses` relative to (‖A‖² + ‖B‖²) / 2.

    Raises:
        DataError: A number is not positive, or out of its range.
        NotFiniteError: A parameter holds NaN or infinity.

    Reference:
        Peña, Medeiros, Dubail, Aminbeidokhti, Granger, Pedersoli. Re-basin via implicit Sinkhorn differentiation.
        CVPR 2023 (their cost C_L2). https://arxiv.org/abs/2212.12042

    >>> from isthmus import symmetry
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    >>> planted = symmetry(net, torch.ones(1, 3)).random(torch.Generator().manual_seed(0))
    >>> weights = dict(net.named_parameters())
    >>> found = sinkhorn_matching(planted.symmetry, weights, planted.apply(weights), steps=50)
    >>> found.permutation == planted.inverse()
    True
    """
    check_search(steps, lr)
    check_finite(a, "a")
    check_finite(b, "b")
    a, b = ({name: tensor.detach().to(device) for name, tensor in state.items()} for state in (a, b))
    logits = Logits(symmetry, start, a, steps, temperature, sharpness, seed)
    losses = _descend(logits, a, b, lr, bar(range(steps), "matching by Sinkhorn", show=progress))
    found = [*([] if start is None else [start]), logits.rounded()]
    if polish:
        found.append(
            weight_matching(symmetry, a, b, restarts=1, seed=seed, start=found[-1], progress=progress).permutation
        )
    objectives = [inner_product(permutation, a, b) for permutation in found]
    best = max(range(len(found)), key=objectives.__getitem__)
    return Refined(found[best], objectives[best], (tuple(objectives),), losses=tuple(losses))


def _descend(
    logits: Logits, a: Mapping[str, Tensor], b: Mapping[str, Tensor], lr: float, steps: Iterable[int]
) -> list[float]:
    within = logits.symmetry.within
    found = [(pair.piece, pair.a, pair.b) for pair in pairs(logits.symmetry, a, b)]
    if not found:
        return []
    scale = sum(float(x.double().square().sum() + y.double().square().sum()) for _, x, y in found) / 2
    descent = torch.optim.Adam(logits.tensors.values(), lr=lr)
    losses = []
    for step in steps:
        matrices = logits.matrices(step)
        apart = [(x - soft_take(y, piece, matrices, within)).square().sum() for piece, x, y in found]
        loss = torch.stack(apart).sum() / (scale or 1.0)
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(float(loss.detach()))
    return losses


class Logits:
    """What a search by gradients moves: for every group of a symmetry the scores of doubly stochastic matrices.

    Args:
        symmetry: Whose groups.
        start: The permutation that the matrices begin near; None: undecided.
        like: Tensors whose device, and whose precision if it is higher than single, the logits take.
        steps: Number of steps in which the temperature falls.
        temperature: In the first step and in the last.
        sharpness: Share of `start` in the first matrices.
        seed: Of the noise.

    Raises:
        DataError: A temperature or the sharpness is out of its range.
    """

    def __init__(
        self,
        symmetry: Symmetry,
        start: Permutation | None,
        like: Mapping[str, Tensor],
        steps: int,
        temperature: tuple[float, float],
        sharpness: float,
        seed: int,
    ) -> None:
        check_search(steps, 1.0, **{"temperature[0]": temperature[0], "temperature[1]": temperature[1]})
        if not 0 < sharpness < 1:
            raise DataError(f"sharpness is {sharpness}; expected a number between zero and one, such as 0.5")
        self.symmetry, self.steps, self.temperature = symmetry, steps, temperature
        self.tensors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        reference = next(iter(like.values()), torch.zeros(()))
        dtype = torch.promote_types(torch.float32, reference.dtype)
        for name, matrix in one_hot(start or symmetry.identity(), torch.float64).items():
            # with these logits P = sharpness · start + (1 - sharpness) / n
            peak = temperature[0] * math.log1p(sharpness * matrix.shape[-1] / (1 - sharpness)) if start else 0.0
            noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
            self.tensors[name] = (peak * matrix + _NOISE * noise).to(reference.device, dtype).requires_grad_()

    def matrices(self, step: int) -> dict[str, Tensor]:
        """Give the matrices at the temperature of a step; groups of one size are scaled together."""
        first, last = self.temperature
        temperature = first * (last / first) ** (step / max(self.steps - 1, 1))
        alike: dict[int, list[str]] = {}
        for name, tensor in self.tensors.items():
            alike.setdefault(tensor.shape[-1], []).append(name)
        found: dict[str, Tensor] = {}
        for size, names in alike.items():
            flat = [self.tensors[name].reshape(-1, size, size) for name in names]
            scaled = sinkhorn(torch.cat(flat), temperature, iterations=_ITERATIONS, tolerance=_TOLERANCE)
            for name, part in zip(names, scaled.split([len(each) for each in flat]), strict=True):
                found[name] = part.reshape(self.tensors[name].shape)
        return found

    def rounded(self) -> Permutation:
        """Give the permutation that the matrices tend to as the temperature falls.

        It is the assignment with the largest sum of logits: scaling rows and columns does not change which that is.
        """
        return Permutation(self.symmetry, {name: assign_each(tensor) for name, tensor in self.tensors.items()})
