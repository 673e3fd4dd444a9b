"""Frank-Wolfe over the doubly stochastic matrices of all groups at once, for two networks (C²M³, with one held).

The orders of a group's units are the corners of the doubly stochastic matrices, on which the inner product of the
networks' parameters is a polynomial. Each step goes towards the corner to which its gradient points, one assignment per
group, as far as an exact search along the way says. Begun at the barycentre, where every unit is matched to all alike,
it needs no first guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.progress import progress as bar
from ..assignment import assign_each
from ..permutation import Permutation
from ..soft import soft_take
from ..symmetry import Symmetry
from ..terms import Piece, pieces, take
from .problem import rows

State = Mapping[str, Tensor]
Part = tuple[str, Piece]


@dataclass(frozen=True)
class Relaxed:
    """What Frank-Wolfe finds for two networks.

    Attributes:
        permutation: The best of all permutations met on the way, the start and the rounded end included.
        objective: Sum over the parameters of <A, p(B)>.
        history: One line: the objective of the doubly stochastic matrices at the start and after every step.
        gap: Duality gap at the end, max over D of <∇F(X), D - X>: 0 where no corner is uphill. It certifies a
            stationary point, not the best permutation.
    """

    permutation: Permutation
    objective: float
    history: tuple[tuple[float, ...], ...]
    gap: float


@dataclass(frozen=True)
class Mixture:
    """A doubly stochastic matrix per group, as a convex combination of the barycentre and permutations.

    What k steps of Frank-Wolfe reach is held by k orders, which take far less room than dense matrices.

    Attributes:
        symmetry: What the permutations belong to.
        barycentre: Weight of the matrix whose entries are all 1 / size.
        corners: Weights and indices of the permutations; all weights add up to 1.

    >>> from isthmus import symmetry
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> found = symmetry(net, torch.ones(1, 2))
    >>> Mixture(found).towards(found.identity().indices, 0.5).matrices()["0"].tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """

    symmetry: Symmetry
    barycentre: float = 1.0
    corners: tuple[tuple[float, Mapping[str, Tensor]], ...] = field(default=())

    def towards(self, corner: Mapping[str, Tensor], size: float) -> Mixture:
        """Go a part of the way to a permutation; 1 arrives there."""
        if size == 1:
            return Mixture(self.symmetry, 0.0, ((1.0, corner),))
        kept = tuple((weight * (1 - size), indices) for weight, indices in self.corners)
        return Mixture(self.symmetry, self.barycentre * (1 - size), (*kept, (size, corner)))

    def matrices(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Write out the matrices: per group (*sizes of the groups it lies within, size, size)."""
        found = {}
        for group in self.symmetry.groups:
            shape = (*(self.symmetry.by_name[name].size for name in group.within), group.size, group.size)
            matrix = torch.full(shape, self.barycentre / group.size, dtype=dtype, device=device)
            for weight, indices in self.corners:
                index = indices[group.name].to(matrix.device)[..., None]
                matrix.scatter_add_(-1, index, torch.full_like(index, weight, dtype=dtype))
            found[group.name] = matrix
        return found

    def rounded(self) -> Permutation:
        """Give the permutation with the largest overlap with the matrices (Kuhn 1955), group by group."""
        return Permutation(self.symmetry, {name: assign_each(matrix) for name, matrix in self.matrices().items()})


@dataclass(frozen=True)
class Slope:
    """The objective seen from a point: the corner that the gradient points to, and the way there."""

    value: float
    gap: float
    corner: Mapping[str, Tensor]
    at_corner: float
    polynomial: np.ndarray  # of the part of the way that is gone; lowest power first

    @property
    def size(self) -> float:
        """How far to go for the largest value on the way."""
        turns = np.roots(np.polynomial.polynomial.polyder(self.polynomial)[::-1]).real
        sizes = np.array([0.0, 1.0, *(turn for turn in turns if 0 < turn < 1)])
        return float(sizes[np.polynomial.polynomial.polyval(sizes, self.polynomial).argmax()])

    def is_flat(self, tolerance: float) -> bool:
        """Whether there is nothing to gain to first order but a small part of the value."""
        return self.gap <= tolerance * abs(self.value)


@dataclass(frozen=True)
class View:
    """The parts of a network in the order of its matrices, still tied to them for differentiation."""

    matrices: dict[str, Tensor]
    mixed: list[Tensor]


