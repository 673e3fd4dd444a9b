"""LASSO of all units of one network on all units of another: ours, and what users would write instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from similarity_tasks import Meter, forget_peak
from units_tasks import task

from isthmus.metrics import Moments

Size = dict[str, Any]


def activations(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Give standardised activations of two layers that see the same features, as ReLUs of random mixtures."""
    rng = np.random.default_rng(0)
    p, q, n = size["predictors"], size["targets"], size["samples"]
    features = rng.standard_normal((n, (p + q) // 4)) * np.linspace(2, 0.2, (p + q) // 4)
    layers = [np.maximum(0, features @ rng.standard_normal((features.shape[1], units)) / 4) for units in (p, q)]
    return tuple(standard(layer + 0.1 * rng.standard_normal(layer.shape)) for layer in layers)  # pyright: ignore[reportReturnType]


def conditioned(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Give activations whose predictors have covariances of the given condition number, and sparse targets of them."""
    rng = np.random.default_rng(0)
    p, q, n = size["predictors"], size["targets"], size["samples"]
    basis = np.linalg.qr(rng.standard_normal((p, p)))[0]
    x = rng.standard_normal((n, p)) * np.geomspace(1, size["condition"] ** -0.5, p) @ basis.T
    x = standard(x)
    weights = rng.standard_normal((p, q)) * (rng.random((p, q)) < 20 / p)
    return x, standard(x @ weights + 0.5 * rng.standard_normal((n, q)))


def standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0)


def objective(x: np.ndarray, y: np.ndarray, coefficients: np.ndarray, penalty: float) -> float:
    """Sum over the targets of |y - X w|² / 2n + penalty · |w|₁."""
    error = y - x @ coefficients.T
    return float(np.square(error).sum() / (2 * len(x)) + penalty * np.abs(coefficients).sum())


def violation(x: np.ndarray, y: np.ndarray, w: np.ndarray, penalty: float) -> float:
    """Largest violation of the conditions of optimality."""
    slope = x.T @ (y - x @ w.T) / len(x)
    at_zero = np.maximum(np.abs(slope) - penalty, 0)
    return float(np.where(w.T != 0, np.abs(slope - penalty * np.sign(w.T)), at_zero).max())


TOLERANCE = 1e-5
"""What scikit-learn's default comes to on these data; the note beside each time says what was reached."""


def ours(
    x: np.ndarray, y: np.ndarray, meter: Meter, product_dtype: torch.dtype = torch.float64, **how: Any
) -> np.ndarray:
    """Run `sparse_prediction`; the moments are made inside the meter."""
    from isthmus.align import sparse_prediction

    given = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
    forget_peak()
    with meter():
        moments = Moments([("x", "x"), ("x", "y")], product_dtype=product_dtype)
        moments.update(given)
        found = sparse_prediction(moments, "x", "y", **how)
    return found.coefficients.to_dense().numpy()


def said(x: np.ndarray, y: np.ndarray, w: np.ndarray, size: Size) -> dict[str, Any]:
    note = f"KKT {violation(x, y, w, size['penalty']):.0e}, {np.count_nonzero(w) / len(w):.1f} predictors per unit"
    return {"value": objective(x, y, w, size["penalty"]), "note": note}


@task("lasso", "isthmus sparse_prediction")
def _ours(size: Size, meter: Meter) -> dict[str, Any]:
    x, y = activations(size)
    return said(x, y, ours(x, y, meter, penalty=size["penalty"], tolerance=TOLERANCE), size)


@task("lasso", "isthmus, moments in float32 products")
def _ours_float32(size: Size, meter: Meter) -> dict[str, Any]:
    x, y = activations(size)
    found = ours(x, y, meter, torch.float32, penalty=size["penalty"], tolerance=TOLERANCE)
    return said(x, y, found, size)


def theirs(x: np.ndarray, y: np.ndarray, meter: Meter, penalty: float) -> np.ndarray:
    """Run scikit-learn's `Lasso` on all targets, with its Gram matrix."""
    from sklearn.linear_model import Lasso

    forget_peak()
    with meter():
        return Lasso(penalty, precompute=True, fit_intercept=False, max_iter=10_000).fit(x, y).coef_


@task("lasso", "scikit-learn Lasso(precompute=True)")
def _gram(size: Size, meter: Meter) -> dict[str, Any]:
    x, y = activations(size)
    return said(x, y, theirs(x, y, meter, size["penalty"]), size)


@task("lasso", "numpy coordinate descent, all targets")
def _numpy(size: Size, meter: Meter) -> dict[str, Any]:
    x, y = activations(size)
    forget_peak()
    with meter():
        gram, slope = x.T @ x / len(x), x.T @ y / len(x)
        w = np.zeros_like(slope)
        while True:
            largest = 0.0
            for j in range(len(gram)):
                goal = slope[j] + gram[j, j] * w[j]
                new = np.sign(goal) * np.maximum(np.abs(goal) - size["penalty"], 0) / gram[j, j]
                change = new - w[j]
                moved = np.flatnonzero(change)
                if len(moved):
                    slope[:, moved] -= np.outer(gram[:, j], change[moved])
                    w[j] = new
                    largest = max(largest, float(np.abs(change).max()))
            if largest < 1e-4:  # scikit-learn's tolerance
                break
    return said(x, y, w.T, size)


@task("lasso", "scikit-learn Lasso, a loop over targets")
def _loop(size: Size, meter: Meter) -> dict[str, Any]:
    from sklearn.linear_model import Lasso

    x, y = activations(size)
    forget_peak()
    with meter():
        model = Lasso(size["penalty"], precompute=True, fit_intercept=False, max_iter=10_000)
        w = np.stack([model.fit(x, target).coef_ for target in y.T])
    return said(x, y, w, size)


def penalties(x: np.ndarray, y: np.ndarray, size: Size) -> np.ndarray:
    """Give a path from the penalty that leaves nothing to a thousandth of it, as scikit-learn's paths."""
    largest = np.abs(x.T @ y).max() / len(x)
    return np.geomspace(largest, largest / 1000, size["penalties"])


@task("path", "isthmus sparse_prediction")
def _our_path(size: Size, meter: Meter) -> dict[str, Any]:
    x, y = activations(size)
    path = penalties(x, y, size)
    w = ours(x, y, meter, penalty=path.tolist(), tolerance=TOLERANCE)
    return said(x, y, w, size | {"penalty": float(path[-1])})


@task("path", "scikit-learn lasso_path, a loop over targets")
def _their_path(size: Size, meter: Meter) -> dict[str, Any]:
    from sklearn.linear_model import lasso_path

    x, y = activations(size)
    path = penalties(x, y, size)
    forget_peak()
    with meter():
        w = np.stack([lasso_path(x, target, alphas=path, max_iter=10_000)[1][:, -1] for target in y.T])
    return said(x, y, w, size | {"penalty": float(path[-1])})


@task("hard", "isthmus sparse_prediction")
def _our_hard(size: Size, meter: Meter) -> dict[str, Any]:
    x, y = conditioned(size)
    return said(x, y, ours(x, y, meter, penalty=size["penalty"], tolerance=TOLERANCE), size)


@task("hard", "scikit-learn Lasso(precompute=True)")
def _their_hard(size: Size, meter: Meter) -> dict[str, Any]:
    x, y = conditioned(size)
    return said(x, y, theirs(x, y, meter, size["penalty"]), size)
