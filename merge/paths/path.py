"""The straight path between two networks, and the barrier on it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...base.batches import Data, batches, model_device, require_repeatable
from ...base.errors import DataError
from ...base.evaluation import Measure, Totals, choose_measures, evaluate
from ...base.interpolation import Segment, segment
from ...base.progress import progress as progress_bar
from ...base.running import on_device
from ..repairs import Prepared, choose_method, prepare

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Path:
    """Loss and accuracy along the line (1 - alpha) a + alpha b between two networks, as measured.

    Attributes:
        alphas: Places on the line, from 0 to 1; float64.
        loss: Mean loss at each; NaN or infinite where the network's outputs are.
        accuracy: Mean metric at each, or None if none was measured.
        metric_name: What `accuracy` holds: "accuracy", or the name of the function that was passed.
        samples: How many inputs each point was measured on.
        repair: How the points between the ends were repaired: "reset", "rescale" or None.
    """

    alphas: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray | None
    metric_name: str | None
    samples: int
    repair: str | None

    def __post_init__(self) -> None:
        if not self.finite.all():
            where = ", ".join(f"{alpha:.3g}" for alpha in self.alphas[~self.finite])
            warnings.warn(
                f"the loss is NaN or infinite at alpha = {where}, and so is the barrier; do the outputs overflow?",
                UserWarning,
                stacklevel=4,
            )

    @property
    def finite(self) -> np.ndarray:
        """Where the loss is a finite number."""
        return np.isfinite(self.loss)

    @property
    def barrier(self) -> float:
        """Loss barrier: the maximum over alpha of L(alpha) - [(1 - alpha) L(0) + alpha L(1)] (Entezari et al. 2022)."""
        return float(self._above_chord(self.loss).max())

    @property
    def accuracy_barrier(self) -> float | None:
        """The maximum over alpha of [(1 - alpha) A(0) + alpha A(1)] - A(alpha); None if no metric was measured."""
        return None if self.accuracy is None else float(self._above_chord(-self.accuracy).max())

    @property
    def midpoint(self) -> int:
        """Index of the alpha nearest to 0.5, which it equals if the number of points is odd."""
        return int(np.abs(self.alphas - 0.5).argmin())

    @property
    def midpoint_loss(self) -> float:
        """Loss at the midpoint."""
        return float(self.loss[self.midpoint])

    @property
    def midpoint_accuracy(self) -> float | None:
        """Accuracy at the midpoint; None if no metric was measured."""
        return None if self.accuracy is None else float(self.accuracy[self.midpoint])

    def _above_chord(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # an infinite end makes the chord NaN, which is what it is
            return values - ((1 - self.alphas) * values[0] + self.alphas * values[-1])

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f", {self.metric_name} barrier {self.accuracy_barrier:.4g}"
        return f"Path({len(self.alphas)} points, {self.samples} samples, barrier {self.barrier:.4g}{accuracy})"

    def plot(self, ax: Axes | None = None, label: str | None = None, quantity: str = "loss") -> Axes:
        """Draw the path.

        Args:
            ax: Where to draw; a new figure by default.
            label: For the legend.
            quantity: "loss" or "accuracy".

        Returns:
            The axes.

        Raises:
            DataError: There is no such quantity, or it was not measured.
        """
        values = {"loss": self.loss, "accuracy": self.accuracy}.get(quantity)
        if values is None:
            raise DataError(
                f"quantity {quantity!r} was not measured along this path; choose 'loss' or, if there is one, 'accuracy'"
            )
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        ax.plot(self.alphas, values, marker="o", markersize=3, label=label)
        ax.set_xlabel("alpha (0: first network, 1: second)")
        ax.set_ylabel(quantity if quantity == "loss" else str(self.metric_name))
        if label is not None:
            ax.legend()
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give the whole as numbers, lists and text; NaN and infinity stay what they are."""
        return {
            "alphas": self.alphas.tolist(),
            "loss": self.loss.tolist(),
            "accuracy": None if self.accuracy is None else self.accuracy.tolist(),
            "metric": self.metric_name,
            "barrier": self.barrier,
            "accuracy_barrier": self.accuracy_barrier,
            "samples": self.samples,
            "repair": self.repair,
        }


def connect(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data,
    *,
    points: int = 25,
    repair: str | None = None,
    metric: Measure | None = None,
    loss: Measure | None = None,
    repair_data: Data | None = None,
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
        repair: None, or how to repair each point: "auto", "reset" or "rescale"; see `repair`.
        metric: Function (outputs, targets) → mean over the batch; by default accuracy beside the default loss, and
            none beside another loss. Its values are in `Path.accuracy`, its name in `Path.metric_name`.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        repair_data: Batches to repair on; `data` by default.
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
    measures = choose_measures(loss, metric)
    method = None if repair is None else choose_method(model_a, repair)
    calibration = data if repair_data is None else repair_data
    if method is not None:
        require_repeatable(data, "with repair each point is measured in a pass of its own")
        require_repeatable(calibration, "each point is repaired in a pass of its own")
    line = segment(model_a, model_b, device)
    line.model.eval()
    if method is None:
        means, samples = _in_one_pass(line, data, alphas, measures, progress)
    else:
        means, samples = _point_by_point(
            line,
            (on_device(model_a, device), on_device(model_b, device)),
            data,
            calibration,
            alphas,
            measures,
            method,
            progress,
        )
    accuracy = means[:, 1] if len(measures) > 1 else None
    name = getattr(measures[1], "__name__", type(measures[1]).__name__) if len(measures) > 1 else None
    return Path(alphas, means[:, 0], accuracy, name, samples, method)


def _in_one_pass(
    line: Segment, data: Data, alphas: np.ndarray, measures: Sequence[Measure], show: bool | None
) -> tuple[np.ndarray, int]:
    totals = Totals.zeros(len(alphas), len(measures))
    with torch.no_grad():
        for batch in progress_bar(batches(data, model_device(line.model)), "path", show=show):
            for point, alpha in enumerate(alphas):
                totals.add(point, line.move(float(alpha)), batch, measures)
            totals.samples += len(batch)
    return totals.means(), totals.samples


def _point_by_point(
    line: Segment,
    parents: Sequence[nn.Module],
    data: Data,
    calibration: Data,
    alphas: np.ndarray,
    measures: Sequence[Measure],
    method: str,
    show: bool | None,
) -> tuple[np.ndarray, int]:
    prepared: Prepared | None = None
    rows, samples = [], 0
    for alpha in progress_bar(alphas.tolist(), "path", show=show):
        between = 0 < alpha < 1
        if between and prepared is None:  # only now: data without labels has failed at alpha = 0
            prepared = prepare(parents, calibration, method, show)
        model = line.move(alpha)
        if between and prepared is not None:
            prepared.apply(model, (1 - alpha, alpha))
        found = evaluate(model, data, loss=measures[0], metric=measures[1] if len(measures) > 1 else None)
        rows.append([found.loss] if found.metric is None else [found.loss, found.metric])
        samples = found.samples
    return np.array(rows), samples
