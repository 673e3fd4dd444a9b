"""How far a barrier could be chance: the bootstrap over the samples that a path was measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from ...base.errors import DataError

# So many draws are made at a time.
_DRAWS = 2**22


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each sample adds to the mean of a measure, at each point of a path.

    Attributes:
        sums: Value times weight (points × samples). With labels per token a sample is a sequence, and its value the
            mean over its tokens; of a measure that only tells the mean over a batch, a sample is a batch.
        weights: How much each sample counts (samples,): 1, its number of tokens, or the size of the batch.
    """

    sums: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.weights)

    def resampled(self, resamples: int, seed: int) -> np.ndarray:
        """Draw as many samples as there are, with replacement, the same at all points, and give the means.

        Args:
            resamples: How often.
            seed: Of the draws.

        Returns:
            Means (resamples × points); NaN where no drawn sample counts.
        """
        count = len(self)
        generator = np.random.default_rng(seed)
        at_once = max(1, _DRAWS // count)
        means = []
        for start in range(0, resamples, at_once):
            rows = min(at_once, resamples - start)
            drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
            times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(float)
            with np.errstate(invalid="ignore"):
                means.append((times @ self.sums.T) / (times @ self.weights)[:, None])
        return np.concatenate(means)


def above_chord(values: np.ndarray, alphas: np.ndarray) -> np.ndarray:
    """Give L(alpha) - [(1 - alpha) L(0) + alpha L(1)] of values (…, points).

    >>> above_chord(np.array([1.0, 5.0, 3.0]), np.array([0.0, 0.5, 1.0]))
    array([0., 3., 0.])
    """
    with np.errstate(invalid="ignore"):  # an infinite end makes the chord NaN, which is what it is
        return values - ((1 - alphas) * values[..., :1] + alphas * values[..., -1:])


def barrier_interval(
    parts: Contributions, alphas: np.ndarray, level: float, resamples: int, seed: int, sign: int = 1
) -> tuple[float, float]:
    """Give the basic bootstrap interval of a barrier: 2B - (quantiles of the resampled barriers), cut at zero.

    Args:
        parts: What each sample adds.
        alphas: Places of the points.
        level: Of confidence, between 0 and 1.
        resamples: How many, at least 2.
        seed: Of the draws.
        sign: -1 for a measure that is better the higher it is.

    Raises:
        DataError: There is one sample only, or `level` or `resamples` is not valid.
    """
    means = _checked(parts, level, resamples, seed)
    if means is None:
        return math.nan, math.nan
    found = above_chord(sign * parts.sums.sum(1) / parts.weights.sum(), alphas).max()
    again = np.nanquantile(above_chord(sign * means, alphas).max(1), ((1 + level) / 2, (1 - level) / 2))
    low, high = np.maximum(0.0, 2 * found - again)
    return float(low), float(high)


def band(parts: Contributions, level: float, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Give the percentile interval of the mean at each point by itself: two arrays (points,).

    Raises:
        DataError: There is one sample only, or `level` or `resamples` is not valid.
    """
    means = _checked(parts, level, resamples, seed)
    if means is None:
        nothing = np.full(len(parts.sums), np.nan)
        return nothing, nothing
    low, high = np.nanquantile(means, ((1 - level) / 2, (1 + level) / 2), axis=0)
    return low, high


def _checked(parts: Contributions, level: float, resamples: int, seed: int) -> np.ndarray | None:
    if not 0 < level < 1:
        raise DataError(f"level is {level!r}; expected a number between 0 and 1, such as 0.95")
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 2:
        raise DataError(f"resamples is {resamples!r}; expected a whole number of at least 2, better 1000")
    if len(parts) < 2:
        raise DataError(
            "there is one sample to draw from: a loss= or metric= that gives the mean over a batch is known batch by "
            "batch only; let it return one value for each sample, or pass several batches"
        )
    return parts.resampled(resamples, seed) if np.isfinite(parts.sums).all() else None
