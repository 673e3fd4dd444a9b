"""Loss and metric of a network on data: the measured counterpart of every claim about a path or a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batch, Data, batches, model_device
from .errors import DataError
from .running import evaluating, on_device

Measure = Callable[[Any, Any], Tensor | float]
"""Function (outputs, targets) → mean over the batch, a scalar; or one value for each sample of the batch."""

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

    Samples are summed in float64, so that the sizes of batches do not matter. The network's modes are
    as before afterwards, also after an error.

    Args:
        model: The network.
        data: Batches with labels: `(x, y)`, or a mapping with its labels under `labels`, `targets`, ….
        loss: Function (outputs, targets) → mean over the batch, a scalar, or one value for each sample. By default
            `cross_entropy`.
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
    """What each sample adds to the means of measures, at several points: nothing is summed before the end.

    Attributes:
        sums: For each point and measure: of each batch, what its samples add; float64 on the CPU.
        weights: For each measure: of each batch, how much its samples count. Labels decide it, so it is the same at
            all points.
        samples: How many inputs were seen; whoever adds batches counts them.
        order: A number for each batch, where it must be known whether two passes saw the same.
    """

    sums: list[list[list[Tensor]]]
    weights: list[list[Tensor]]
    samples: int = 0
    order: list[float] = field(default_factory=list)

    @classmethod
    def zeros(cls, points: int, measures: int) -> Totals:
        """Start with nothing measured."""
        return cls([[[] for _ in range(measures)] for _ in range(points)], [[] for _ in range(measures)])

    def add(self, point: int, model: nn.Module, batch: Batch, measures: Sequence[Measure]) -> None:
        """Run the model on a batch and add what the measures say of its outputs; point 0 comes first."""
        self.note(point, batch.call(model), batch, measures)

    def note(self, point: int, outputs: Any, batch: Batch, measures: Sequence[Measure]) -> None:
        """Add what the measures say of outputs; point 0 comes first."""
        for index, measure in enumerate(measures):
            sums, weights = contributions(measure, outputs, batch, check=point == 0)
            self.sums[point][index].append(sums)
            if point == 0:
                self.weights[index].append(weights)

    def of(self, measure: int) -> tuple[np.ndarray, np.ndarray]:
        """Give what each sample adds (points × samples) to a measure, and how much each counts (samples,).

        A measure that only tells the mean over a batch has a batch where others have a sample.
        """
        rows = [torch.cat(point[measure]).numpy() for point in self.sums]
        return np.stack(rows), torch.cat(self.weights[measure]).numpy()

    def means(self) -> np.ndarray:
        """Give the means (points × measures).

        Raises:
            DataError: No label counted.
        """
        columns = [self.of(measure) for measure in range(len(self.weights))]
        if not all(weights.any() for _, weights in columns):
            raise DataError(f"no label of the data counts: all are {IGNORED}, the label to be ignored")
        return np.stack([sums.sum(1) / weights.sum() for sums, weights in columns], axis=1)


def contributions(measure: Measure, outputs: Any, batch: Batch, check: bool = True) -> tuple[Tensor, Tensor]:
    """Give what each sample of a batch adds to the mean of a measure, and how much it counts.

    Args:
        measure: `cross_entropy` and `accuracy` are known sample by sample; a function that gives one value per sample
            is taken at its word; of one that gives the mean over the batch, the batch is all that is known.
        outputs: Of the network on the batch.
        batch: With its targets. With labels per token, a sample is a sequence and counts with its tokens.
        check: Check the labels as well; False where it has been done for this batch.

    Returns:
        Value times weight and weight, (samples,) or (1,), in float64 on the CPU.

    Raises:
        DataError: Labels are missing or wrong, or the measure gave a tensor of another shape.

    >>> logits, labels = torch.eye(3), torch.tensor([0, 1, 0])
    >>> contributions(accuracy, logits, Batch((logits,), targets=labels))[0]
    tensor([1., 1., 0.], dtype=torch.float64)
    """
    if not by_sample(measure):
        return _given(measure, outputs, batch)
    logits, labels = _logits_and_labels(outputs, batch.targets, check)
    counted = labels != IGNORED
    values = _cross_entropies(logits, labels) if measure is cross_entropy else (logits.argmax(-1) == labels) & counted
    sums, weights = (part.to("cpu").to(torch.float64).view(len(batch), -1).sum(1) for part in (values, counted))
    return sums, weights


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
    return _cross_entropies(*_logits_and_labels(outputs, targets), reduction="mean")


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


def _cross_entropies(logits: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction=reduction)


def _given(measure: Measure, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    value = torch.as_tensor(measure(outputs, batch.targets)).detach().to("cpu").to(torch.float64)
    count = len(batch)
    if value.shape == (count,):
        return value, torch.ones_like(value)
    if value.numel() == 1:
        return count * value.reshape(1), torch.tensor([count], dtype=torch.float64)
    raise DataError(
        f"{measure_name(measure)} gave a tensor of shape {tuple(value.shape)}; expected the mean over the batch, a "
        f"scalar, or one value for each sample, of shape {(count,)}"
    )


def by_sample(measure: Measure) -> bool:
    """Tell whether a measure is known to look at each sample by itself, so that batches may be joined for it."""
    return measure in (cross_entropy, accuracy)


def measure_name(measure: Measure) -> str:
    """Give the name of a function, or of the class of an object that can be called.

    >>> measure_name(accuracy)
    'accuracy'
    """
    return getattr(measure, "__name__", type(measure).__name__)


def find_logits(outputs: Any) -> Tensor | None:
    """Find the logits in what a network gave: itself, its entry or its attribute `logits`; None if none is a tensor.

    >>> find_logits({"logits": torch.zeros(2), "loss": torch.ones(())})
    tensor([0., 0.])
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    return found if isinstance(found, Tensor) else None


def _logits(outputs: Any) -> Tensor:
    found = find_logits(outputs)
    if found is None or found.ndim == 0:
        raise DataError(
            f"the network's output is a {type(outputs).__name__}, in which there are no logits; "
            "pass loss= and metric= functions of (outputs, targets)"
        )
    return found


def _logits_and_labels(outputs: Any, targets: Tensor | None, check: bool = True) -> tuple[Tensor, Tensor]:
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
    if not check:
        return logits.flatten(0, -2), labels
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} does not fit outputs of shape {tuple(logits.shape)}: labels must be "
            f"0 to {classes - 1}; number the classes from 0, or give the network as many outputs as there are classes"
        )
    return logits.flatten(0, -2), labels
