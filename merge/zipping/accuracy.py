"""What networks of several tasks get right: over all classes jointly, and each on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...base.batches import Data, batches, model_device
from ...base.errors import DataError
from ...base.running import evaluating, on_device
from .zipped import Zipped, check_classes, joined


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracies in [0, 1].

    Attributes:
        joint: Share of all samples whose class has the largest of all logits.
        tasks: For each head, the share of the samples of its classes whose class has the largest of its logits.
        samples: Number of samples of each task.
    """

    joint: float
    tasks: tuple[float, ...]
    samples: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean over the tasks."""
        return sum(self.tasks) / len(self.tasks)


def task_accuracy(
    networks: Zipped | Sequence[nn.Module],
    data: Data,
    classes: Sequence[Sequence[int]] | None = None,
    *,
    device: torch.device | str | None = None,
) -> TaskAccuracy:
    """Measure networks of several tasks on data of all of them, in evaluation mode.

    Networks of their own, such as the parents, are measured as an ensemble whose logits are joined.

    Args:
        networks: Zipped networks, or one network for each task.
        data: Batches with the labels of joint classes.
        classes: For each network the joint class of each of its outputs; None: those of the zipped networks.
        device: Where to compute; that of the networks by default.

    Raises:
        DataError: There is no batch, labels are missing or in no task, a task has no sample, or `classes` does not fit.

    >>> task_accuracy([nn.Identity(), nn.Identity()], (torch.tensor([[2.0], [1.0]]), torch.tensor([0, 1])), [[0], [1]])
    TaskAccuracy(joint=0.5, tasks=(1.0, 1.0), samples=(1, 1))
    """
    zipped = networks if isinstance(networks, Zipped) else Zipped(list(networks))
    classes = zipped.classes if classes is None else classes
    if classes is None:
        raise DataError("which classes are whose? Pass classes=[[0, 1, …], …], the joint class of each output")
    known = check_classes(classes, len(zipped.heads))
    model = on_device(zipped, device)
    assert isinstance(model, Zipped)
    right, seen, joint, total = [0] * len(known), [0] * len(known), 0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches(data, model_device(model)):
            labels = _labels(batch.targets, known)
            outputs = model.outputs(*batch.args, **batch.kwargs)
            joint += int((joined(outputs, known).argmax(-1) == labels).sum())
            total += len(labels)
            for task, (output, own) in enumerate(zip(outputs, known, strict=True)):
                names = torch.tensor(own, device=labels.device)
                mine = torch.isin(labels, names)
                right[task] += int((names[output.argmax(-1)] == labels)[mine].sum())
                seen[task] += int(mine.sum())
    if not all(seen):
        raise DataError(
            f"no sample has a class of task {seen.index(0)}: {known[seen.index(0)]}; pass data of all tasks"
        )
    return TaskAccuracy(joint / total, tuple(r / s for r, s in zip(right, seen, strict=True)), tuple(seen))


def _labels(targets: Tensor | None, classes: Sequence[Sequence[int]]) -> Tensor:
    if targets is None or targets.is_floating_point() or targets.ndim != 1:
        found = "none" if targets is None else f"of shape {tuple(targets.shape)} and type {targets.dtype}"
        raise DataError(
            f"the data's labels are {found}; expected batches (x, y) with one integer class for each sample"
        )
    known = torch.tensor([label for own in classes for label in own], device=targets.device)
    strange = targets[~torch.isin(targets, known)]
    if len(strange):
        raise DataError(f"label {int(strange[0])} is a class of no task: {[list(own) for own in classes]}")
    return targets
