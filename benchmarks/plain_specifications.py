"""Permutations written by hand, as a user of the published algorithms writes them: a name for each axis of each tensor.

`None` stands for an axis that keeps its order. Coordinate descent over such a specification is algorithm 1 of Ainsworth
et al. (2023). Nothing here knows of `isthmus`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

State = dict[str, Tensor]
Specification = dict[str, tuple[str | None, ...]]
Orders = dict[str, np.ndarray]

_STATISTICS = ("running_mean", "running_var")


def chain(state: State) -> Specification:
    """Layers one after another, as in an MLP or a VGG network: each one's outputs are the next one's inputs."""
    found: Specification = {}
    names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    last = [name for name in names if state[f"{name}.weight"].ndim > 1][-1]
    group: str | None = None
    for name in names:
        ndim = state[f"{name}.weight"].ndim
        if ndim > 1:
            before, group = group, None if name == last else name
            found[f"{name}.weight"] = (group, before, *[None] * (ndim - 2))
        else:
            found[f"{name}.weight"] = (group,)
        for vector in ("bias", *_STATISTICS):
            if f"{name}.{vector}" in state:
                found[f"{name}.{vector}"] = (group,)
    return found


def residual_mlp(state: State) -> Specification:
    """A stream that blocks of two layers (`up`, `down`) add to, between the layers `embed` and `head`."""
    found: Specification = {
        "embed.weight": ("stream", None),
        "embed.bias": ("stream",),
        "head.weight": (None, "stream"),
    }
    for name in state:
        if name.startswith("blocks."):
            block, _, layer = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
            row, column = (block, "stream") if layer == "up" else ("stream", block)
            found[name] = (row, column) if name.endswith("weight") else (row,)
    return found


def resnet(state: State) -> Specification:
    """A residual network of basic blocks in three stages, with a convolution and a norm where the channels change."""
    found: Specification = {"linear.weight": (None, "layer3")}
    for name in state:
        place, _, kind = name.rpartition(".")
        group, before = _of_resnet(place)
        if kind == "weight" and state[name].ndim == 4:
            found[name] = (group, before, None, None)
        elif place != "linear" and kind in ("weight", "bias", *_STATISTICS):
            found[name] = (group,)
    return found


def _of_resnet(place: str) -> tuple[str | None, str | None]:
    """Give the groups of outputs and inputs of a layer; a norm has only the first."""
    if not place.startswith("layer"):
        return "layer1", None
    stage, index, layer = place.split(".", 2)
    earlier = f"layer{max(1, int(stage[-1]) - 1)}" if index == "0" else stage
    inner = f"{stage}.{index}"
    return {"conv1": (inner, earlier), "bn1": (inner, None), "conv2": (stage, inner), "bn2": (stage, None)}.get(
        layer, (stage, earlier)
    )


def bottlenecks(state: State) -> Specification:
    """ResNet50 of `transformers`: stages of blocks of three convolutions."""
    found: Specification = {}
    for name in state:
        place, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias", *_STATISTICS) or place.startswith("classifier"):
            continue
        group, before = _of_bottleneck(place.removeprefix("resnet.").split("."))
        found[name] = (group, before, None, None) if state[name].ndim == 4 else (group,)
    return found | {"classifier.1.weight": (None, "stage3")}


def _of_bottleneck(parts: list[str]) -> tuple[str | None, str | None]:
    if parts[0] == "embedder":
        return "embedder", None
    stage, block = f"stage{parts[2]}", int(parts[4])
    earlier = stage if block else "embedder" if parts[2] == "0" else f"stage{int(parts[2]) - 1}"
    if parts[5] == "shortcut":
        return stage, earlier
    inner = [f"{stage}.{block}.{i}" for i in (0, 1)]
    return [(inner[0], earlier), (inner[1], inner[0]), (stage, inner[1])][int(parts[6])]


def stream_and_perceptrons(state: State) -> Specification:
    """A vision transformer of `transformers`, but for its heads: units inside heads that move have no name here."""
    found: Specification = {}
    for name in state:
        place, _, kind = name.rpartition(".")
        inner = place.removesuffix(".fc1").removesuffix(".fc2")
        if "patch_embeddings" in place:
            found[name] = ("stream", None, None, None)
        elif place.endswith("embeddings"):
            found[name] = (None, None, "stream")
        elif place.endswith((".q_proj", ".k_proj", ".v_proj", "classifier")):
            found[name] = (None, "stream")
        elif place.endswith(".fc1"):
            found[name] = (inner, "stream")
        else:
            found[name] = ("stream", inner if place.endswith(".fc2") else None)
        if kind == "bias":
            found[name] = found[name][:1]
    return {name: axes[: state[name].ndim] for name, axes in found.items()}


def groups(specification: Specification, state: State) -> dict[str, int]:
    """Give the size of each group."""
    return {
        group: state[name].shape[axis]
        for name, axes in specification.items()
        for axis, group in enumerate(axes)
        if group is not None
    }


def identity(specification: Specification, state: State) -> Orders:
    """Give every group its own order."""
    return {group: np.arange(size) for group, size in groups(specification, state).items()}


def ordered(tensor: Tensor, axes: Sequence[str | None], orders: Orders, but: int | None = None) -> Tensor:
    """Permute the axes of one tensor, one of them left out."""
    for axis, group in enumerate(axes):
        if group is not None and axis != but:
            tensor = tensor.index_select(axis, torch.from_numpy(orders[group]))
    return tensor


def permute(specification: Specification, state: State, orders: Orders) -> State:
    """Permute a whole network."""
    return {name: ordered(tensor, specification.get(name, ()), orders) for name, tensor in state.items()}


def parameters(specification: Specification) -> Specification:
    """Leave running statistics out, which are permuted but not compared."""
    return {name: axes for name, axes in specification.items() if not name.endswith(_STATISTICS)}


def unfolded(tensor: Tensor, axis: int) -> Tensor:
    """Give the units of one axis as rows."""
    return tensor.movedim(axis, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None]


def mixed(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """Multiply one axis by a matrix."""
    rows = tensor.movedim(axis, 0)
    return (matrix @ rows.reshape(len(rows), -1)).reshape(rows.shape).movedim(0, axis)


def objective(a: State, b: State) -> float:
    """Inner product of all parameters."""
    names = [name for name in a if not name.endswith((*_STATISTICS, "num_batches_tracked"))]
    return sum(float((a[name].double() * b[name].double()).sum()) for name in names)


def coordinate_descent(
    specification: Specification, a: State, b: State, seed: int = 0, max_iterations: int = 100
) -> Orders:
    """Assign one group after another in random order, until a sweep changes nothing."""
    rng = np.random.default_rng(seed)
    orders = identity(specification, a)
    compared = parameters(specification)
    uses = {
        group: [(name, axis) for name, axes in compared.items() for axis, each in enumerate(axes) if each == group]
        for group in orders
    }
    names = list(orders)
    for _ in range(max_iterations):
        progress = False
        for at in rng.permutation(len(names)):
            group = names[at]
            gain = torch.zeros(len(orders[group]), len(orders[group]))
            for name, axis in uses[group]:
                moved = ordered(b[name], compared[name], orders, but=axis)
                gain += unfolded(a[name], axis) @ unfolded(moved, axis).T
            matrix = gain.double().numpy()
            order = linear_sum_assignment(matrix, maximize=True)[1]
            rows = np.arange(len(order))
            progress |= matrix[rows, order].sum() > matrix[rows, orders[group]].sum() + 1e-12
            orders[group] = order
        if not progress:
            break
    return orders