class Ascent:
    """One network on its way up F(X) = Σ <R, X(B)> + Σ <L, X> over the doubly stochastic matrices X of its groups.

    Attributes:
        parts: Parameters' names and the pieces of them that are B.
        state: Where their values are read.
        mixture: X.
        dtype: Of matrices and products.
        linear: L of some groups.
        degree: Of F along a line.
    """

    def __init__(
        self, symmetry: Symmetry, parts: Sequence[Part], state: State, mixture: Mixture, dtype: torch.dtype
    ) -> None:
        self.within = symmetry.within
        self.parts = parts
        self.state = state
        self.mixture = mixture
        self.linear: dict[str, Tensor] = {}
        self.degree = max((len(piece.groups) for _, piece in parts), default=1)
        self.dtype = dtype

    def values(self, at: int) -> Tensor:
        """Give a part of the network in its own order."""
        name, piece = self.parts[at]
        return piece.get(self.state[name].detach()).to(self.dtype)

    def matrices(self, mixture: Mixture) -> dict[str, Tensor]:
        """Write a mixture out, where the network is."""
        device = next((tensor.device for tensor in self.state.values()), None)
        return mixture.matrices(self.dtype, device)

    def mixed(self, matrices: Mapping[str, Tensor]) -> list[Tensor]:
        """Give the parts in the order of matrices."""
        return [soft_take(self.values(at), piece, matrices, self.within) for at, (_, piece) in enumerate(self.parts)]

    def ordered(self, indices: Mapping[str, Tensor]) -> list[Tensor]:
        """Give the parts in the order of a permutation."""
        return [take(self.values(at), piece, indices, self.within) for at, (_, piece) in enumerate(self.parts)]

    def look(self) -> View:
        """Bring the parts into the order of the present matrices."""
        matrices = {name: matrix.requires_grad_() for name, matrix in self.matrices(self.mixture).items()}
        return View(matrices, self.mixed(matrices))

    def slope(self, view: View, reference: Sequence[Tensor]) -> Slope:
        """Differentiate at the present matrices, and measure the way to the best corner."""
        gradients = self._gradients(view, reference)
        corner = {name: assign_each(gradient) for name, gradient in gradients.items()}
        gap = sum(
            picked(gradient, corner[name]) - dot([gradient], [view.matrices[name]])
            for name, gradient in gradients.items()
        )
        value = dot(reference, view.mixed) + self._linear(view.matrices)
        at_corner = dot(reference, self.ordered(corner))
        at_corner += sum(picked(matrix, corner[name]) for name, matrix in self.linear.items())
        points = {at: self._value(corner, at, reference) for at in np.linspace(0, 1, self.degree)[1:-1].tolist()}
        return Slope(value, max(gap, 0.0), corner, at_corner, _fitted(value, gap, {**points, 1.0: at_corner}))

    def _gradients(self, view: View, reference: Sequence[Tensor]) -> dict[str, Tensor]:
        leaves = list(view.matrices.values())
        found = (
            torch.autograd.grad(view.mixed, leaves, list(reference), allow_unused=True, materialize_grads=True)
            if view.mixed
            else [torch.zeros_like(leaf) for leaf in leaves]
        )
        gradients = dict(zip(view.matrices, found, strict=True))
        return gradients | {name: gradients[name] + matrix for name, matrix in self.linear.items()}

    def _value(self, corner: Mapping[str, Tensor], size: float, reference: Sequence[Tensor]) -> float:
        matrices = self.matrices(self.mixture.towards(corner, size))
        return dot(reference, self.mixed(matrices)) + self._linear(matrices)

    def _linear(self, matrices: Mapping[str, Tensor]) -> float:
        return dot(self.linear.values(), (matrices[name] for name in self.linear))


def frank_wolfe_matching(
    symmetry: Symmetry,
    a: State,
    b: State,
    *,
    start: Permutation | None = None,
    mixing: float = 0.5,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    progress: bool | None = None,
) -> Relaxed:
    """Find a permutation of b that makes the inner product of its parameters with those of a large, by Frank-Wolfe.

    F(X) = Σ <A, X(B)> over the doubly stochastic matrices X of all groups (for two networks, equation 5 of Crisostomi
    et al. 2024, "C²M³", with the first held). Every step solves one assignment per group and goes to the largest value
    on the way to that corner, which is exact: F is a polynomial there. The best of all corners met is returned.

    Args:
        symmetry: Of both networks.
        a: Parameters of the reference network, by name.
        b: Parameters of the network to be permuted.
        start: Where to begin; None: at the barycentre, which needs no guess. The result is never worse than it.
        mixing: How far the start is drawn to the barycentre: 0 begins at `start` itself, which is left only if a
            step of all groups together improves it; 1 forgets it.
        max_steps: Steps before it gives up.
        tolerance: Stop at a duality gap below this part of the objective.
        progress: Show a bar; None: on a terminal.

    Raises:
        DataError: A number is out of its range.

    >>> from isthmus import symmetry
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> state = {name: parameter.detach() for name, parameter in net.named_parameters()}
    >>> found = symmetry(net, torch.ones(1, 3))
    >>> planted = found.random(torch.Generator().manual_seed(0))
    >>> frank_wolfe_matching(found, state, planted.apply(state)).permutation == planted.inverse()
    True
    """
    check_settings(mixing, max_steps, tolerance)
    dtype = precision(a, b)
    cut = parts(symmetry, a)
    alone = [part for part in cut if _stands_alone(symmetry, part[1])]
    joined = [part for part in cut if not _stands_alone(symmetry, part[1])]
    network = Ascent(symmetry, joined, b, begin(symmetry, start, mixing), dtype)
    network.linear = _products(alone, a, b, dtype)
    reference = [piece.get(a[name].detach()).to(dtype) for name, piece in joined]
    history, best, gap = _climb(network, reference, max_steps, tolerance, progress)
    candidates = [best, network.mixture.rounded(), *([] if start is None else [start])]
    objectives = [_objective(symmetry, cut, a, b, candidate) for candidate in candidates]
    chosen = int(np.argmax(objectives))
    return Relaxed(candidates[chosen], objectives[chosen], (tuple(history),), gap)


