"""Distillation of a teacher into a smaller student by the subclasses that the teacher's features hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isthmus.base.errors import DataError, nearest
from isthmus.base.plain import plain
from isthmus.base.progress import progress as progress_bar
from isthmus.base.running import on_device
from isthmus.zoo import Coarse, Dataset, Recipe, evaluate, train
from isthmus.zoo.distillation import SoftTargets, Subclassed, Taught
from isthmus.zoo.seeding import seeded

from .lessons import METHODS, Method, Seen, Teaching, ask, check_methods, lesson
from .plain import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "METHODS",
    "Difference",
    "Distillation",
    "Distilled",
    "Method",
    "Seen",
    "Teaching",
    "ask",
    "compare_distillation",
    "distil",
    "lesson",
]


@dataclass(frozen=True, eq=False)
class Distilled:
    """A trained student.

    Attributes:
        model: Gives class scores.
        network: The student itself, whose outputs may be subclasses.
        of_class: (outputs,) the class that each output is part of.
        train_accuracy: Share of the training labels found over the last epoch.
    """

    model: nn.Module
    network: nn.Module
    of_class: Tensor
    train_accuracy: float


def distil(
    teacher: nn.Module | Seen | None,
    make_student: Callable[[int], nn.Module],
    data: Coarse | Dataset,
    recipe: Recipe | None = None,
    *,
    method: Method = "projection",
    teaching: Teaching | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Distilled:
    """Train a student on what a teacher says of its training images.

    Args:
        teacher: A network whose last layer is linear, what `ask` gave of one, or None for "labels".
        make_student: Makes the student for a number of outputs, its initial weights from torch's global generator,
            those of the output layer last: then students of one seed start alike, however many outputs they have.
        data: The training set; `Coarse` for "oracle".
        recipe: How to train, without augmentation; None for `Recipe()`. Its seed is not read.
        method: See `METHODS`.
        teaching: Options.
        seed: Of the student's initial weights, the order of the images, and the subclasses.
        device: Where to train; None for the CPU.
        progress: Show a bar: always, never, or on a terminal only (None).

    Returns:
        The student.

    Raises:
        ArchitectureError: A network does not take the images, or the student has another number of outputs.
        DataError: Choices, teacher and data do not fit.
        DivergedError: The training diverged.
        LayerNotFoundError: No linear layer gives the teacher's outputs.
        RecipeError: The recipe augments.

    >>> from isthmus.zoo import load_data, mlp
    >>> data, recipe = load_data("digits", limit=300), Recipe(epochs=2, lr=0.1)
    >>> teacher = distil(None, lambda outputs: mlp(64, (32,), outputs), data, recipe, method="labels").model
    >>> student = distil(teacher, lambda outputs: mlp(64, (8,), outputs), data, recipe, teaching=Teaching(count=3))
    >>> student.network.fc2.out_features, student.model(data.inputs()).shape
    (30, torch.Size([300, 10]))
    """
    teaching = teaching or Teaching()
    images = data.dataset if isinstance(data, Coarse) else data
    seen = ask(teacher, images) if isinstance(teacher, nn.Module) and method != "labels" else teacher
    own = lesson(method, seen if isinstance(seen, Seen) else None, data, teaching, seed=seed)
    of_class, loss = torch.arange(len(images.classes)), None
    if isinstance(own, Taught):
        of_class = own.of_class
        loss = SoftTargets(of_class, teaching.temperature, teaching.hard)
    with seeded(seed):
        network = make_student(len(of_class))
    recipe = dataclasses.replace(recipe or Recipe(), seed=seed)
    history = train(network, own, recipe, device=device, loss=loss, progress=progress)
    model = Subclassed(network, of_class, 1.0 if loss is None else teaching.temperature)
    return Distilled(on_device(model, device), network, of_class, history.train_accuracy[-1])


@dataclass(frozen=True)
class Difference:
    """Test accuracy of one method less that of another, seed by seed.

    Attributes:
        method: The one.
        against: The other.
        differences: One for each seed.
        mean: Of the differences.
        low: Lower end of the interval of the mean by Student's t, the seeds being a sample.
        high: Upper end.
        p_value: Of the paired two-sided t-test.
        level: Of the interval.
    """

    method: str
    against: str
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p_value: float
    level: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out zero; of many comparisons some do by chance."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class Distillation:
    """Students of several methods, each from the same starts and with the same orders of images.

    Attributes:
        methods: In rows.
        seeds: In columns.
        accuracies: (methods x seeds) on the test set.
        losses: (methods x seeds) cross-entropy of the summed probabilities on the test set.
        teachers: (seeds,) test accuracy of the teacher of each seed.
        settings: How all this was made.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    accuracies: Tensor
    losses: Tensor
    teachers: Tensor
    settings: dict[str, Any]

    def __repr__(self) -> str:
        return f"Distillation({len(self.methods)} methods, {len(self.seeds)} seeds)"

    def difference(self, method: str, against: str = "logits", *, level: float = 0.95) -> Difference:
        """Compare two methods seed by seed.

        Raises:
            DataError: A method was not measured, there are less than two seeds, or the level is outside (0, 1).
        """
        from scipy.stats import t

        for name in (method, against):
            if name not in self.methods:
                raise DataError(f"no method {name!r} was measured{nearest(name, self.methods)}")
        count = len(self.seeds)
        if count < 2 or not 0 < level < 1:
            raise DataError(f"an interval of level {level} from {count} seeds; expected (0, 1), and two seeds or more")
        one, other = (self.accuracies[self.methods.index(name)] for name in (method, against))
        differences = one - other
        mean, error = float(differences.mean()), float(differences.std()) / count**0.5
        half = float(t.ppf((1 + level) / 2, count - 1)) * error
        p = 2 * float(t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
        return Difference(method, against, tuple(differences.tolist()), mean, mean - half, mean + half, p, level)

    @property
    def baselines(self) -> tuple[str, ...]:
        """What the methods are compared with: those of "labels" and "logits" that were measured, else the first."""
        return tuple(name for name in ("labels", "logits") if name in self.methods) or self.methods[:1]

    @property
    def table(self) -> str:
        """Accuracies, and differences in points with their 95 % intervals."""
        rows = []
        for name, values in zip(self.methods, 100 * self.accuracies, strict=True):
            row = [name, f"{float(values.mean()):.2f}", f"{float(values.std()):.2f}" if len(values) > 1 else "–"]
            for other in self.baselines:
                if name == other or len(self.seeds) < 2:
                    row.append("–")
                    continue
                found = self.difference(name, other)
                low, mean, high = (f"{100 * value:+.2f}" for value in (found.low, found.mean, found.high))
                row.append(f"{mean} [{low}, {high}]{' *' if found.beyond_noise else ''}")
            rows.append(row)
        return table(["method", "accuracy %", "sd", *(f"less {other}" for other in self.baselines)], rows)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, lists and text for JSON."""
        names = ("methods", "seeds", "accuracies", "losses", "teachers", "settings")
        pairs = [(one, other) for other in self.baselines for one in self.methods if one != other]
        found = [self.difference(*pair) for pair in pairs] if len(self.seeds) > 1 else []
        differences = [{**dataclasses.asdict(each), "beyond_noise": each.beyond_noise} for each in found]
        return plain({**{name: getattr(self, name) for name in names}, "differences": differences})

    def plot(self, ax: Axes | None = None, *, against: str | None = None) -> Axes:
        """Draw the differences from one method: a point for each seed, a bar for the mean and its 95 % interval.

        Args:
            ax: Where to draw. Default: a new figure.
            against: The method at zero. Default: the last of `baselines`.

        Raises:
            DataError: The method was not measured, or there are less than two seeds.
        """
        import matplotlib.pyplot as plt

        against = self.baselines[-1] if against is None else against
        found = [self.difference(name, against) for name in self.methods if name != against]
        self.difference(against, against)  # known, and of two seeds or more
        if ax is None:
            ax = plt.subplots(figsize=(5.2, 1.2 + 0.4 * len(found)), layout="constrained")[1]
        for place, each in enumerate(found):
            ax.plot([100 * x for x in each.differences], [place] * len(self.seeds), "o", color="#9aa3ad", markersize=4)
            reach = [[100 * (each.mean - each.low)], [100 * (each.high - each.mean)]]
            ax.errorbar([100 * each.mean], [place], xerr=reach, fmt="D", color="C0", markersize=5, capsize=4)
        ax.axvline(0, color="#5d646e", linewidth=0.8)
        ax.set_yticks(range(len(found)), [each.method for each in found])
        ax.invert_yaxis()
        ax.set_xlabel(f"test accuracy less that of {against!r}, points")
        return ax


def compare_distillation(
    teachers: nn.Module | Sequence[nn.Module],
    make_student: Callable[[int], nn.Module],
    data: Coarse | Dataset,
    test_set: Dataset,
    recipe: Recipe | None = None,
    *,
    methods: Sequence[Method] = ("labels", "logits", "projection", "dealt", "clusters", "oracle"),
    teaching: Teaching | None = None,
    seeds: Sequence[int] = range(5),
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Distillation:
    """Train students by several methods from the same starts, and compare them on test images.

    For each seed all students have the same initial weights below the output layer and see the images in the same
    order, and differences are taken seed by seed: what distillation gains is near the noise of seeds.

    Args:
        teachers: One, or several: the first seed learns from the first of them, and so on in turn.
        make_student: Makes a student for a number of outputs, see `distil`.
        data: The training set; with fine labels for "oracle".
        test_set: With the labels of the classes, not the fine ones.
        recipe: How to train; its seed is not read.
        methods: See `METHODS`.
        teaching: Options.
        seeds: Of students; five or more for an interval that means something.
        device: Where to train; None for the CPU.
        progress: Show a bar: always, never, or on a terminal only (None).

    Returns:
        The accuracies and their differences; errors as `distil`.

    Raises:
        DataError: There is no seed, no teacher, or the test set has another number of classes.

    >>> from isthmus.zoo import coarsen, load_data, mlp
    >>> data = coarsen(load_data("digits", limit=300))
    >>> test = coarsen(load_data("digits", "test"), data.groups).dataset
    >>> teacher = mlp(64, (32,), 5, seed=0)
    >>> _ = train(teacher, data.dataset, Recipe(epochs=3))
    >>> compare_distillation(teacher, lambda n: mlp(64, (8,), n), data, test, Recipe(epochs=1), seeds=(0, 1))
    Distillation(6 methods, 2 seeds)
    """
    check_methods(methods)
    teaching, recipe = teaching or Teaching(), recipe or Recipe()
    own = (teachers,) if isinstance(teachers, nn.Module) else tuple(teachers)
    images = data.dataset if isinstance(data, Coarse) else data
    seeds = tuple(seeds)
    if not seeds or not own or len(test_set.classes) != len(images.classes):
        raise DataError(
            f"{len(seeds)} seeds, {len(own)} teachers, {len(test_set.classes)} classes to test {len(images.classes)}; "
            "expected one seed and one teacher or more, and as many classes"
        )
    seen = [ask(teacher, images) for teacher in own]
    scores = torch.zeros(len(methods), len(seeds), 2, dtype=torch.float64)
    runs = [(row, column) for column in range(len(seeds)) for row in range(len(methods))]
    for row, column in progress_bar(runs, "students", show=progress):
        student = distil(
            seen[column % len(own)],
            make_student,
            data,
            recipe,
            method=methods[row],
            teaching=teaching,
            seed=seeds[column],
            device=device,
            progress=False,
        )
        scores[row, column] = torch.tensor(evaluate(student.model, test_set), dtype=torch.float64)
    known = [evaluate(teacher, test_set)[1] for teacher in own]
    taught_by = torch.tensor([known[column % len(own)] for column in range(len(seeds))], dtype=torch.float64)
    settings = {
        "images": len(images),
        "test images": len(test_set),
        "classes": images.classes,
        "teaching": dataclasses.asdict(teaching),
        "recipe": {name: value for name, value in dataclasses.asdict(recipe).items() if name != "seed"},
    }
    return Distillation(tuple(methods), seeds, scores[..., 1], scores[..., 0], taught_by, settings)
