"""Activation matching in rounds: what units do, what comes back to them, and whom they are connected to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...base.batches import Data, batches, require_repeatable
from ...base.errors import DataError, nearest
from ...base.evaluation import Measure
from ..permutation import Permutation
from ..symmetry import Symmetry
from ..terms import take
from .activations import Correlated, Evidence, matrices, not_in, picked, sighted
from .midpoint import can_measure, midpoint_loss
from .problem import Family, Pair, Similarities, families, front, pairs, rows, weight_similarities
from .signals import Signals, record
from .views import View, views

CHOICES = ("auto", "midpoint", "objective")


@dataclass(frozen=True)
class Iterated(Correlated):
    """Result of iterated activation matching; `objective` is the sum of all weighted terms over matched units.

    Attributes:
        objectives: Objective of the start, which was found without the weights, and after each round.
        losses: Midpoint loss of the same permutations; empty where it was not measured.
        chosen: Which of them was kept; 0 is the start.
        converged: Whether the last round changed nothing.
    """

    objectives: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    chosen: int = 0
    converged: bool = field(default=False)


def iterated_activation_matching(
    symmetry: Symmetry,
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    backward: float = 1.0,
    weights: float = 1.0,
    rounds: int = 10,
    choose: str = "auto",
    loss: Measure | None = None,
    seed: int = 0,
    product_dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
) -> Iterated:
    """Find the permutation of b by activations, gradients and weights together, in rounds over the groups.

    Two units are alike if they do the same, if the outputs react to them in the same way, and if they are connected
    to the same units. The similarity of unit i of a and unit j of b is the sum of three cosines:

    - the correlation of their activations (Li et al. 2015), averaged over the places where the group is seen;
    - `backward` times the correlation of the gradients of a random projection of the outputs with respect to these
      activations: the sensitivity of the outputs, which needs no labels;
    - `weights` times the cosine of all their weights, where b stands as it has been permuted so far (the step of
      Ainsworth et al. 2023, algorithm 1, with every unit's weights scaled to length one).

    The first two are read off one pass over the data and do not change. The start is their best assignment alone; each
    round then visits the groups from the front of the network to its end, until a round changes nothing or comes
    back to an order that was there before. Of the start and the rounds the best is kept.

    Memory does not grow with the data: two matrices of units x units for each view of a group.

    Args:
        symmetry: Of both networks.
        model_a: The reference; both run in evaluation mode, and are as before afterwards.
        model_b: The network to be permuted.
        data: Batches; read once, and once or twice for each round if the midpoint loss is measured.
        backward: Weight of the gradients; 0 runs no backward pass.
        weights: Weight of the weights; 0 leaves the start.
        rounds: At most so many.
        choose: Which permutation is kept: "midpoint", the one of lowest loss halfway between the networks on `data`
            (see `midpoint_loss`); "objective", the one of the largest sum of cosines; or "auto", the first if the
            data has labels and can be read again. The loss is then the one that was minimised: measure on other data.
        loss: For the midpoint loss: function (outputs, targets) → mean over the batch; cross entropy by default.
        seed: Of the projection of the outputs.
        product_dtype: Precision of the products of centred signals; sums are in float64.
        progress: Show a bar; None: on a terminal.

    Returns:
        The permutation. Groups in `unseen` are those whose order depends on the position of several others; all
        others are matched, by weights where nothing else is seen, and then without a score.

    Raises:
        DataError: An option is not valid, the outputs cannot be differentiated, or the midpoint loss is asked for and
            the data has no labels or can be read only once.
        NotFiniteError: An activation or a gradient holds NaN or infinity.

    >>> from isthmus import symmetry
    >>> _ = torch.manual_seed(0)
    >>> a, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(20, 4)
    >>> drawn = symmetry(a, x).random(torch.Generator().manual_seed(1))
    >>> iterated_activation_matching(drawn.symmetry, a, drawn.apply(a), x).permutation == drawn.inverse()
    True
    """
    _check(backward, weights, rounds, choose)
    measure = _measure(model_a, model_b, data, choose, loss)
    seen = views(symmetry, model_a)
    looks = [view for found in seen.values() for view in found]
    signals = record(
        *(looks, model_a, model_b, batches(data)),
        backward=backward > 0,
        outputs=symmetry.outputs,
        seed=seed,
        product_dtype=product_dtype,
        progress=progress,
    )
    parameters = (dict(model.named_parameters()) for model in (model_a, model_b))
    search = _Search(symmetry, pairs(symmetry, *parameters), seen, signals, backward, weights)
    tried, objectives, losses = [search.start()], [search.objective], [measure(search.permutation)] if measure else []
    converged = weights == 0
    while not converged and len(tried) <= rounds:
        converged = not search.sweep()
        if search.permutation in tried:  # nothing new would come of it
            break
        tried.append(search.permutation)
        objectives.append(search.objective)
        losses += [measure(search.permutation)] if measure else []
    best = _least(losses) if measure else max(range(len(tried)), key=objectives.__getitem__)
    samples = signals.forward.count(f"a:{looks[0].key}") if looks else 0
    scores = search.scores(tried[best])
    unseen = not_in(symmetry, {name for family in search.families for name in family.names})
    facts = (tuple(objectives), tuple(losses), best, converged)
    return Iterated(tried[best], objectives[best], scores, samples, unseen, *facts)


def _check(backward: float, weights: float, rounds: int, choose: str) -> None:
    for name, value in (("backward", backward), ("weights", weights)):
        if not 0 <= value < float("inf"):
            raise DataError(f"{name} is {value}; expected a finite number, not negative")
    if rounds < 0:
        raise DataError(f"rounds is {rounds}; expected a number of rounds, 0 or more")
    if choose not in CHOICES:
        raise DataError(f"choose={choose!r} is unknown{nearest(choose, CHOICES)}")


def _measure(
    model_a: nn.Module, model_b: nn.Module, data: Data, choose: str, loss: Measure | None
) -> Callable[[Permutation], float] | None:
    if choose == "objective" or (choose == "auto" and not can_measure(data, loss)):
        return None
    require_repeatable(data, "the midpoint loss is measured on it after each round")
    return lambda permutation: midpoint_loss(model_a, permutation.apply(model_b), data, loss=loss).loss


def _least(losses: Sequence[float]) -> int:
    return min(range(len(losses)), key=lambda at: (losses[at] != losses[at], losses[at]))  # NaN last


class _Search:
    """The evidence of one pass, and b as it has been permuted so far."""

    def __init__(
        self,
        symmetry: Symmetry,
        found: list[Pair],
        seen: Mapping[str, list[View]],
        signals: Signals,
        backward: float,
        weights: float,
    ) -> None:
        self.symmetry, self.pairs, self.weights = symmetry, found, weights
        self.permutation = symmetry.identity()
        first = {group: at for at, group in enumerate(dict.fromkeys(_in_order(seen)))}
        top = [family for family in families(symmetry) if not family.group.within]
        self.families = sorted(top, key=lambda family: first.get(family.group.name, len(first)))
        self.evidence = {family.group.name: _Told.gather(family, seen, signals, backward) for family in top}

    def start(self) -> Permutation:
        """Assign every group by activations and gradients; by profiles of the weights where there are none."""
        for family in self.families:
            told = self.evidence[family.group.name]
            blank = told.forward is None or set(told.forward.family.names) != set(family.names)
            ties = weight_similarities(self.pairs, family, profiles=True) if blank or told.silent else None
            total = _sum(family, (1.0, told.total), (1e-6, ties and _unit_range(ties)))
            self._commit(total.solve(family))
        return self.permutation

    def sweep(self) -> bool:
        """Visit every group once, given all others; tell whether anything changed."""
        before = self.permutation
        for family in self.families:
            self._commit(self._similarity(family).solve(family))
        return self.permutation != before

    @property
    def objective(self) -> float:
        """Sum of all terms over matched units, as b stands."""
        still = self.symmetry.identity().indices
        parts = [picked(self._similarity(f), f, {n: still[n] for n in f.names}) for f in self.families]
        return sum(float(outer.sum()) + sum(float(v.sum()) for v in inner.values()) for outer, inner in parts)

    def scores(self, permutation: Permutation) -> dict[str, Tensor]:
        """Give the correlation of the activations of matched units, for every group that was seen."""
        told = [told.forward for told in self.evidence.values() if told.forward is not None]
        return {name: score for each in told for name, score in each.scores(dict(permutation.indices)).items()}

    def _similarity(self, family: Family) -> Similarities:
        total = _ordered(self.evidence[family.group.name].total, family, self.permutation)
        return _sum(family, (1.0, total), (self.weights, weight_cosines(self.pairs, family, self.now)))

    def now(self, pair: Pair) -> Tensor:
        """The second network's piece in the order found so far."""
        return take(pair.b, pair.piece, self.permutation.indices, self.symmetry.within)

    def _commit(self, step: dict[str, Tensor]) -> None:
        change = Permutation(self.symmetry, {**self.symmetry.identity().indices, **step})
        self.permutation = change.compose(self.permutation)


def _in_order(seen: Mapping[str, list[View]]) -> list[str]:
    """Name the groups in the order in which the network comes to them: views keep that of the points."""
    places = {
        layer: at for at, layer in enumerate(dict.fromkeys(view.layer for looks in seen.values() for view in looks))
    }
    return sorted(
        (name for name, looks in seen.items() if looks),
        key=lambda name: min(places[view.layer] for view in seen[name]),
    )


@dataclass(frozen=True)
class _Told:
    """What the data tell of a family: forward evidence, and its weighted sum with what came back."""

    total: Similarities
    forward: Evidence | None
    silent: bool

    @classmethod
    def gather(cls, family: Family, seen: Mapping[str, list[View]], signals: Signals, backward: float) -> _Told:
        looks = seen[family.group.name]
        part = sighted(family, looks)
        if part is None:
            return cls(Similarities.zeros(family), None, True)
        forward = Evidence.gather(part, looks, signals.forward)
        terms: list[tuple[float, Similarities | None]] = [(1.0, _mean(forward))]
        if signals.backward is not None:
            terms.append((backward, _mean(Evidence.gather(part, looks, signals.backward))))
        return cls(_sum(family, *terms), forward, forward.silent)


def _mean(evidence: Evidence) -> Similarities:
    """Average over the views, so that groups seen often and weights count alike."""
    outer = evidence.correlation.outer / max(evidence.count[evidence.family.group.name], 1)
    inner = {name: matrix / evidence.count[name] for name, matrix in evidence.correlation.inner.items()}
    return Similarities(outer, inner)


def _sum(family: Family, *terms: tuple[float, Similarities | None]) -> Similarities:
    total = Similarities.zeros(family)
    for factor, term in terms:
        if term is not None:
            total.outer.add_(term.outer, alpha=factor)
            for name, matrix in term.inner.items():
                total.inner[name].add_(matrix, alpha=factor)
    return total


def _ordered(total: Similarities, family: Family, permutation: Permutation) -> Similarities:
    """Bring the columns, units of b, into the order in which b stands."""
    outer = permutation.indices[family.group.name]
    inner = {name: matrix[:, :, outer[:, None], permutation.indices[name]] for name, matrix in total.inner.items()}
    return Similarities(total.outer[:, outer], inner)


def _unit_range(total: Similarities) -> Similarities:
    for matrix in matrices(total):
        matrix /= matrix.abs().max().clamp_min(1e-300)
    return total


def weight_cosines(found: Sequence[Pair], family: Family, moved: Callable[[Pair], Tensor]) -> Similarities:
    """Compute the cosine of the vectors of all weights of each two units of a family.

    Args:
        found: The pieces of both networks.
        family: Whose units; those of its group without the weights that tell units inside the blocks apart.
        moved: Gives the second network's values of a pair, in the order found so far.

    Returns:
        The cosines; zero for units without weights.
    """
    total = weight_similarities(found, family, moved=moved)
    squares = [Similarities.zeros(family) for _ in range(2)]  # their diagonals
    for pair in found:
        places = [at for at, dim in enumerate(pair.piece.dims) if dim.group == family.group.name]
        values = (pair.a, moved(pair)) if places else ()
        for at in places:
            dims, inner = front(pair.piece, at, family)
            for tensor, norms in zip(values, squares, strict=True):
                norms.add(inner, rows(tensor, dims).double().square().sum(1).diag())
    for matrix, a, b in zip(matrices(total), *map(matrices, squares), strict=True):
        units = math.isqrt(matrix.numel())
        norms = [each.view(units, units).diagonal().clamp_min(1e-300).sqrt() for each in (a, b)]
        matrix.view(units, units).div_(norms[0][:, None]).div_(norms[1])
    return total