def _climb(
    network: Ascent, reference: Sequence[Tensor], max_steps: int, tolerance: float, progress: bool | None
) -> tuple[list[float], Permutation, float]:
    """Step until the gap closes; gives the values on the way, the best corner, and the gap."""
    history: list[float] = []
    before, gap, highest = network.mixture, 0.0, -np.inf
    best = network.mixture.symmetry.identity()
    for step in bar(range(max_steps + 1), "Frank-Wolfe", show=progress):
        slope = network.slope(network.look(), reference)
        if history and slope.value <= history[-1]:  # no further than rounding errors
            network.mixture = before
            break
        history.append(slope.value)
        gap = slope.gap
        if slope.at_corner > highest:
            highest, best = slope.at_corner, Permutation(best.symmetry, slope.corner)
        if slope.is_flat(tolerance) or step == max_steps:
            break
        before, network.mixture = network.mixture, network.mixture.towards(slope.corner, slope.size)
    return history, best, gap


def _stands_alone(symmetry: Symmetry, piece: Piece) -> bool:
    groups = piece.groups
    return len(groups) == 1 and not symmetry.within[groups[0]]


def _products(alone: Sequence[Part], a: State, b: State, dtype: torch.dtype) -> dict[str, Tensor]:
    """Sum the products of parts with a single group: no step needs more of them."""
    sums: dict[str, Tensor] = {}
    for name, piece in alone:
        (group,) = piece.groups
        at = next(at for at, dim in enumerate(piece.dims) if dim.group == group)
        x, y = (rows(piece.get(state[name].detach()).to(dtype), [at]) for state in (a, b))
        sums[group] = sums[group] + x @ y.T if group in sums else x @ y.T
    return sums


def _objective(symmetry: Symmetry, cut: Sequence[Part], a: State, b: State, permutation: Permutation) -> float:
    value = 0.0
    for name, piece in cut:
        x, y = (piece.get(state[name].detach()) for state in (a, b))
        value += dot([x], [take(y, piece, permutation.indices, symmetry.within)])
    return value


def check_settings(mixing: float, max_steps: int, tolerance: float) -> None:
    """Refuse numbers out of their ranges.

    Raises:
        DataError: With the numbers.
    """
    if not 0 <= mixing <= 1:
        raise DataError(f"mixing is {mixing}; expected 0 (begin at the start) to 1 (begin at the barycentre)")
    if max_steps < 1 or not tolerance >= 0:
        raise DataError(f"max_steps must be at least 1 and tolerance at least 0, not {max_steps} and {tolerance}")


def begin(symmetry: Symmetry, start: Permutation | None, mixing: float) -> Mixture:
    """Give the point between a permutation and the barycentre at which an ascent begins; None: the barycentre."""
    centre = Mixture(symmetry)
    return centre if start is None or mixing == 1 else centre.towards(start.indices, 1 - mixing)


def precision(*states: State) -> torch.dtype:
    """Choose the type of products: float32, or double if a network is."""
    return reduce(torch.promote_types, (tensor.dtype for state in states for tensor in state.values()), torch.float32)


def parts(symmetry: Symmetry, names: Iterable[str]) -> list[Part]:
    """Cut parameters into pieces, and keep those with a group."""
    return [(name, piece) for name in names for piece in pieces(symmetry.layout[name]) if piece.groups]


def dot(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> float:
    """Sum the inner products of tensors, in float64."""
    found = (
        torch.dot(x.detach().flatten().double(), y.detach().flatten().double()) for x, y in zip(xs, ys, strict=True)
    )
    return sum(map(float, found))


def picked(matrix: Tensor, order: Tensor) -> float:
    """Sum the entries of matrices (…, n, n) at the places of an order (…, n), in float64."""
    return float(matrix.gather(-1, order.to(matrix.device)[..., None]).sum(dtype=torch.float64))


def _fitted(value: float, slope: float, points: Mapping[float, float]) -> np.ndarray:
    """Fit the polynomial with a value and a slope at 0 that passes through points, lowest power first."""
    at = np.array(list(points))
    rest = (np.array(list(points.values())) - value - slope * at) / at**2
    return np.array([value, slope, *np.linalg.solve(np.vander(at, increasing=True), rest)])
