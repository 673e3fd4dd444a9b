"""Weight matching: the order of units that maximises the inner product of two networks' parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.progress import progress as bar
from ..permutation import Permutation
from ..symmetry import Symmetry
from .annealing import Annealing
from .bound import upper_bound
from .propagation import propagate
from .search import Each, Problem, Search

# Families that are solved at once; each holds one layer in double precision meanwhile.
_AT_ONCE = 4


@dataclass(frozen=True)
class Found:
    """Result of one or several restarts.

    Attributes:
        permutation: The best one found.
        objective: Sum over the parameters of <A, p(B)>.
        history: For each restart the objective at its start and after every sweep.
        bound: No permutation has an objective above it; None where it was not computed.
    """

    permutation: Permutation
    objective: float
    history: tuple[tuple[float, ...], ...]
    bound: float | None = None


def weight_matching(
    symmetry: Symmetry,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    restarts: int = 2,
    max_sweeps: int = 100,
    steps: int = 20,
    seed: int = 0,
    only: Sequence[str] | None = None,
    start: Permutation | None = None,
    cost: Callable[[Permutation], float] | None = None,
    progress: bool | None = None,
) -> Found:
    """Find the permutation of b that maximises the inner product of its parameters with those of a.

    The objective is that of Ainsworth et al. (2023, eq. 1), and so is the end of every restart: coordinate descent
    (their algorithm 1), in which groups are visited in random order and each is assigned exactly (the blocks of a group
    together with the units inside them) until none improves it. What differs is where it starts:

    1. The first restart starts from what is fixed (see `propagate`): the order spreads from the inputs and outputs
       through the network. Where the networks are permuted copies, with noise or without, this is the planted order; if
       then every unit and its match are each other's best, there is nothing to escape from and no further restart.
    2. Every other one is annealed (see `Annealing`), each in another order of visits.

    With `start`, the first restart descends from there, and the second is annealed from there.

    Args:
        symmetry: Of both networks.
        a: Parameters of the reference network, by name; read where they lie.
        b: Parameters of the network to be permuted.
        restarts: Number of restarts; the best is returned.
        max_sweeps: Sweeps over all groups before a descent gives up.
        steps: Temperatures of an annealing; more are slower and often a little better.
        seed: Seed of the visiting orders.
        only: Names of the groups to match; the others stay as in `start`. None takes all.
        start: Where the first restart begins.
        cost: Of the ends of all restarts the one of lowest cost is returned, such as a loss measured on data; None: the
            one of highest objective.
        progress: Show a bar; None: on a terminal.

    Raises:
        DataError: `restarts`, `max_sweeps` or `steps` is not positive.
    """
    if min(restarts, max_sweeps, steps) < 1:
        raise DataError(f"restarts, max_sweeps and steps must be at least 1, not {restarts}, {max_sweeps} and {steps}")
    problem = Problem.between(symmetry, a, b, only)
    ends: list[tuple[float, float, Permutation]] = []
    history: list[tuple[float, ...]] = []
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _AT_ONCE)) as pool:
        for restart in bar(range(restarts), "matching weights", show=progress):
            generator = torch.Generator().manual_seed(seed + restart)
            search = Search(problem, start or symmetry.identity())
            _begin(search, restart, start is not None, steps, generator, pool.map)
            history.append(tuple(search.descend(generator, max_sweeps, pool.map)))
            objective = history[-1][-1]
            ends.append((-objective if cost is None else cost(search.permutation), objective, search.permutation))
            if start is None and _is_plain(search):
                break
    _, objective, best = min(ends, key=lambda end: end[0])
    return Found(best, objective, tuple(history), upper_bound(problem, max(line[-1] for line in history)))


def _begin(search: Search, restart: int, started: bool, steps: int, generator: torch.Generator, each: Each) -> None:
    if restart == 0:
        if not started:
            propagate(search)
        return
    near = started and restart == 1
    annealing = Annealing(search, sharpness=0.9 if near else 0.0)
    annealing.run(generator, steps, hot=0.3 if near else 1.0, cold=0.05, each=each)
    annealing.harden()


def _is_plain(search: Search) -> bool:
    """Whether every unit and its match are each other's best, in every family that was looked at."""
    return bool(search.certain) and min(search.certain.values()) == 1.0
