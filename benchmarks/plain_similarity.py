"""CKA as it is usually written for one study: a double loop over pairs of layers, everything anew for each pair.

Written from the formulas of Kornblith et al. (2019), for numpy arrays of samples x units, in their precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating]


def linear_kernel(x: Matrix) -> Matrix:
    return x @ x.T


def rbf_kernel(x: Matrix, bandwidth: float) -> Matrix:
    """Take σ as a multiple of the median distance over all n² entries, the zero diagonal included."""
    products = x @ x.T
    squares = np.diag(products)
    distances = squares[:, None] + squares - 2 * products
    return np.exp(-distances / (2 * bandwidth**2 * np.median(distances)))


def centre_kernel(kernel: Matrix) -> Matrix:
    """Centre rows and columns: H K H."""
    means = kernel.mean(0, dtype=np.float64)
    means -= means.mean() / 2
    centred = kernel.copy()
    centred -= means[:, None].astype(kernel.dtype)
    centred -= means.astype(kernel.dtype)
    return centred


def kernel_alignment(k: Matrix, l: Matrix) -> float:  # noqa: E741
    """Kernel alignment of two kernels, centred here, as in section 3 of the paper."""
    k, l = centre_kernel(k).ravel(), centre_kernel(l).ravel()  # noqa: E741
    return float(k @ l / (np.linalg.norm(k) * np.linalg.norm(l)))


def feature_alignment(x: Matrix, y: Matrix) -> float:
    """Linear CKA through units x units products: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def notebook_loop(layers_a: Sequence[Matrix], layers_b: Sequence[Matrix], bandwidth: float | None = None) -> Matrix:
    """All pairs through kernels, linear or RBF, as in the published notebook."""

    def kernel(x: Matrix) -> Matrix:
        return linear_kernel(x) if bandwidth is None else rbf_kernel(x, bandwidth)

    return _every_pair(lambda x, y: kernel_alignment(kernel(x), kernel(y)), layers_a, layers_b)


def feature_loop(layers_a: Sequence[Matrix], layers_b: Sequence[Matrix]) -> Matrix:
    """All pairs through units x units products, as in `netrep` and many papers' code."""
    return _every_pair(feature_alignment, layers_a, layers_b)


def _every_pair(
    measure: Callable[[Matrix, Matrix], float], layers_a: Sequence[Matrix], layers_b: Sequence[Matrix]
) -> Matrix:
    return np.array([[measure(x, y) for y in layers_b] for x in layers_a])
