"""Distillation: training on what a teacher says of each image, by class or by finer subclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import DataError, NotFiniteError
from .data import Dataset
from .recipe import RecipeError

_SUM = 1e-4  # by which targets in float32 may miss a sum of 1


@dataclass(frozen=True, eq=False)
class Taught(Dataset):
    """Images with a teacher's probabilities beside their labels; `train` learns these, see `SoftTargets`.

    Attributes:
        targets: (n, outputs) float32, probabilities; what the student's outputs stand for.
        of_class: (outputs,) int64, the class that each output is part of.

    Raises:
        DataError: Targets or outputs do not fit, or are no probabilities.
        NotFiniteError: Targets hold NaN or infinity.
    """

    targets: Tensor
    of_class: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        check_outputs(self.of_class, len(self.classes))
        shape, wanted = tuple(self.targets.shape), (len(self), len(self.of_class))
        if shape != wanted or not self.targets.is_floating_point():
            raise DataError(
                f"{self.name}: targets of shape {shape} and type {self.targets.dtype}; expected floating point of "
                f"shape {wanted}, images x outputs"
            )
        if not self.targets.isfinite().all():
            raise NotFiniteError(f"{self.name}: the targets of shape {shape} hold NaN or infinity")
        if float(self.targets.min()) < 0 or float((self.targets.sum(1) - 1).abs().max()) > _SUM:
            raise DataError(f"{self.name}: targets are negative or do not sum to 1 for each image; pass probabilities")

    def to(self, device: torch.device | str | None) -> Taught:
        """Give the same with its tensors on a device."""
        parts = ("images", "labels", "targets", "of_class")
        return dataclasses.replace(self, **{part: getattr(self, part).to(device) for part in parts})


def taught(dataset: Dataset, targets: Tensor, of_class: Tensor | Sequence[int] | None = None) -> Taught:
    """Put a teacher's probabilities beside the labels of a data set.

    Args:
        dataset: The images, which the student is to see as the teacher saw them: without augmentation.
        targets: (n, outputs), non-negative, each row with a sum of 1.
        of_class: (outputs,) the class that each output is part of. Default: outputs are the classes.

    Raises:
        DataError: The shapes do not fit, or the targets are no probabilities.
        NotFiniteError: The targets hold NaN or infinity.

    >>> from isthmus.zoo import load_data, mlp, train, Recipe
    >>> data = load_data("digits", limit=200)
    >>> lesson = taught(data, torch.full((200, 20), 0.05), torch.arange(10).repeat_interleave(2))
    >>> student = mlp(64, (8,), classes=20, seed=0)
    >>> round(train(student, lesson, Recipe(epochs=2)).train_loss[-1], 1)
    3.0
    """
    fields = {each.name: getattr(dataset, each.name) for each in dataclasses.fields(Dataset)}
    of_class = torch.arange(len(dataset.classes)) if of_class is None else torch.as_tensor(of_class)
    device = dataset.images.device
    return Taught(**fields, targets=targets.detach().to(device, torch.float32), of_class=of_class.to(device))


@dataclass(frozen=True, eq=False)
class TaughtLoader:
    """Batches (x, y, targets) of a `Taught` data set, in the orders in which `loader` gives (x, y)."""

    dataset: Taught
    batch_size: int
    generator: torch.Generator

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        data = self.dataset
        order = torch.randperm(len(data), generator=self.generator).to(data.images.device)
        for rows in order.split(self.batch_size):
            yield data.normalise(data.images[rows]), data.labels[rows], data.targets[rows]


def taught_batches(dataset: Taught, batch_size: int, generator: torch.Generator, augment: bool) -> TaughtLoader:
    """Give the batches of an epoch, in another order each time they are read.

    Raises:
        RecipeError: The images shall be augmented.
    """
    if augment:
        raise RecipeError(
            f"recipe: augment changes the images, but the targets of {dataset.name} are of the images as they are; "
            "leave it out, or pass train a loss that asks the teacher"
        )
    return TaughtLoader(dataset, batch_size, generator)


def sum_subclasses(scores: Tensor, of_class: Tensor) -> Tensor:
    """Sum the probabilities of subclasses, as scores: the softmax of the result is the summed softmax of the scores.

    Args:
        scores: (…, outputs), logits.
        of_class: (outputs,) the class of each output; every class has one or more.

    Returns:
        (…, classes), the log-sum-exp of each class's scores.

    >>> scores = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    >>> sum_subclasses(scores, torch.tensor([0, 1, 1, 1])).softmax(-1)
    tensor([0.1000, 0.9000])
    """
    members = [(of_class == name).nonzero().flatten() for name in range(int(of_class.max()) + 1)]
    if len(members) == len(of_class) and torch.equal(torch.cat(members), torch.arange(len(of_class))):
        return scores
    return torch.stack([scores[..., own.to(scores.device)].logsumexp(-1) for own in members], -1)


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """The loss of distillation (Hinton, Vinyals & Dean 2015, section 2), by classes or by subclasses.

    (1 - h) T² CE(targets, softmax(scores / T)) + h CE(label, summed softmax(scores)), where CE is the cross-entropy and
    the sum is over the subclasses of each class.

    Attributes:
        of_class: (outputs,) the class that each output is part of.
        temperature: T, of the student's outputs; the targets come with the teacher's.
        hard: h, the share of the labels, in [0, 1]. None of them by default.

    Raises:
        DataError: A value cannot work.

    >>> loss = SoftTargets(torch.tensor([0, 0, 1]))
    >>> scores, targets = torch.zeros(1, 3), torch.tensor([[0.5, 0.5, 0.0]])
    >>> round(float(loss(scores, torch.tensor([0]), targets)), 4)
    1.0986
    """

    of_class: Tensor
    temperature: float = 1.0
    hard: float = 0.0

    def __post_init__(self) -> None:
        check_outputs(self.of_class, int(self.of_class.max()) + 1 if self.of_class.numel() else 0)
        if not 0 < self.temperature < float("inf"):
            raise DataError(f"temperature is {self.temperature!r}; expected a number above zero")
        if not 0 <= self.hard <= 1:
            raise DataError(f"hard is {self.hard!r}; expected a share in [0, 1]")

    def __call__(self, scores: Tensor, y: Tensor, targets: Tensor) -> Tensor:
        """Give the mean loss of a batch.

        Args:
            scores: (n, outputs) of the student.
            y: (n,) labels.
            targets: (n, outputs) of the teacher.
        """
        loss = scores.new_zeros(())
        if self.hard < 1:
            soft = F.cross_entropy(scores / self.temperature, targets.to(scores.dtype))
            loss = (1 - self.hard) * self.temperature**2 * soft
        if self.hard > 0:
            loss = loss + self.hard * F.cross_entropy(sum_subclasses(scores, self.of_class), y)
        return loss

    def class_scores(self, scores: Tensor) -> Tensor:
        """Give the scores of classes from those of subclasses, summed at the temperature that was trained at."""
        return self.temperature * sum_subclasses(scores / self.temperature, self.of_class)


class Subclassed(nn.Module):
    """A student whose outputs are subclasses, as a network that gives class scores.

    Args:
        network: Gives (…, outputs).
        of_class: (outputs,) the class that each output is part of.
        temperature: At which probabilities are summed: that of the training.

    >>> network = Subclassed(nn.Linear(4, 6), torch.tensor([0, 0, 0, 1, 1, 1]))
    >>> network(torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    """

    of_class: Tensor

    def __init__(self, network: nn.Module, of_class: Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature
        SoftTargets(of_class, temperature)  # which refuses what cannot be
        self.register_buffer("of_class", of_class.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to class scores, (…, classes)."""
        return SoftTargets(self.of_class, self.temperature).class_scores(self.network(x))


def check_outputs(of_class: Tensor, classes: int) -> None:
    """Refuse outputs that do not name the classes, each once or more.

    Raises:
        DataError: With what is there.
    """
    known = of_class.ndim == 1 and of_class.dtype == torch.int64
    if not known or sorted(set(of_class.tolist())) != list(range(classes)) or not classes:
        given = of_class.tolist() if of_class.numel() <= 20 else f"of shape {tuple(of_class.shape)}"
        raise DataError(
            f"of_class is {given} ({of_class.dtype}); expected one int64 class for each output, 0 to {classes - 1}, "
            "each at least once"
        )
