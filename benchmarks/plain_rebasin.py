"""The published algorithms for an MLP as a user would write them: permutations by hand, dense matrices, one script.

Weight matching is algorithm 1 of Ainsworth et al. (2023), activation matching the assignment of their section 3.1.
Nothing here knows of `isthmus`; the benchmark compares both in one run.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

State = dict[str, Tensor]


def hidden_layers(state: State) -> list[str]:
    """Names of the linear layers, the last one (the logits) left out."""
    return [name.removesuffix(".weight") for name in state if name.endswith(".weight")][:-1]


def permute(state: State, orders: list[np.ndarray]) -> State:
    """Permute the rows of each hidden layer and the columns of the next."""
    layers = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    permuted = dict(state)
    for order, layer, following in zip(orders, layers, layers[1:], strict=False):
        index = torch.from_numpy(order)
        permuted[f"{layer}.weight"] = permuted[f"{layer}.weight"][index]
        permuted[f"{layer}.bias"] = permuted[f"{layer}.bias"][index]
        permuted[f"{following}.weight"] = permuted[f"{following}.weight"][:, index]
    return permuted


def weight_matching(a: State, b: State, seed: int = 0, max_iterations: int = 100) -> list[np.ndarray]:
    """Coordinate descent over the hidden layers in random order, until a sweep changes nothing."""
    rng = np.random.default_rng(seed)
    layers = [name.removesuffix(".weight") for name in a if name.endswith(".weight")]
    orders = [np.arange(a[f"{layer}.weight"].shape[0]) for layer in layers[:-1]]
    for _ in range(max_iterations):
        progress = False
        for at in rng.permutation(len(orders)):
            others = [np.arange(len(order)) if i == at else order for i, order in enumerate(orders)]
            moved = permute(b, others)
            layer, following = layers[at], layers[at + 1]
            gain = a[f"{layer}.weight"] @ moved[f"{layer}.weight"].T
            gain += torch.outer(a[f"{layer}.bias"], moved[f"{layer}.bias"])
            gain += a[f"{following}.weight"].T @ moved[f"{following}.weight"]
            matrix = gain.double().numpy()
            order = linear_sum_assignment(matrix, maximize=True)[1]
            rows = np.arange(len(order))
            progress |= matrix[rows, order].sum() > matrix[rows, orders[at]].sum() + 1e-12
            orders[at] = order
        if not progress:
            break
    return orders


def activation_matching(a: State, b: State, inputs: Tensor) -> list[np.ndarray]:
    """Collect every hidden activation of both networks, correlate, assign."""
    orders = []
    x, y = inputs.flatten(1), inputs.flatten(1)
    for layer in hidden_layers(a):
        x = torch.relu(x @ a[f"{layer}.weight"].T + a[f"{layer}.bias"])
        y = torch.relu(y @ b[f"{layer}.weight"].T + b[f"{layer}.bias"])
        p, q = ((z - z.mean(0)) / (z.std(0) + 1e-8) for z in (x, y))
        correlation = (p.T @ q / len(x)).double().numpy()
        orders.append(linear_sum_assignment(correlation, maximize=True)[1])
    return orders


def objective(a: State, b: State) -> float:
    """Inner product of all parameters."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)
