"""The straight path between two networks, and its midpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...base.batches import Data, require_repeatable
from ...base.errors import DataError
from ...base.evaluation import Evaluation, Measure, Totals, choose_measures, evaluate, measure_name
from ...base.interpolation import span
from ...base.running import on_device
from ..repairs import choose_method, prepare
from .intervals import Contributions
from .measuring import MEMORY, measure_points
from .path import Path
from .repaired import Repaired

Metric = Measure | Mapping[str, Measure]


def connect(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    points: int = 25,
    repair: str | None = None,
    metric: Metric | None = None,
    loss: Measure | None = None,
    repair_data: Data | None = None,
    also: Mapping[str, Data] | None = None,
    memory: int = MEMORY,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Path:
    """Measure the loss along the straight line between two networks (Goodfellow et al. 2015, Frankle et al. 2020).

    One scratch copy of `model_a` walks the line; neither network is changed. Without repair the data is read once,
    and each batch is measured at every point, so that an iterator will do and random augmentation is the same for all
    points. With repair, each point between the ends is first repaired on `repair_data`; the ends are the networks as
    given.

    Args:
        model_a: The network at alpha = 0.
        model_b: The network at alpha = 1, of the same architecture; its units in the order of `model_a`, as `match`
            leaves them.
        data: Batches with labels, to measure on.
        points: Number of equally spaced points, both ends included, at least 3; an odd number includes the midpoint.
        repair: None, or how to repair each point: "auto", "reset", "rescale" or "both"; see `repair`.
        metric: Function (outputs, targets) → mean over the batch, or one value for each sample; or several, by name.
            By default accuracy beside the default loss, and none beside another loss. The values of the first (of the
            one called "accuracy") are in `Path.accuracy`, its name in `Path.metric_name`; all are in `Path.metrics`.
        loss: Such a function; cross entropy by default.
        repair_data: Batches to repair on; `data` by default.
        also: Further data by name, such as {"train": batches}, measured in the same way; it comes in `Path.also`.
        memory: How many bytes of data, and of what is shared between points, may be held at once. The more, the faster:
            weights are computed once for all batches that are held.
        device: Where to compute; that of `model_a` by default.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        The path, with its barrier.

    Raises:
        ArchitectureError: The networks differ in a name or shape, or the repair does not fit them.
        DataError: `points` is too small, the data is empty or cannot be read again, or its labels do not fit.
        NotFiniteError: A network or an input holds NaN or infinity.

    Warns:
        UserWarning: The loss is NaN or infinite somewhere.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(a.weight, -1.0), nn.init.constant_(b.weight, 1.0)
    >>> data = [(torch.ones(4, 1), torch.ones(4, 1))]
    >>> path = connect(a, b, data, points=5, loss=nn.functional.mse_loss)
    >>> path.loss.tolist(), path.barrier
    ([4.0, 2.25, 1.0, 0.25, 0.0], 0.0)
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 3:
        raise DataError(f"points is {points!r}; expected a whole number of at least 3: both ends and one between them")
    alphas = np.linspace(0, 1, points)
    measures, names = chosen(loss, metric)
    sources = {"": data, **({} if also is None else also)}
    method = None if repair is None else choose_method(model_a, repair)
    calibration = data if repair_data is None else repair_data
    if method is not None:
        for source in sources.values():
            require_repeatable(source, "with repair each point is measured in a pass of its own")
        require_repeatable(calibration, "each point is repaired in a pass of its own")
    line = span((model_a, model_b), device)
    line.model.eval()
    rows = [(1 - alpha, alpha) for alpha in alphas.tolist()]
    if method is None:
        found = {name: [measure_points(line, rows, each, measures, memory, progress)] for name, each in sources.items()}
    else:
        parents = on_device(model_a, device), on_device(model_b, device)
        found = Repaired(line, parents, method, progress, memory).measure(rows, sources, repair_data, measures)
    others = {name: _path(alphas, totals, names, method) for name, totals in found.items() if name != ""}
    return _path(alphas, found[""], names, method, others)


