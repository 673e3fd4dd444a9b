"""Comparing matchings by what they are good for: the loss halfway between the matched networks, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from ...base.batches import Data, require_repeatable
from ...base.errors import DataError, IsthmusError, nearest
from ...base.evaluation import Evaluation, Measure
from ..permutation import Permutation
from ..symmetry import Symmetry
from .midpoint import midpoint_loss

IDENTITY = "identity"


class Matched(Protocol):
    """What a method of matching gives."""

    @property
    def permutation(self) -> Permutation:
        """Brings the second network into the order of the first."""
        ...

    @property
    def objective(self) -> float:
        """What the method maximised."""
        ...


@dataclass(frozen=True)
class Candidate:
    """One line of the table.

    Attributes:
        method: Its name; "identity" is the second network as it came.
        objective: What the method maximised; not comparable between methods. None for the identity.
        loss: Loss of the average of the first network and the permuted second; None if the method did not apply.
        accuracy: Its accuracy, or whatever the metric is; None if none was measured.
        seconds: How long the method took, without the measurement.
        margin: Loss of this candidate minus that of the winner; for the winner, minus that of the runner-up (so
            negative, or zero where both are equally good). None if it did not apply.
        same_as: An earlier candidate that had found the same permutation.
        reason: Why the method did not apply, in its own words; empty if it did.
    """

    method: str
    objective: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    seconds: float = 0.0
    margin: float | None = None
    same_as: str | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods of matching, compared by midpoint loss.

    Attributes:
        winner: Name of the method of the lowest midpoint loss.
        runner_up: The next best; None if only the winner could be measured.
        margin: By how much the midpoint loss of the runner-up is higher; None without one.
        table: All candidates, the identity first, then in the order in which they were named.
        result: What the winning method gave; None if the identity won.
        permutation: The winner's.
        samples: On how many inputs each was measured.
    """

    winner: str
    runner_up: str | None
    margin: float | None
    table: tuple[Candidate, ...]
    permutation: Permutation = field(repr=False)
    result: Any = field(repr=False)
    samples: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Give all but the permutation as numbers, lists and text."""
        facts = {"winner": self.winner, "runner_up": self.runner_up, "margin": self.margin, "samples": self.samples}
        return {**facts, "table": [asdict(line) for line in self.table]}

    def __str__(self) -> str:
        lines = [f"{'method':<24} {'loss':>10} {'accuracy':>9} {'seconds':>8}"]
        for line in self.table:
            if line.loss is None:
                lines.append(f"{line.method:<24} {'-':>10}  {line.reason}")
                continue
            accuracy = "-" if line.accuracy is None else f"{line.accuracy:.4f}"
            note = "  <- lowest" if line.method == self.winner else f"  as {line.same_as}" if line.same_as else ""
            lines.append(f"{line.method:<24} {line.loss:>10.4f} {accuracy:>9} {line.seconds:>8.2f}{note}")
        return "\n".join(lines)


def auto(
    candidates: Sequence[str],
    methods: Mapping[str, Callable[[], Matched]],
    symmetry: Symmetry,
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    loss: Measure | None = None,
    metric: Measure | None = None,
    reset: bool | None = None,
    device: torch.device | str | None = None,
) -> Comparison:
    """Run several methods of matching and keep the one whose midpoint loss on the data is lowest.

    The second network as it came, "identity", is always a candidate: no matching may be worse than none. A method that
    does not apply to these networks or data is listed with the reason. Where two losses are equal, the candidate that
    comes first wins. The winner's loss is the lowest of several on this data: measure it on other data to report it.

    Args:
        candidates: Names of methods, each once.
        methods: By name a function that runs the method on these two networks, and gives a permutation and an
            objective.
        symmetry: Of both networks.
        model_a: The reference.
        model_b: The network to be permuted. Neither is changed.
        data: Batches with labels, read once for each candidate, or twice if there are batch norms.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        metric: A second such function; by default accuracy beside the default loss, and none beside another loss.
        reset: Measure statistics of batch norm again before the loss; None: if there are any. See `midpoint_loss`.
        device: Where to measure; that of `model_a` by default.

    Returns:
        The winner, and the table of all candidates.

    Raises:
        DataError: A candidate is unknown or named twice, there is none, no method applies, or the data has no labels
            or can be read only once.
        NotFiniteError: A parameter or an input holds NaN or infinity.
    """
    _check(candidates, methods)
    require_repeatable(data, "the midpoint loss of every candidate is measured on it")
    found: dict[str, Any] = {}
    permutations: dict[str, Permutation] = {IDENTITY: symmetry.identity()}
    measured: dict[str, Evaluation] = {}

    def measure(name: str) -> str | None:
        """Give the name of an earlier candidate that is the same; there is then nothing to measure."""
        same = next((n for n in measured if permutations[n] == permutations[name]), None)
        options: dict[str, Any] = {"loss": loss, "metric": metric, "reset": reset, "device": device}
        moved = model_b if permutations[name].is_identity else permutations[name].apply(model_b)
        measured[name] = measured[same] if same else midpoint_loss(model_a, moved, data, **options)
        return same

    measure(IDENTITY)  # first: data that cannot be measured on is refused before any method runs
    table = [Candidate(IDENTITY)]
    for name in (name for name in candidates if name != IDENTITY):
        before = time.perf_counter()
        try:
            found[name] = methods[name]()
        except IsthmusError as error:
            table.append(Candidate(name, seconds=time.perf_counter() - before, reason=str(error)))
            continue
        seconds = time.perf_counter() - before
        permutations[name] = found[name].permutation
        table.append(Candidate(name, found[name].objective, seconds=seconds, same_as=measure(name)))
    if not found and any(line.reason for line in table):
        reasons = "; ".join(f"{line.method}: {line.reason}" for line in table if line.reason)
        raise DataError(f"none of the methods applies: {reasons}")
    return _compared(table, measured, permutations, found)


def _check(candidates: Sequence[str], methods: Mapping[str, Any]) -> None:
    if isinstance(candidates, str) or not candidates:
        raise DataError(f"candidates is {candidates!r}; expected a list of methods to compare")
    for name in candidates:
        if name not in methods and name != IDENTITY:
            raise DataError(f"unknown matching method {name!r}{nearest(name, methods)}")
        if list(candidates).count(name) > 1:
            raise DataError(f"the candidate {name!r} is named twice; name each method once")


def _compared(
    table: list[Candidate],
    measured: Mapping[str, Evaluation],
    permutations: Mapping[str, Permutation],
    found: Mapping[str, Any],
) -> Comparison:
    def key(name: str) -> tuple[bool, float]:
        return math.isnan(measured[name].loss), measured[name].loss

    ranked = sorted(measured, key=key)  # stable: of equals the first
    winner, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    lowest = measured[winner].loss
    margin = None if runner_up is None else measured[runner_up].loss - lowest
    lines = []
    for line in table:
        if line.method in measured:
            here = measured[line.method]
            gap = here.loss - lowest if line.method != winner else None if margin is None else -margin
            line = replace(line, loss=here.loss, accuracy=here.metric, margin=gap)
        lines.append(line)
    facts = {"permutation": permutations[winner], "result": found.get(winner), "samples": measured[winner].samples}
    return Comparison(winner, runner_up, margin, tuple(lines), **facts)
