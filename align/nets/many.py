"""`match_many`: bring the units of any number of networks into one order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...base.architecture import full_state
from ...base.batches import Data
from ...base.errors import ArchitectureError, DataError, nearest
from ...base.files import PathLike
from ...base.interpolation import check_same_ties
from ..permutation import Permutation
from ..storage import store, stored
from ..symmetry import Symmetry
from .frank_wolfe import State
from .preparation import check_networks, first_batch, known_symmetry, parameters_of
from .universe import Universe, check_states, frank_wolfe, inner_products, merge_many

FORMAT = "isthmus matching of many 1"
METHODS = ("frank_wolfe", "merge_many")
Target = TypeVar("Target", bound="nn.Module | Mapping[str, Tensor]")


@dataclass(frozen=True, eq=False)
class ManyMatching:
    """Which units of many networks are the same.

    Attributes:
        permutations: One for each network; all bring theirs into one common order.
        objective: Sum over all pairs of networks of the inner product of their parameters in the common order.
        pairwise: Those inner products, (n, n) in float64, with squared norms on the diagonal.
        before: The same before any permutation.
        history: A line for every stage: the objective at its start and after each sweep. In stages of Frank-Wolfe it
            is that of doubly stochastic matrices, which begin between the orders found before and the barycentre.
        method: "frank_wolfe" or "merge_many".
        seed: Of the order in which networks took turns.
        gap: Sum of the duality gaps where the best run of Frank-Wolfe ended; None for "merge_many".
        reference: The network that keeps its own order, if one does.
    """

    permutations: tuple[Permutation, ...]
    objective: float
    pairwise: Tensor
    before: Tensor
    history: tuple[tuple[float, ...], ...] = ()
    method: str = "frank_wolfe"
    seed: int = 0
    gap: float | None = None
    reference: int | None = 0

    @property
    def symmetry(self) -> Symmetry:
        """The symmetry that the permutations belong to."""
        return self.permutations[0].symmetry

    def __len__(self) -> int:
        return len(self.permutations)

    def between(self, i: int, j: int) -> Permutation:
        """Give the permutation that brings network j into the order of network i.

        Along a cycle these compose to the identity: `between(i, j).compose(between(j, k)) == between(i, k)`.
        """
        return self.permutations[i].inverse().compose(self.permutations[j])

    def apply(self, targets: Sequence[Target]) -> list[Target]:
        """Bring all networks, models or state dicts, into the common order; new ones are returned.

        Raises:
            DataError: Their number is not that of the networks that were matched.
            ArchitectureError: Names or shapes do not belong to this symmetry.
        """
        if len(targets) != len(self):
            raise DataError(f"{len(targets)} networks for a matching of {len(self)}; pass all, in the same sequence")
        return [permutation.apply(target) for permutation, target in zip(self.permutations, targets, strict=True)]

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all."""
        parts = {f"index {number}": permutation.indices for number, permutation in enumerate(self.permutations)}
        facts = {
            "objective": self.objective,
            "history": self.history,
            "method": self.method,
            "seed": self.seed,
            "gap": self.gap,
            "reference": self.reference,
        }
        products = {"inner": {"pairwise": self.pairwise, "before": self.before}}
        return store(path, FORMAT, {"symmetry": self.symmetry.to_json(), "matching": facts}, {**parts, **products})

    @classmethod
    def load(cls, path: PathLike) -> ManyMatching:
        """Read a saved matching.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
        """
        with stored(path, FORMAT) as (found, parts):
            facts = found["matching"]
            facts["history"] = tuple(tuple(line) for line in facts["history"])
            symmetry = Symmetry.from_json(found["symmetry"])
            products = parts.pop("inner")
            permutations = tuple(
                Permutation(symmetry, parts[f"index {number}"]) for number in range(len(products["pairwise"]))
            )
            return cls(permutations, **products, **facts)


