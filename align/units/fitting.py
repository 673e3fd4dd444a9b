"""From a solver for one set of samples to a prediction: cross-validation, the held-out share, the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.moments import Moments
from .between import left_out, warn_few_samples
from .prediction import Method, Prediction, PredictionPath
from .regression import Regression, RegressionMoments

Rule = Literal["best", "one_se"]


@dataclass(frozen=True, eq=False)
class Step:
    """What a solver found at one penalty, for the predictors and targets that vary.

    Attributes:
        coefficients: (predictors x targets), standardised.
        violation: (targets,), of the conditions of optimality.
        iterations: How many it took.
        left: (predictors x targets), correlation of each predictor with what is left of each target, where it is known.
    """

    coefficients: Tensor
    violation: Tensor
    iterations: int = 0
    left: Tensor | None = None


Solver = Callable[[Regression, Sequence[float]], Iterator[Step]]
"""Solves for the penalties in turn."""

_ROUNDS = 5
"""Of cross-validation, at most: more parts are pooled."""
_PATIENCE = 3
"""Penalties in a row that may predict the part left out worse than the best before."""


@dataclass(frozen=True)
class Layers:
    """The layers of a prediction, and how it is made.

    Attributes:
        predictors: Name of the layer of the predictors.
        targets: Name of the layer of the targets.
        method: What to call it.
    """

    predictors: str
    targets: str
    method: Method

    def read(self, moments: Moments | Sequence[Moments]) -> list[RegressionMoments]:
        """Read each part of the training samples, and warn where there are few of them."""
        parts = [moments] if isinstance(moments, Moments) else list(moments)
        if not parts:
            raise DataError("there are no moments to learn from; give Moments, or a sequence of them")
        found = [RegressionMoments.read(part, self.predictors, self.targets) for part in parts]
        samples = sum(part.samples for part in found)
        meaning = "R² on the training samples says little, read that on held-out samples"
        warn_few_samples(samples, len(found[0].mean_x), self.predictors, meaning, stacklevel=5)
        return found


def predicted(
    layers: Layers,
    moments: Moments | Sequence[Moments],
    held_out: Moments | None,
    solve: Solver,
    penalties: Callable[[Regression], Sequence[float]] | Sequence[float],
    *,
    choose: bool,
    rough: Solver | None = None,
    rule: Rule = "best",
    per_target: bool = False,
) -> Prediction:
    """Fit at every penalty, choose one, and say how well it predicts.

    Args:
        layers: Which ones.
        moments: Of the training samples, whole or in parts.
        held_out: Of samples to judge by.
        solve: Solves at given penalties.
        penalties: In the order in which they are solved, or a function of the problem that gives them.
        choose: Choose among them by cross-validation over the parts; else the last one is in use.
        rough: Where each penalty costs much: solves well enough to choose by, and no further than needed.
        rule: "best", or "one_se": the strongest penalty within a standard error of the best.
        per_target: Choose for each target by itself.

    Raises:
        DataError: There is nothing to cross-validate over, or an argument makes no sense.
    """
    if rule not in ("best", "one_se"):
        raise DataError(f"rule is {rule!r}; expected 'best' or 'one_se'")
    parts = layers.read(moments)
    if choose and len(parts) < 2:
        raise DataError(
            "penalty=None is chosen by cross-validation over parts of the samples, but one Moments was given; give a "
            "sequence of Moments of disjoint parts, such as unit_folds(...).train_parts, or a penalty"
        )
    unseen = None if held_out is None else RegressionMoments.read(held_out, layers.predictors, layers.targets)
    problem = Regression.pose(RegressionMoments.pooled(parts))
    values = list(penalties(problem) if callable(penalties) else penalties)
    crossed = None
    if choose:
        crossed = _left_out(parts, values, rough or solve, whole=rough is None or per_target)
        values = values[: crossed.shape[1]]
    steps = list(solve(problem, values))
    if crossed is None:
        chosen = torch.full((len(problem.kept_y),), len(values) - 1)
    else:
        chosen = _chosen(crossed[:, :, problem.kept_y], rule, per_target)
    return _assembled(layers, problem, values, steps, chosen, unseen, crossed)


def falling(penalty: float | Sequence[float]) -> list[float]:
    """Read one penalty or several, the largest first.

    Raises:
        DataError: There is none, or one is negative or not finite.
    """
    values = [float(value) for value in ([penalty] if isinstance(penalty, (int, float)) else penalty)]
    if not values or not all(0 <= value < math.inf for value in values):
        raise DataError(f"penalty is {penalty}; expected finite numbers from 0 on, or None to cross-validate it")
    return sorted(values, reverse=True)


def _left_out(parts: Sequence[RegressionMoments], penalties: Sequence[float], solve: Solver, whole: bool) -> Tensor:
    """Give R² of each part left out in turn: (parts x penalties x targets), NaN where it is not defined.

    Unless the whole path is wanted it is left where it is past its best, which spares the penalties that cost most.
    """
    count = min(len(parts), _ROUNDS)
    parts = [RegressionMoments.pooled(parts[first::count]) for first in range(count)]
    rests = [Regression.pose(RegressionMoments.pooled([*parts[:i], *parts[i + 1 :]])) for i in range(count)]
    scores: list[Tensor] = []
    best, worse = -math.inf, 0
    for steps in zip(*(solve(rest, penalties) for rest in rests), strict=True):
        judged = zip(rests, steps, parts, strict=True)
        scores.append(torch.stack([rest.spread(rest.r2(step.coefficients, part)) for rest, step, part in judged]))
        mean = float(_sane(scores[-1]).mean())
        best, worse = (mean, 0) if mean > best else (best, worse + 1)
        if worse == _PATIENCE and not whole:
            break
    return torch.stack(scores, 1)


def _sane(scores: Tensor) -> Tensor:
    # A part in which a target hardly varies says nothing, and would outweigh all others.
    return scores.nan_to_num(nan=0.0).clamp_min(-1.0)


def _chosen(scores: Tensor, rule: Rule, per_target: bool) -> Tensor:
    """Give the place of the penalty for each target, by R² of (parts x penalties x targets)."""
    scores = _sane(scores)
    count = scores.shape[2]
    scores = scores if per_target else scores.mean(2, keepdim=True)
    mean, error = scores.mean(0), scores.std(0) / math.sqrt(len(scores))
    best = mean.argmax(0)
    if rule == "one_se":
        enough = mean.gather(0, best[None]) - error.gather(0, best[None])
        best = (mean >= enough).to(torch.int8).argmax(0)  # the first, with the strongest penalty
    return best.expand(count)


def _assembled(
    layers: Layers,
    problem: Regression,
    penalties: Sequence[float],
    steps: Sequence[Step],
    chosen: Tensor,
    unseen: RegressionMoments | None,
    crossed: Tensor | None,
) -> Prediction:
    path = _path(problem, penalties, steps, unseen, crossed)
    columns = torch.arange(len(chosen), device=problem.cross.device)
    chosen = chosen.to(problem.cross.device)
    inner = torch.stack([step.coefficients for step in steps])[chosen, :, columns].T
    judged = problem.given if unseen is None else unseen
    loss = problem.error(inner, judged) / (2 * problem.scale_y.square())
    raw, intercept = problem.raw(inner)
    full = raw.new_zeros(raw.shape)
    full[problem.kept_y[:, None], problem.kept_x] = inner.T
    every = problem.spread(chosen, -1)
    at = every.clamp_min(0)[:, None]
    used = torch.tensor(penalties, dtype=torch.float64, device=chosen.device)[chosen]
    one = len(used.unique()) == 1
    return Prediction(
        layers.method,
        layers.predictors,
        layers.targets,
        None if layers.method == "one-to-one" else float(used[0]) if one else problem.spread(used),
        full.to_sparse(),
        raw,
        intercept,
        path.r2_train.gather(1, at)[:, 0],
        None if path.r2 is None else path.r2.gather(1, at)[:, 0],
        problem.spread(loss),
        (full != 0).sum(1),
        path.kkt_violation.gather(1, at)[:, 0],
        max(steps[int(place)].iterations for place in chosen.unique()),
        left_out(len(problem.given.mean_x), problem.kept_x),
        left_out(len(problem.given.mean_y), problem.kept_y),
        path,
    )


def _path(
    problem: Regression,
    penalties: Sequence[float],
    steps: Sequence[Step],
    unseen: RegressionMoments | None,
    crossed: Tensor | None,
) -> PredictionPath:
    r2 = None if crossed is None else crossed.nanmean(0)
    if unseen is not None:
        r2 = torch.stack([problem.spread(problem.r2(step.coefficients, unseen)) for step in steps])
    return PredictionPath(
        torch.tensor(penalties, dtype=torch.float64),
        _stacked(problem, (problem.r2_train(step.coefficients, step.left) for step in steps)),
        None if r2 is None else r2.T,
        torch.stack([problem.spread((step.coefficients != 0).sum(0), -1) for step in steps], 1),
        _stacked(problem, (step.violation for step in steps)),
    )


def _stacked(problem: Regression, values: Iterable[Tensor]) -> Tensor:
    return torch.stack([problem.spread(value) for value in values], 1)