def midpoint(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    alpha: float = 0.5,
    repair: str | None = None,
    metric: Measure | None = None,
    loss: Measure | None = None,
    repair_data: Data | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Measure the network halfway between two, and nothing else.

    Args:
        model_a: A network.
        model_b: Another of the same architecture, its units in the order of `model_a`.
        data: Batches with labels, to measure on.
        alpha: The place, if not halfway; strictly between 0 and 1.
        repair: None, or how to repair the point: "auto", "reset", "rescale" or "both"; see `repair`.
        metric: Function (outputs, targets); accuracy beside the default loss.
        loss: Such a function; cross entropy by default.
        repair_data: Batches to repair on; `data` by default.
        device: Where to compute; that of `model_a` by default.
        progress: Show a bar always (True), never (False), or on a terminal (None).

    Returns:
        Loss, metric and number of inputs.

    Raises:
        ArchitectureError: The networks differ in a name or shape, or the repair does not fit them.
        DataError: `alpha` is not between the networks, the data is empty or cannot be read again, or labels do not fit.
        NotFiniteError: A network or an input holds NaN or infinity.

    >>> a, b = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = a.weight.copy_(torch.tensor([[3.0], [1.0]])), b.weight.copy_(torch.tensor([[1.0], [1.0]]))
    >>> round(midpoint(a, b, (torch.ones(1, 1), torch.tensor([0]))).loss, 4)  # logits 2 and 1
    0.3133
    """
    if not 0 < alpha < 1:
        raise DataError(f"alpha is {alpha!r}; expected a number between 0 and 1, where the two networks are")
    method = None if repair is None else choose_method(model_a, repair)
    calibration = data if repair_data is None else repair_data
    if method is not None:
        require_repeatable(calibration, "the midpoint is repaired in a pass of its own")
    middle = span((model_a, model_b), device).move((1 - alpha, alpha))
    if method is not None:
        parents = on_device(model_a, device), on_device(model_b, device)
        prepare(parents, calibration, method, progress).apply(middle, (1 - alpha, alpha))
    return evaluate(middle, data, loss=loss, metric=metric)


def chosen(loss: Measure | None, metric: Metric | None) -> tuple[list[Measure], list[str]]:
    """Give the loss and the metrics, and the names of the metrics.

    Raises:
        DataError: A metric is called as something else is.
    """
    if not isinstance(metric, Mapping):
        measures = choose_measures(loss, metric)
        return measures, [measure_name(measure) for measure in measures[1:]]
    taken = [name for name in metric if name in ("loss", "error")]
    if taken:
        raise DataError(f"a metric is called {taken[0]!r}, which is taken; give it another name")
    names = sorted(metric, key=lambda name: name != "accuracy")
    return [choose_measures(loss, None)[0], *(metric[name] for name in names)], names


def _path(
    alphas: np.ndarray,
    totals: Sequence[Totals],
    names: Sequence[str],
    method: str | None,
    also: Mapping[str, Path] | None = None,
) -> Path:
    means = np.concatenate([each.means() for each in totals])
    metrics = {name: means[:, 1 + index] for index, name in enumerate(names)}
    first = names[0] if names else None
    given: dict[str, Any] = {
        "metrics": metrics,
        "also": also or {},
        "contributions": _contributions(totals, ["loss", *names]),
    }
    accuracy = None if first is None else metrics[first]
    return Path(alphas, means[:, 0], accuracy, first, totals[0].samples, method, **given)


def _contributions(totals: Sequence[Totals], names: Sequence[str]) -> dict[str, Contributions] | None:
    if any(each.order != totals[0].order for each in totals):
        return None
    parts = {name: [each.of(index) for each in totals] for index, name in enumerate(names)}
    return {
        name: Contributions(np.concatenate([sums for sums, _ in found]), found[0][1]) for name, found in parts.items()
    }
