"""The straight path as a user would write it: for each point a network with an interpolated state dict, and a pass.

What connectivity.py runs beside `isthmus.connect`; it uses nothing of isthmus.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def evaluate(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross entropy and accuracy."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for x, y in data:
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        right += (logits.argmax(1) == y).sum().item()
        count += len(y)
    return loss / count, right / count


def path(
    model_a: nn.Module, model_b: nn.Module, data: Iterable[tuple[Tensor, Tensor]], points: int = 25
) -> tuple[list[float], list[float]]:
    """Loss and accuracy at equally spaced points of the line between two networks."""
    state_a, state_b = model_a.state_dict(), model_b.state_dict()
    losses, accuracies = [], []
    for alpha in torch.linspace(0, 1, points).tolist():
        model = copy.deepcopy(model_a)
        model.load_state_dict(
            {
                name: (1 - alpha) * tensor + alpha * state_b[name] if tensor.is_floating_point() else tensor
                for name, tensor in state_a.items()
            }
        )
        loss, accuracy = evaluate(model, data)
        losses.append(loss)
        accuracies.append(accuracy)
    return losses, accuracies


def barrier(losses: list[float]) -> float:
    """Highest point over the chord."""
    last = len(losses) - 1
    chord = [losses[0] + (losses[-1] - losses[0]) * index / last for index in range(len(losses))]
    return max(loss - line for loss, line in zip(losses, chord, strict=True))
