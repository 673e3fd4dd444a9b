"""A straight path between two networks as it was measured, and the barrier on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.errors import DataError, nearest
from .intervals import Contributions, above_chord, band, barrier_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Path:
    """Loss and accuracy along the line (1 - alpha) a + alpha b between two networks, as measured.

    Attributes:
        alphas: Places on the line, from 0 to 1; float64.
        loss: Mean loss at each; NaN or infinite where the network's outputs are.
        accuracy: Mean metric at each, the first if there are several; None if none was measured.
        metric_name: What `accuracy` holds: "accuracy", or the name of the function that was passed.
        samples: How many inputs each point was measured on.
        repair: How the points between the ends were repaired: "reset", "rescale", "both" or None.
        metrics: All metrics by name.
        also: Paths between the same networks on further data, by its name.
        contributions: What each sample adds to the loss, under "loss", and to each metric; None if the data came in
            another order at each point.
    """

    alphas: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray | None
    metric_name: str | None
    samples: int
    repair: str | None
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)
    also: Mapping[str, Path] = field(default_factory=dict)
    contributions: Mapping[str, Contributions] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.accuracy is not None and self.metric_name is not None and not self.metrics:
            object.__setattr__(self, "metrics", {self.metric_name: self.accuracy})
        if not self.finite.all():
            where = ", ".join(f"{alpha:.3g}" for alpha in self.alphas[~self.finite])
            warnings.warn(
                f"the loss is NaN or infinite at alpha = {where}, and so is the barrier; do the outputs overflow?",
                UserWarning,
                stacklevel=5,
            )

    @property
    def finite(self) -> np.ndarray:
        """Where the loss is a finite number."""
        return np.isfinite(self.loss)

    @property
    def error(self) -> np.ndarray | None:
        """1 - accuracy at each point; None if no metric was measured."""
        return None if self.accuracy is None else 1 - self.accuracy

    @property
    def barrier(self) -> float:
        """Loss barrier: the maximum over alpha of L(alpha) - [(1 - alpha) L(0) + alpha L(1)] (Entezari et al. 2022)."""
        return float(above_chord(self.loss, self.alphas).max())

    @property
    def accuracy_barrier(self) -> float | None:
        """The maximum over alpha of [(1 - alpha) A(0) + alpha A(1)] - A(alpha); None if no metric was measured."""
        return None if self.accuracy is None else float(above_chord(-self.accuracy, self.alphas).max())

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

    def barrier_interval(
        self, level: float = 0.95, resamples: int = 1000, seed: int = 0, quantity: str = "loss"
    ) -> tuple[float, float]:
        """Give a confidence interval of the barrier over the choice of the data, by the bootstrap.

        Samples are drawn with replacement, the same ones at all points, and the barrier is computed anew from each
        draw. A maximum over points lies too high when it is measured on a sample, and again too high when that
        sample is resampled: percentiles of the resampled barriers double this error. The interval is the basic one,
        2B - q where q are those percentiles (Davison & Hinkley 1997, section 5.2), cut at zero, which takes it back;
        on a flat path all of it can therefore lie below the measured barrier. Where the path lies below its chord,
        it is (0, 0).

        It says how much the barrier between *these two networks* depends on which samples of the same source were
        measured. It does not cover other networks (other seeds), samples that depend on each other, or a maximum
        between two points. Fifty samples make it somewhat too narrow if few of them carry the loss. With labels per
        token whole sequences are drawn; of a loss that only tells the mean over a batch, whole batches.

        Args:
            level: Of confidence, between 0 and 1.
            resamples: How often to draw.
            seed: Of the draws.
            quantity: "loss"; "accuracy" or the name of a metric for the barrier of a quantity that is better the
                higher it is.

        Returns:
            Lower and upper end; NaN if a loss is not finite.

        Raises:
            DataError: There is one sample only, it was not measured, or an argument is not valid.
        """
        parts = self._parts(quantity)
        return barrier_interval(parts, self.alphas, level, resamples, seed, 1 if quantity == "loss" else -1)

    def band(
        self, level: float = 0.95, resamples: int = 1000, seed: int = 0, quantity: str = "loss"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Give a confidence interval of the mean at each point by itself: percentiles of the bootstrap.

        Args:
            level: Of confidence, between 0 and 1.
            resamples: How often to draw.
            seed: Of the draws.
            quantity: "loss", "accuracy", "error" or the name of a metric.

        Returns:
            Lower and upper ends, (points,) each.

        Raises:
            DataError: There is one sample only, it was not measured, or an argument is not valid.
        """
        low, high = band(self._parts(quantity), level, resamples, seed)
        return (1 - high, 1 - low) if quantity == "error" else (low, high)

    def values(self, quantity: str) -> np.ndarray:
        """Give a quantity at each point.

        Args:
            quantity: "loss", "accuracy", "error" or the name of a metric.

        Raises:
            DataError: There is no such quantity, or it was not measured.
        """
        known = {**self.metrics, "loss": self.loss}
        if self.accuracy is not None:
            known = {"error": 1 - self.accuracy, "accuracy": self.accuracy, **known}
        if quantity not in known:
            raise DataError(f"quantity {quantity!r} was not measured along this path{nearest(quantity, known)}")
        return known[quantity]

    def _parts(self, quantity: str) -> Contributions:
        self.values(quantity)
        if self.contributions is None:
            raise DataError(
                "what each sample adds is not known at all points: the data came in another order at each, or the "
                "path was put together by hand; measure it by connect, with data in a fixed order or without repair"
            )
        first = self.metric_name or ""
        name = quantity if quantity in self.contributions else first
        return self.contributions[name]

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f", {self.metric_name} barrier {self.accuracy_barrier:.4g}"
        return f"Path({len(self.alphas)} points, {self.samples} samples, barrier {self.barrier:.4g}{accuracy})"

    def plot(
        self, ax: Axes | None = None, label: str | None = None, quantity: str = "loss", band: float | None = None
    ) -> Axes:
        """Draw the path, and with broken lines what was measured on further data.

        Args:
            ax: Where to draw; a new figure by default.
            label: For the legend.
            quantity: "loss", "accuracy", "error" or the name of a metric.
            band: Level of confidence of a band to be shaded, such as 0.95; none by default.

        Returns:
            The axes.

        Raises:
            DataError: There is no such quantity, or it was not measured.
        """
        from .drawing import draw_path

        return draw_path(self, ax, label, quantity, band)

    def to_dict(self) -> dict[str, Any]:
        """Give the whole as numbers, lists and text; NaN and infinity stay what they are."""
        return {
            "alphas": self.alphas.tolist(),
            "loss": self.loss.tolist(),
            "accuracy": None if self.accuracy is None else self.accuracy.tolist(),
            "metric": self.metric_name,
            "metrics": {name: values.tolist() for name, values in self.metrics.items()},
            "barrier": self.barrier,
            "accuracy_barrier": self.accuracy_barrier,
            "samples": self.samples,
            "repair": self.repair,
            "also": {name: path.to_dict() for name, path in self.also.items()},
        }
