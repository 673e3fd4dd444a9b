"""Frank-Wolfe for a pair of networks, as C2M3 describes it (Crisostomi et al. 2024), as a user would write it.

All groups move at once: the gradient of the objective for each group's doubly stochastic matrix, the permutation that
is best for it, and a step on the segment between. Along the segment the objective is a polynomial of degree two, no
parameter having more than two permuted axes, so that the best step is found exactly (the authors search for it). At
the end each matrix is rounded to a permutation. Permutations are specified by hand; nothing here knows of `isthmus`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plain_specifications as plain
import torch
from plain_specifications import Orders, Specification, State
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Matrices = dict[str, Tensor]

STARTS = ("identity", "barycentre")


def frank_wolfe(
    specification: Specification,
    a: State,
    b: State,
    starts: Sequence[str] = STARTS,
    max_iterations: int = 100,
    tolerance: float = 1e-6,
) -> Orders:
    """Give the best rounded permutation from several starts."""
    compared = plain.parameters(specification)
    found = [_climb(compared, a, b, start, max_iterations, tolerance) for start in starts]
    values = [plain.objective(a, plain.permute(specification, b, orders)) for orders in found]
    return found[int(np.argmax(values))]


def _climb(compared: Specification, a: State, b: State, start: str, max_iterations: int, tolerance: float) -> Orders:
    sizes = plain.groups(compared, a)
    matrices = {
        group: torch.eye(size) if start == "identity" else torch.full((size, size), 1 / size)
        for group, size in sizes.items()
    }
    value, gradients = _value_and_gradients(compared, a, b, matrices)
    for _ in range(max_iterations):
        corners = {group: torch.eye(sizes[group])[_assign(gradients[group])] for group in sizes}
        gap = sum(float((gradients[group] * (corners[group] - matrices[group])).sum()) for group in sizes)
        if gap <= tolerance * abs(value):
            break
        at_corner, there = _value_and_gradients(compared, a, b, corners)
        step = _best_step(gap, at_corner - value - gap)
        if step == 1:
            matrices, value, gradients = corners, at_corner, there
        else:
            matrices = {group: (1 - step) * matrices[group] + step * corners[group] for group in sizes}
            value, gradients = _value_and_gradients(compared, a, b, matrices)
    return {group: _assign(matrix) for group, matrix in matrices.items()}


def _best_step(slope: float, curvature: float) -> float:
    """Maximise slope t + curvature t² over [0, 1]; the slope is positive."""
    return 1.0 if 2 * curvature >= -slope else -slope / (2 * curvature)


def _assign(matrix: Tensor) -> np.ndarray:
    return linear_sum_assignment(matrix.double().numpy(), maximize=True)[1]


def _value_and_gradients(compared: Specification, a: State, b: State, matrices: Matrices) -> tuple[float, Matrices]:
    """Give <A, P(B)> over all parameters with a group, and its derivatives by the matrices."""
    value, gradients = 0.0, {group: torch.zeros_like(matrix) for group, matrix in matrices.items()}
    for name, axes in compared.items():
        permuted = [axis for axis, group in enumerate(axes) if group is not None]
        for axis in permuted:
            moved = b[name]
            for other in permuted:
                if other != axis:
                    moved = plain.mixed(matrices[str(axes[other])], moved, other)
            gradients[str(axes[axis])] += plain.unfolded(a[name], axis) @ plain.unfolded(moved, axis).T
            if axis == permuted[0]:
                value += float((a[name] * plain.mixed(matrices[str(axes[axis])], moved, axis)).double().sum())
    return value, gradients
