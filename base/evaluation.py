"""Loss and metric of a network on data: the measured counterpart of every claim about a path or a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batch, Data, batches, model_device
from .errors import DataError
from .running import evaluating, on_device

Measure = Callable[[Any, Any], Tensor | float]

IGNORED = -100
"""The label that does not count, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Evaluation:
    """What one pass over data measured.

    Attributes:
        loss: Mean loss; NaN or infinite if the network's outputs are.
        metric: Mean metric, accuracy by default; None if none was asked for.
        samples: How many inputs were seen.
    """

    loss: float
    metric: float | None
    samples: int


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    loss: Measure | None = None,
    metric: Measure | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Measure a network's loss and metric on data, in evaluation mode and without gradients.

    Batches are weighted by their size and summed in float64, so that their sizes do not matter. The network's modes are
    as before afterwards, also after an error.

    Args:
        model: The network.
        data: Batches with labels: `(x, y)`, or a mapping with its labels under `labels`, `targets`, ….
        loss: Function (outputs, targets) → mean over the batch, a scalar. By default `cross_entropy`.
        metric: A second such function. By default `accuracy` beside the default loss, and none beside another loss.
        device: Where to compute; that of the network by default.

    Returns:
        The loss, the metric and the number of inputs.

    Raises:
        DataError: There is no batch, or labels are missing, of the wrong shape or out of range.
        NotFiniteError: An input holds NaN or infinity.

    >>> x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0]])
    >>> result = evaluate(nn.Identity(), (x, torch.tensor([0, 1, 0, 0])))
    >>> result.metric, round(result.loss, 4), result.samples
    (0.75, 0.4701, 4)
    """
    measures = choose_measures(loss, metric)
    network = on_device(model, device)
    totals = Totals.zeros(1, len(measures))
    with evaluating(network), torch.no_grad():
        for batch in batches(data, model_device(network)):
            totals.add(0, network, batch, measures)
            totals.samples += len(batch)
    means = totals.means()[0]
    return Evaluation(float(means[0]), float(means[1]) if len(measures) > 1 else None, totals.samples)


@dataclass
class Totals:
    """Weighted sums of measures (axis 1) at several points (axis 0), in float64."""

    sums: np.ndarray
    weights: np.ndarray
    samples: int = 0

    @classmethod
    def zeros(cls, points: int, measures: int) -> Totals:
        """Start with nothing measured."""
        return cls(np.zeros((points, measures)), np.zeros((points, measures)))

    def add(self, point: int, model: nn.Module, batch: Batch, measures: Sequence[Measure]) -> None:
        """Run the model on a batch and add what the measures say of its outputs."""
        outputs = batch.call(model)
        for index, measure in enumerate(measures):
            weight = _weight(measure, batch)
            if weight:
                self.sums[point, index] += weight * _scalar(measure, outputs, batch.targets)
                self.weights[point, index] += weight

    def means(self) -> np.ndarray:
        """Divide by the weights.

        Raises:
            DataError: No label counted.
        """
        if not self.weights.all():
            raise DataError(f"no label of the data counts: all are {IGNORED}, the label to be ignored")
        return self.sums / self.weights


def choose_measures(loss: Measure | None, metric: Measure | None) -> list[Measure]:
    """Give the loss and, if there is one, the metric: accuracy goes with the default loss only."""
    if metric is None and loss is None:
        metric = accuracy
    return [loss or cross_entropy, *([] if metric is None else [metric])]


def cross_entropy(outputs: Any, targets: Tensor | None) -> Tensor:
    """Give the mean cross entropy of logits (…, classes) and integer labels (…).

    Args:
        outputs: Logits, a mapping with them under `logits`, or an object that has `.logits`.
        targets: Labels from 0; -100 is not counted.

    Raises:
        DataError: Labels are missing, of another shape or type, or out of range.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """
    logits, labels = _logits_and_labels(outputs, targets)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, ignore_index=IGNORED)


def accuracy(outputs: Any, targets: Tensor | None) -> float:
    """Give the share of labels (…) that are the largest of their logits (…, classes).

    Args:
        outputs: Logits, a mapping with them under `logits`, or an object that has `.logits`.
        targets: Labels from 0; -100 is not counted.

    Raises:
        DataError: Labels are missing, of another shape or type, or out of range.

    >>> accuracy(torch.eye(3), torch.tensor([0, 1, 0])) == 2 / 3
    True
    """
    logits, labels = _logits_and_labels(outputs, targets)
    counted = labels != IGNORED
    return int((logits.argmax(-1) == labels)[counted].sum()) / int(counted.sum())


def _weight(measure: Measure, batch: Batch) -> int:
    if measure in (cross_entropy, accuracy) and batch.targets is not None:
        return int((batch.targets != IGNORED).sum())
    return len(batch)


def _scalar(measure: Measure, outputs: Any, targets: Tensor | None) -> float:
    value = measure(outputs, targets)
    if isinstance(value, Tensor) and value.numel() != 1:
        name = getattr(measure, "__name__", type(measure).__name__)
        raise DataError(
            f"{name} gave a tensor of shape {tuple(value.shape)}; expected the mean over the batch, a scalar"
        )
    return float(value)


def _logits(outputs: Any) -> Tensor:
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor) or found.ndim == 0:
        raise DataError(
            f"the network's output is a {type(outputs).__name__}, in which there are no logits; "
            "pass loss= and metric= functions of (outputs, targets)"
        )
    return found


def _logits_and_labels(outputs: Any, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = _logits(outputs)
    if targets is None:
        raise DataError(
            "the data has no labels: pass batches (x, y), or mappings with a key such as 'labels', "
            "or loss= and metric= functions that need none"
        )
    if targets.is_floating_point() or targets.shape != logits.shape[:-1]:
        raise DataError(
            f"targets of shape {tuple(targets.shape)} and type {targets.dtype} beside outputs of shape "
            f"{tuple(logits.shape)}; cross entropy and accuracy expect integer labels of shape "
            f"{tuple(logits.shape[:-1])}: reshape them, or pass loss= and metric= functions that fit"
        )
    classes, labels = logits.shape[-1], targets.flatten().long()
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} does not fit outputs of shape {tuple(logits.shape)}: labels must be "
            f"0 to {classes - 1}; number the classes from 0, or give the network as many outputs as there are classes"
        )
    return logits.flatten(0, -2), labels