def match_many(
    models: Sequence[nn.Module],
    data: Data | None = None,
    *,
    method: str = "frank_wolfe",
    symmetry: Symmetry | None = None,
    start: Sequence[Permutation] | None = None,
    reference: int | None = 0,
    restarts: int = 2,
    seed: int = 0,
    device: torch.device | str | None = None,
    example_inputs: Any = None,
    progress: bool | None = None,
    verify: bool = True,
) -> ManyMatching:
    """Find permutations that bring any number of networks into one common order.

    All pairs agree by construction: whichever way round a cycle of networks one goes, one comes back to where one was.
    What is maximised is the sum of the inner products of the parameters of all pairs. Beside the networks themselves,
    only a few more of their size are held at a time.

    Args:
        models: Two or more networks of one architecture; none is changed.
        data: Batches, of which the first serves as example for the symmetry.
        method: "frank_wolfe": doubly stochastic matrices for all groups at once (Crisostomi et al. 2024, "C²M³"), then
            MergeMany from there. "merge_many": each network in turn is matched to the mean of the others until none
            moves (Ainsworth et al. 2023).
        symmetry: Of all networks; None derives it. One that was not verified yet is, on the inputs at hand.
        start: A permutation for each network; None: see `frank_wolfe` and `merge_many`.
        reference: The network that keeps its own order; None: none need do so.
        restarts: How often Frank-Wolfe runs: first from `start`, then from halfway between the best so far and the
            barycentre. The best is kept.
        seed: Of the order in which networks take turns; same seed, same result.
        device: Where to compute; None: where the models are.
        example_inputs: For deriving and verifying the symmetry, where there is no data.
        progress: Show bars; None: on a terminal.
        verify: Refuse a symmetry of which it has not been measured that it holds; False takes it on trust.

    Raises:
        ArchitectureError: The networks differ, or `start` belongs to another symmetry.
        NotFiniteError: A parameter holds NaN or infinity.
        DataError: There are fewer than two networks; inputs are missing; the method is unknown; or the number of
            permutations, the reference or the number of restarts does not fit.
        SymmetryError: The symmetry cannot be derived, or fails when it is verified.

    >>> from isthmus import symmetry
    >>> net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> found = symmetry(net, torch.ones(1, 5))
    >>> planted = [found.random(torch.Generator().manual_seed(number)) for number in range(3)]
    >>> matching = match_many([p.apply(net) for p in planted], symmetry=found)
    >>> matching.between(1, 2) == planted[1].compose(planted[2].inverse())
    True
    """
    _check(models, method, start, reference, restarts)
    symmetry = known_symmetry(symmetry, models[0], example_inputs, first_batch(data)[0], verify)
    if start is not None and any(permutation.symmetry.groups != symmetry.groups for permutation in start):
        raise ArchitectureError("start holds permutations of another symmetry than that of the networks")
    states = [parameters_of(model, device) for model in models]
    stages = _stages(symmetry, states, method, start, restarts, seed, progress)
    best = max(stages, key=lambda stage: stage.objective)
    permutations = best.permutations if reference is None else _seen_from(best.permutations, reference)
    after, before = (inner_products(symmetry, states, p) for p in (permutations, [symmetry.identity()] * len(states)))
    history = tuple(stage.history for stage in stages)
    climbs = [stage for stage in stages if stage.gap is not None]
    gap = max(climbs, key=lambda stage: stage.objective).gap if climbs else None
    return ManyMatching(permutations, best.objective, after, before, history, method, seed, gap, reference)


def _stages(
    symmetry: Symmetry,
    states: Sequence[State],
    method: str,
    start: Sequence[Permutation] | None,
    restarts: int,
    seed: int,
    progress: bool | None,
) -> list[Universe]:
    if method == "merge_many":
        return [merge_many(symmetry, states, start=start, seed=seed, progress=progress)]
    stages: list[Universe] = []
    for number in range(restarts):
        begin = max(stages, key=lambda stage: stage.objective).permutations if stages else start
        stages.append(frank_wolfe(symmetry, states, start=begin, seed=seed + number, progress=progress))
    best = max(stages, key=lambda stage: stage.objective)
    return [*stages, merge_many(symmetry, states, start=best.permutations, seed=seed, progress=progress)]


def _seen_from(permutations: Sequence[Permutation], reference: int) -> tuple[Permutation, ...]:
    back = permutations[reference].inverse()
    return tuple(back.compose(permutation) for permutation in permutations)


def _check(
    models: Sequence[nn.Module],
    method: str,
    start: Sequence[Permutation] | None,
    reference: int | None,
    restarts: int,
) -> None:
    if method not in METHODS:
        raise DataError(f"unknown method {method!r} of matching many{nearest(method, METHODS)}")
    check_states([full_state(model) for model in models], start)
    if reference is not None and not 0 <= reference < len(models):
        raise DataError(f"reference is {reference}; expected 0 … {len(models) - 1}, or None for no reference")
    if restarts < 1:
        raise DataError(f"restarts must be at least 1, not {restarts}")
    check_networks(models, [f"network {number}" for number in range(len(models))])
    check_same_ties(models)
