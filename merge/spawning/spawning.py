"""The barriers between children of one training, by the step at which they parted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base.errors import DataError
from ..paths import Path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"loss": "loss barrier", "error": "error barrier", "instability": "instability (error)"}


@dataclass(frozen=True, eq=False)
class Spawning:
    """What the straight paths between children of one training show.

    Attributes:
        steps: Steps k at which the trunk was forked, rising.
        total: Steps of the whole training.
        seed: Of the noise of the trunk.
        seeds: Of the noise of the children of each k.
        paths: By k the path between each of `pairs`.
    """

    steps: tuple[int, ...]
    total: int
    seed: int
    seeds: tuple[int, ...]
    paths: Mapping[int, tuple[Path, ...]]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The pairs of children, by their seeds."""
        return tuple(itertools.combinations(self.seeds, 2))

    @property
    def barriers(self) -> np.ndarray:
        """Loss barrier by step, mean over the pairs, (steps,)."""
        return self.pair_barriers.mean(1)

    @property
    def pair_barriers(self) -> np.ndarray:
        """Loss barrier of each pair, (steps, pairs)."""
        return np.array([[path.barrier for path in self.paths[step]] for step in self.steps])

    @property
    def error_barriers(self) -> np.ndarray | None:
        """Error (1 − accuracy) above the chord at its highest, mean over the pairs, (steps,); None without a metric."""
        found = self.pair_error_barriers
        return None if found is None else found.mean(1)

    @property
    def pair_error_barriers(self) -> np.ndarray | None:
        """Error barrier of each pair, (steps, pairs); None if no metric was measured."""
        rows = [[path.accuracy_barrier for path in self.paths[step]] for step in self.steps]
        return None if rows[0][0] is None else np.array(rows, dtype=float)

    @property
    def instability(self) -> np.ndarray | None:
        """Highest error on the path less the mean of its ends, mean over the pairs, (steps,); None without a metric.

        The error barrier as Frankle et al. (2020, section 2) define it, over a level chord. It is at least half of the
        difference between the ends, and equals `error_barriers` where they are alike.
        """
        found = self._pair_instability()
        return None if found is None else found.mean(1)

    def _pair_instability(self) -> np.ndarray | None:
        accuracies = [[path.accuracy for path in self.paths[step]] for step in self.steps]
        if accuracies[0][0] is None:
            return None
        curves = np.array(accuracies, dtype=float)
        return (curves[..., 0] + curves[..., -1]) / 2 - curves.min(-1)

    def stable_from(self, threshold: float = 0.02, quantity: str = "instability") -> int | None:
        """Find the step from which on the barrier stays below a threshold.

        Args:
            threshold: In the unit of the quantity; Frankle et al. call less than 2 % of error stable.
            quantity: "instability", "error" or "loss".

        Returns:
            The first of `steps` from which on all are below it; None if the last is not.

        Raises:
            DataError: There is no such quantity, or it was not measured.
        """
        below = self._values(quantity).mean(1) < threshold
        stable = [step for place, step in enumerate(self.steps) if below[place:].all()]
        return stable[0] if stable else None

    def _values(self, quantity: str) -> np.ndarray:
        if quantity not in _LABELS:
            raise DataError(f"quantity is {quantity!r}; choose from {', '.join(map(repr, _LABELS))}")
        if quantity == "loss":
            return self.pair_barriers
        found = self.pair_error_barriers if quantity == "error" else self._pair_instability()
        if found is None:
            raise DataError(f"{quantity} is of a metric, and none was measured beside this loss; pass metric= to spawn")
        return found

    def __repr__(self) -> str:
        falls = ", ".join(f"{step}: {value:.3g}" for step, value in zip(self.steps, self.barriers, strict=True))
        return f"Spawning({len(self.seeds)} children at each step; loss barrier {falls})"

    def plot(
        self, ax: Axes | None = None, quantity: str = "loss", label: str | None = None, threshold: float | None = None
    ) -> Axes:
        """Draw the barrier over the step at which the children parted: the mean as a line, each pair as a dot.

        Args:
            ax: Where to draw; a new figure by default.
            quantity: "loss", "error" or "instability".
            label: For the legend.
            threshold: Draw a level line here.

        Returns:
            The axes; steps are on a logarithmic scale with a place for 0.

        Raises:
            DataError: There is no such quantity, or it was not measured.
        """
        values = self._values(quantity)
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(layout="constrained")[1]
        (line,) = ax.plot(self.steps, values.mean(1), marker="o", markersize=4, label=label)
        if len(self.pairs) > 1:
            for column in values.T:
                ax.plot(self.steps, column, linestyle="", marker=".", markersize=5, alpha=0.5, color=line.get_color())
        if threshold is not None:
            ax.axhline(threshold, color="0.5", linewidth=1, linestyle=":")
        self._scale(ax)
        ax.set_ylabel(f"{_LABELS[quantity]} between children")
        if label is not None:
            ax.legend()
        return ax

    def _scale(self, ax: Axes) -> None:
        first = next((step for step in self.steps if step), 1)
        # 0 stands half a decade before the first step
        ax.set_xscale("symlog", linthresh=first, linscale=0.5)
        ax.set_xticks(self.steps, [f"{step:,}" for step in self.steps])
        ax.minorticks_off()
        ax.set_xlabel(f"step at which the children parted, of {self.total:,}")

    def to_dict(self) -> dict[str, Any]:
        """Give the whole as numbers, lists and text; NaN and infinity stay what they are."""
        optional = {"error_barriers": self.error_barriers, "instability": self.instability}
        return {
            "steps": list(self.steps),
            "total": self.total,
            "seed": self.seed,
            "seeds": list(self.seeds),
            "pairs": [list(pair) for pair in self.pairs],
            "barriers": self.barriers.tolist(),
            "pair_barriers": self.pair_barriers.tolist(),
            **{name: None if values is None else values.tolist() for name, values in optional.items()},
            "stable_from": None if self.instability is None else self.stable_from(),
            "paths": [[path.to_dict() for path in self.paths[step]] for step in self.steps],
        }
