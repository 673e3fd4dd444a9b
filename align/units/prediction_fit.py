"""Fit a linear prediction along a path, cross-validate it over parts of the data, choose, and score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.errors import DataError
from .between import warn_few_samples
from .prediction import Prediction, PredictionPath, sparse
from .regression import Regression, Scorer, Statistics, joined

Rule = Literal["best", "one_se"]


@dataclass(frozen=True, eq=False)
class Step:
    """One point of a path: standardised coefficients (predictors x targets), violation (targets,), iterations."""

    coefficients: Tensor
    violation: Tensor | None = None
    iterations: int = 0


@dataclass(frozen=True, eq=False)
class Method:
    """How coefficients are found.

    Attributes:
        name: For the result.
        parameter: What the path runs over.
        values: Of the parameter, the simplest model first.
        solve: Gives a step per value, in this order.
    """

    name: str
    parameter: str
    values: Sequence[float]
    solve: Callable[[Regression], Iterable[Step]]


def whole(data: Sequence[Statistics], standardise: bool, *, warn: bool = True) -> Regression:
    """Join the parts to one regression; refuse layers of constants, warn where there are few samples.

    Raises:
        DataError: No predictor or no target varies.
    """
    regression = Regression(joined(data), standardise)
    varying = {}
    for name, variance in zip(
        regression.data.names, (regression.data.variance_x, regression.data.variance_y), strict=True
    ):
        varying[name] = int((variance > 0).sum())
        if not varying[name]:
            raise DataError(
                f"none of the {len(variance)} units of layer {name!r} varies over {regression.data.count} samples: "
                "there is nothing to predict, or nothing to predict it by"
            )
    if warn:
        predictors = regression.data.names[0]
        meaning = "R² on the training data says little; read the R² of held-out data"
        warn_few_samples(regression.data.count, varying[predictors], predictors, meaning, stacklevel=4)
    return regression


def fitted(
    method: Method,
    regression: Regression,
    data: Sequence[Statistics],
    held_out: Statistics | None,
    *,
    rule: Rule | None,
    per_target: bool = False,
) -> Prediction:
    """Fit on all parts; with two or more of them, cross-validate.

    Args:
        method: How, and for which values of its parameter.
        regression: All parts joined.
        data: The parts.
        held_out: Other data to score on.
        rule: Of the choice by cross-validation; None for the last value.
        per_target: Choose for each target.
    """
    folds = _cross_validated(method, data, regression.standardise) if len(data) > 1 else None
    targets, last = regression.data.shape[1], len(method.values) - 1
    chosen = torch.full((targets,), last, device=regression.cross.device)
    if rule is not None and folds is not None:
        chosen = _choice(folds, rule, per_target)
    training = Scorer(regression.data, regression)
    other = None if held_out is None else Scorer(held_out, regression)
    coefficients, lines = torch.zeros_like(regression.cross), []
    for index, step in enumerate(method.solve(regression)):
        coefficients = torch.where(chosen == index, step.coefficients, coefficients)
        lines.append(_line(step, training, other))
    columns = {name: torch.stack([line[name] for line in lines], 1) for name in lines[0]}
    columns["r2_cross_validated"] = None if folds is None else folds.nanmean(0).T
    return _assembled(method, regression, coefficients, chosen, columns, joint=not per_target)


def _line(step: Step, training: Scorer, other: Scorer | None) -> dict[str, Tensor]:
    count = (step.coefficients != 0).sum(0)
    line = {"r2_train": training.r2(step.coefficients), "count": count}
    if other is not None:
        line["r2_held_out"] = other.r2(step.coefficients)
    if step.violation is not None:
        line |= {"kkt_violation": step.violation, "iterations": torch.full_like(count[:1], step.iterations)}
    return line


def _cross_validated(method: Method, data: Sequence[Statistics], standardise: bool) -> Tensor:
    folds = []
    for index, left_out in enumerate(data):
        training = Regression(joined([*data[:index], *data[index + 1 :]]), standardise)
        scorer = Scorer(left_out, training)
        folds.append(torch.stack([scorer.r2(step.coefficients) for step in method.solve(training)]))
    return torch.stack(folds)


def _choice(folds: Tensor, rule: Rule, per_target: bool) -> Tensor:
    # folds: parts x values x targets. Joint choices first average the targets of each part.
    targets = folds.shape[2]
    scores = folds if per_target else folds.nanmean(2, keepdim=True)
    mean = scores.nanmean(0)
    # A target that varies in no part has no score: it gets the simplest model.
    known = mean.nan_to_num(nan=-math.inf)
    best = known.max(0)
    if rule == "best":
        return best.indices.expand(targets)
    spread = scores.gather(1, best.indices.expand(len(folds), 1, -1))[:, 0]
    parts = (~spread.isnan()).sum(0)
    squares = (spread - spread.nanmean(0)).square().nansum(0)
    error = (squares / (parts - 1).clamp_min(1) / parts.clamp_min(1)).sqrt()
    # The first value, which is the simplest, among all within one standard error of the best.
    return (known >= best.values - error).to(torch.int8).argmax(0).expand(targets)


def _assembled(
    method: Method,
    regression: Regression,
    coefficients: Tensor,
    chosen: Tensor,
    columns: dict[str, Any],
    joint: bool,
) -> Prediction:
    def at(name: str) -> Tensor | None:
        values = columns.get(name)
        return None if values is None else values.gather(1, chosen[:, None])[:, 0]

    raw = regression.raw(coefficients)
    values = torch.tensor(list(method.values), dtype=torch.float64)
    iterations = columns.pop("iterations", None)
    path = PredictionPath(method.parameter, values, columns["r2_train"], columns.get("r2_held_out"),
                          columns["r2_cross_validated"], columns["count"], columns.get("kkt_violation"),
                          None if iterations is None else iterations[0])  # fmt: skip
    r2_train, count = at("r2_train"), at("count")
    assert r2_train is not None
    assert count is not None
    has_path = bool(method.parameter)
    picked = values[chosen.cpu()]
    return Prediction(
        method.name,
        regression.data.names,
        (float(picked[0]) if joint else picked) if has_path else None,
        sparse((coefficients if regression.standardise else raw).T.contiguous()),
        sparse(raw.T.contiguous()),
        regression.intercept(raw),
        regression.standardise,
        regression.data.count,
        r2_train,
        at("r2_held_out"),
        at("r2_cross_validated"),
        count,
        at("kkt_violation"),
        0 if iterations is None else int(iterations.sum()),
        _constant(regression.data.variance_x),
        _constant(regression.data.variance_y),
        path if has_path else None,
    )


def _constant(variance: Tensor) -> tuple[int, ...]:
    return tuple((variance == 0).nonzero().flatten().tolist())
