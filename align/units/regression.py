"""Linear regression of one layer on another, posed and judged by moments alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.moments import Moments


@dataclass(frozen=True, eq=False)
class RegressionMoments:
    """Moments of p predictors and q targets over n samples, all in float64.

    Attributes:
        samples: n.
        mean_x: (p,).
        mean_y: (q,).
        inside: (p x p), covariance of the predictors.
        across: (p x q), covariance of predictors with targets.
        variance: (q,), of the targets.
    """

    samples: int
    mean_x: Tensor
    mean_y: Tensor
    inside: Tensor
    across: Tensor
    variance: Tensor

    @classmethod
    def read(cls, moments: Moments, predictors: str, targets: str) -> RegressionMoments:
        """Read two layers off moments.

        Raises:
            DataError: The layers are one and the same: a unit would predict itself.
            LayerNotFoundError: A layer is missing, or the pair (predictors, predictors) or (predictors, targets).
        """
        if predictors == targets:
            raise DataError(
                f"predictors and targets are both {predictors!r}: each unit would predict itself; name two layers"
            )
        return cls(
            moments.count(targets),
            moments.mean(predictors),
            moments.mean(targets),
            moments.covariance(predictors, predictors),
            moments.covariance(predictors, targets),
            moments.variance(targets),
        )

    @classmethod
    def pooled(cls, parts: Sequence[RegressionMoments]) -> RegressionMoments:
        """Pool disjoint parts of the samples."""
        first = parts[0]
        for index, part in enumerate(parts):
            if part.across.shape != first.across.shape:
                raise DataError(
                    f"part 0 has {tuple(first.across.shape)} predictors and targets, part {index} "
                    f"{tuple(part.across.shape)}; give moments of the same layers"
                )
        samples = sum(part.samples for part in parts)
        # Relative to the first part, so that what is constant over all parts has exactly no variance.
        shift_x, shift_y = (
            sum((getattr(part, name) - getattr(first, name)) * (part.samples / samples) for part in parts)
            for name in ("mean_x", "mean_y")
        )
        inside, across = torch.zeros_like(first.inside), torch.zeros_like(first.across)
        variance = torch.zeros_like(first.variance)
        for part in parts:
            share = part.samples / samples
            x, y = part.mean_x - first.mean_x - shift_x, part.mean_y - first.mean_y - shift_y
            inside += share * (part.inside + torch.outer(x, x))
            across += share * (part.across + torch.outer(x, y))
            variance += share * (part.variance + y.square())
        return cls(samples, first.mean_x + shift_x, first.mean_y + shift_y, inside, across, variance)


@dataclass(frozen=True, eq=False)
class Regression:
    """A regression of standardised units, those left out that do not vary.

    min over W of ½ tr(WᵀGW) - tr(CᵀW) + a penalty, with G and C the correlations of the predictors with each other and
    with the targets; a column of W for each target.

    Attributes:
        given: The moments that it was posed by.
        kept_x: Places of the predictors that vary.
        kept_y: Places of the targets that vary.
        scale_x: (kept,), their standard deviations.
        scale_y: (kept,), their standard deviations.
        gram: G.
        cross: C.
    """

    given: RegressionMoments
    kept_x: Tensor
    kept_y: Tensor
    scale_x: Tensor
    scale_y: Tensor
    gram: Tensor
    cross: Tensor

    @classmethod
    def pose(cls, given: RegressionMoments) -> Regression:
        """Standardise.

        Raises:
            DataError: No predictor or no target varies.
        """
        scales = given.inside.diagonal().sqrt(), given.variance.sqrt()
        kept_x, kept_y = ((scale > 0).nonzero().flatten() for scale in scales)
        for what, places, scale in zip(("predictors", "targets"), (kept_x, kept_y), scales, strict=True):
            if not len(places):
                raise DataError(f"none of the {len(scale)} {what} varies over the samples: there is nothing to predict")
        x, y = scales[0][kept_x], scales[1][kept_y]
        gram = given.inside[kept_x][:, kept_x] / x[:, None] / x
        gram.fill_diagonal_(1.0)
        cross = given.across[kept_x][:, kept_y] / x[:, None] / y
        return cls(given, kept_x, kept_y, x, y, gram, cross)

    def raw(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Turn standardised coefficients (kept x kept) into raw ones, (targets x predictors), and intercepts."""
        full = self.given.across.new_zeros(self.given.across.shape)
        full[self.kept_x[:, None], self.kept_y] = coefficients / self.scale_x[:, None] * self.scale_y
        weights = full.T
        return weights, self.given.mean_y - weights @ self.given.mean_x

    def error(self, coefficients: Tensor, on: RegressionMoments) -> Tensor:
        """Give the mean squared error of each kept target on other samples, from their moments.

        E|y - b - Bx|² = var(y) - 2 B cov(x, y) + B cov(x) Bᵀ + (mean(y) - b - B mean(x))².

        Args:
            coefficients: Standardised, (kept x kept).
            on: Moments of the same layers.

        Returns:
            (kept,), in the squared units of the target.
        """
        weights = coefficients / self.scale_x[:, None] * self.scale_y
        x, y = self.kept_x, self.kept_y
        offset = (on.mean_y - self.given.mean_y)[y] - (on.mean_x - self.given.mean_x)[x] @ weights
        spread = (weights * (on.inside[x][:, x] @ weights - 2 * on.across[x][:, y])).sum(0)
        return (on.variance[y] + spread).clamp_min(0) + offset.square()

    def r2_train(self, coefficients: Tensor, left: Tensor | None = None) -> Tensor:
        """Give 1 - error / variance on the samples that it was posed by, (kept,).

        Args:
            coefficients: Standardised, (kept x kept).
            left: C - GW, where the solver has it.
        """
        left = self.cross - self.gram @ coefficients if left is None else left
        return (coefficients * (self.cross + left)).sum(0)

    def r2(self, coefficients: Tensor, on: RegressionMoments) -> Tensor:
        """Give 1 - error / variance on other samples; NaN for targets that do not vary there."""
        return 1 - self.error(coefficients, on) / on.variance[self.kept_y].masked_fill(
            on.variance[self.kept_y] == 0, torch.nan
        )

    def spread(self, values: Tensor, fill: float = torch.nan) -> Tensor:
        """Give values of kept targets, in the last axis, their places among all targets."""
        full = torch.full((*values.shape[:-1], len(self.given.mean_y)), fill, dtype=values.dtype, device=values.device)
        full[..., self.kept_y] = values
        return full
