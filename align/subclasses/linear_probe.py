"""A linear probe: logistic regression on frozen features, scaled so that directions of tiny variance count as well."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from .labelled import as_features, as_labels, check_finite_number

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Scale = Literal["whiten", "standardise", "none"]

_ROUNDING = 1e-12  # of the largest variance: directions below are rounding
_GRADIENT = 1e-6  # largest entry at which the fit has converged


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of features: logits (x - mean) weightᵀ + bias.

    Attributes:
        weight: (classes x units), float64.
        bias: (classes,), float64.
        mean: (units,), float64, of the features that it was fitted on.
        names: (classes,) int64, the label that each row stands for, rising.
        loss: Mean cross-entropy with the penalty, on the data of the fit.
        steps: Evaluations of the loss.
        converged: Whether the largest entry of the gradient came below 1e-6.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    names: Tensor
    loss: float
    steps: int
    converged: bool

    def __repr__(self) -> str:
        return f"LinearProbe({self.weight.shape[1]} units, {len(self.names)} classes, loss {self.loss:.4f})"

    def logits(self, features: Tensor | ArrayLike) -> Tensor:
        """Score samples, (samples x classes) in float64, on the device of the features.

        Raises:
            DataError: The features have another number of units.
            NotFiniteError: They hold NaN or infinity.
        """
        x = as_features(features)
        if x.shape[1] != self.weight.shape[1]:
            raise DataError(f"features have shape {tuple(x.shape)}, the probe reads {self.weight.shape[1]} units")
        weight, bias, mean = (part.to(x.device) for part in (self.weight, self.bias, self.mean))
        return (x.to(torch.float64) - mean) @ weight.T + bias

    def predict(self, features: Tensor | ArrayLike) -> Tensor:
        """Give the label of each sample, (samples,) int64 on the CPU; errors as `logits`."""
        return self.names[self.logits(features).argmax(1).cpu()]

    def accuracy(self, features: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> float:
        """Give the share of samples whose label is predicted; errors as `logits`.

        Raises:
            DataError: There are more or fewer labels than samples.
        """
        predicted = self.predict(features)
        return float((predicted == as_labels(labels, len(predicted))).double().mean())


def linear_probe(
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    scale: Scale = "whiten",
    penalty: float = 1e-2,
    steps: int = 500,
) -> LinearProbe:
    """Fit logistic regression to features, by L-BFGS in float64 (Alain & Bengio 2017, linear probes).

    Minimises mean cross-entropy + penalty/2 · ‖W‖²_F over the scaled features; the bias is free. Inside a collapsed
    class all variance is tiny beside that between classes: unscaled, the penalty forbids weights large enough to use
    it, and without one the problem is ill-conditioned.

    Args:
        features: Samples x units; images are flattened. Where they are, the fit runs.
        labels: (samples,) whole numbers from 0; at least two different ones.
        scale: "whiten" (all directions of variance alike), "standardise" (all units alike), or "none".
        penalty: Of the squared weights, not negative.
        steps: Evaluations of the loss, at most.

    Returns:
        The probe, on the CPU; it reads features as they are, unscaled.

    Raises:
        DataError: Lengths differ, there is one label only, all samples are the same, or a choice cannot be used.
        NotFiniteError: The features hold NaN or infinity.

    Warns:
        UserWarning: The fit stopped before it had converged.

    >>> x = torch.tensor([[0.0, 5.0], [1e-3, 6.0], [2e-3, 5.0], [3e-3, 6.0]])
    >>> probe = linear_probe(x, [0, 0, 1, 1])
    >>> probe.predict(x).tolist(), probe.accuracy(x, [0, 0, 1, 1])
    ([0, 0, 1, 1], 1.0)
    """
    x = as_features(features)
    targets = as_labels(labels, len(x))
    names, rows = targets.unique(return_inverse=True)
    _check(scale, penalty, steps, names)
    if not bool((x != x[0]).any()):
        raise DataError(f"all {len(x)} samples have the same features; a probe has nothing to tell them by")
    mean = x.mean(0, dtype=torch.float64)
    centred = x.to(torch.float64) - mean
    transform = _scaling(centred, mean, scale)
    weight, bias, loss, used, gradient = _fit(centred, transform, rows.to(x.device), len(names), penalty, steps)
    if gradient > _GRADIENT:
        warnings.warn(
            f"the linear probe stopped after {used} evaluations with a gradient of {gradient:.1e}; allow more steps, "
            "or a larger penalty",
            stacklevel=2,
        )
    return LinearProbe(weight.cpu(), bias.cpu(), mean.cpu(), names, loss, used, gradient <= _GRADIENT)


def _check(scale: str, penalty: float, steps: int, names: Tensor) -> None:
    if scale not in get_args(Scale):
        raise DataError(f"scale is {scale!r}; expected one of {', '.join(get_args(Scale))}")
    check_finite_number("penalty", penalty)
    if steps < 1:
        raise DataError(f"steps is {steps}; expected at least 1")
    if len(names) < 2:
        raise DataError(f"all samples have the label {int(names[0])}; a probe needs two labels to tell apart")


def _scaling(centred: Tensor, mean: Tensor, scale: str) -> Tensor:
    """Give what multiplies the centred features: (units x directions), diagonal but for "whiten"."""
    if scale == "whiten":
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        kept = values > _ROUNDING * values[-1]
        return vectors[:, kept] / values[kept].sqrt()
    if scale == "none":
        return torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    deviation = centred.norm(dim=0) / len(centred) ** 0.5
    # Of a constant unit only rounding is left.
    known = deviation > 1e-9 * (deviation.max() + mean.abs())
    return torch.where(known, 1 / deviation.where(known, 1.0), 0.0).diag()


def _fit(
    x: Tensor, transform: Tensor, targets: Tensor, classes: int, penalty: float, steps: int
) -> tuple[Tensor, Tensor, float, int, float]:
    """Minimise; give weights of unscaled units, biases, loss, evaluations and the largest entry of the gradient.

    The scaled features are never made: the weights are scaled instead.
    """
    from scipy.optimize import minimize

    shape = (classes, transform.shape[1] + 1)  # the bias last

    def parts(flat: np.ndarray) -> tuple[Tensor, Tensor]:
        both = torch.from_numpy(flat).reshape(shape).to(x.device)
        return both[:, :-1], both[:, -1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = parts(flat)
        logits = torch.addmm(bias, x, (weight @ transform.T).T).log_softmax(1)
        value = penalty / 2 * weight.square().sum() - logits.gather(1, targets[:, None]).mean()
        residual = logits.exp_()
        residual.scatter_add_(1, targets[:, None], residual.new_full((len(x), 1), -1.0)).div_(len(x))
        gradient = torch.cat([residual.T @ x @ transform + penalty * weight, residual.sum(0)[:, None]], 1)
        return float(value), gradient.flatten().cpu().numpy()

    limits = {"maxcor": 20, "maxiter": steps, "maxfun": steps, "gtol": _GRADIENT, "ftol": 0.0}
    done = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=limits)
    weight, bias = parts(done.x)
    return weight @ transform.T, bias, float(done.fun), int(done.nfev), float(np.abs(done.jac).max())
