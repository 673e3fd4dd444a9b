"""Distillation by pseudo-subclasses beside labels, class probabilities, controls, clusters and true fine labels.

    python benchmarks/distillation.py --networks FOLDER [--quick] [--seeds 5] [--images N] [--json FILE] [TASK …]

The teacher is a batch-norm CNN trained on coarse labels, the student a perceptron of one hidden layer trained on
the same images; everything is measured on test images with coarse labels. Students of one seed start alike, learn from
one teacher and see the images in one order, so that methods are compared seed by seed. A star marks a difference whose
95 % interval (Student's t over seeds) leaves out zero; nothing is corrected for the number of comparisons. Options were
chosen on images that are in neither set, by students of other seeds (`--tune`). Teachers are kept in the folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus import zoo
from isthmus.distillation import METHODS, Distillation, Teaching, compare_distillation
from isthmus.lessons import Method

Row = dict[str, Any]

TASKS: dict[str, tuple[str, str | list[list[int]]]] = {
    "digits even/odd": ("digits", "superclasses"),
    "mnist even/odd": ("mnist", "superclasses"),
    "fashion_mnist two fives": ("fashion_mnist", [[0, 1, 5, 6, 8], [2, 3, 4, 7, 9]]),
    "fashion_mnist five pairs": ("fashion_mnist", "neighbours"),
    "cifar10 animals/vehicles": ("cifar10", "superclasses"),
}
TUNING_SEEDS = (100, 101, 102)
TEACHING = Teaching(count=2, temperature=1.0, share_temperature=0.3)
GRID = [
    dataclasses.replace(TEACHING, count=count, temperature=temperature, share_temperature=share_temperature)
    for count in (2, 4)
    for temperature in (1.0, 2.0, 4.0)
    for share_temperature in (0.1, 0.3)
]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        images: Training images.
        test: Test images at most.
        seeds: Of students.
        teachers: The seeds learn from them in turn.
        teacher_epochs: Of teachers.
        student_epochs: Of students.
        hidden: Units of the hidden layer of students.
    """

    images: int = 3000
    test: int = 10000
    seeds: int = 5
    teachers: int = 5
    teacher_epochs: int = 15
    student_epochs: int = 30
    hidden: int = 256


def load(task: str, sizes: Sizes) -> tuple[zoo.Coarse, zoo.Dataset, zoo.Dataset]:
    """Give training images, images to choose options on, and test images, with coarse labels."""
    name, groups = TASKS[task]
    whole = zoo.load_data(name, limit=None if name == "digits" else 2 * sizes.images)
    shuffled = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    kept = min(sizes.images, len(whole) * 2 // 3)
    coarse, spare = (_of(whole, rows, groups) for rows in (shuffled[:kept], shuffled[kept:]))
    test = zoo.coarsen(zoo.load_data(name, "test", limit=sizes.test), coarse.groups).dataset
    return coarse, spare.dataset, test


def _of(whole: zoo.Dataset, rows: torch.Tensor, groups: str | list[list[int]]) -> zoo.Coarse:
    return zoo.coarsen(dataclasses.replace(whole, images=whole.images[rows], labels=whole.labels[rows]), groups)


def make_teacher(channels: int, classes: int, seed: int) -> nn.Sequential:
    """Make a network of five convolutions with batch norms; its classifier reads averages over all positions."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for index, (width, kernel, stride) in enumerate([(16, 5, 2), (16, 3, 1), (32, 3, 2), (32, 3, 1), (64, 3, 1)]):
            layers[f"conv{index}"] = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
            layers[f"norm{index}"] = nn.BatchNorm2d(width)
            layers[f"relu{index}"] = nn.ReLU()
            channels = width
        layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        layers["classifier"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)


def teachers(task: str, coarse: zoo.Coarse, sizes: Sizes, seeds: list[int], folder: Path) -> Iterator[nn.Module]:
    """Give a teacher for each seed; trained and kept where it is missing."""
    data = coarse.dataset
    recipe = zoo.Recipe(sizes.teacher_epochs, 64, lr=0.1, weight_decay=1e-3, precision="bfloat16")
    for seed in seeds:
        teacher = make_teacher(data.images.shape[1], len(data.classes), seed)
        name = f"distillation {task} {len(data)} {sizes.teacher_epochs} {seed}".replace("/", "-").replace(" ", "-")
        path = folder / f"{name}.pt"
        if path.exists():
            teacher.load_state_dict(torch.load(path, weights_only=True))
        else:
            zoo.train(teacher, data, dataclasses.replace(recipe, seed=seed), progress=False)
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            torch.save(teacher.state_dict(), unfinished)
            unfinished.replace(path)
        yield teacher.eval()


def student(dataset: zoo.Dataset, hidden: int, outputs: int) -> nn.Module:
    """Make a perceptron of one hidden layer."""
    return zoo.build("mlp", dataset, widths=(hidden,), classes=outputs)


def recipe_of(sizes: Sizes) -> zoo.Recipe:
    """Give the recipe of students."""
    return zoo.Recipe(sizes.student_epochs, 64, "adam", lr=2e-3, weight_decay=0.0)


def case(task: str, sizes: Sizes, folder: Path, methods: list[Method]) -> Row:
    """Compare all methods on one task."""
    coarse, _, test = load(task, sizes)
    start = time.perf_counter()
    known = list(teachers(task, coarse, sizes, list(range(sizes.teachers)), folder))
    trained = time.perf_counter() - start
    make = partial(student, coarse.dataset, sizes.hidden)
    found = compare_distillation(
        known, make, coarse, test, recipe_of(sizes), methods=methods, teaching=TEACHING, seeds=range(sizes.seeds)
    )
    seconds = {"teachers": trained, "students": time.perf_counter() - start - trained}
    show(task, found)
    return {"task": task, "seconds": seconds, **found.to_dict()}


def show(task: str, found: Distillation) -> None:
    teacher, labels = 100 * float(found.teachers.mean()), found.settings["images"]
    print(f"\n{task}: {labels} images, {len(found.seeds)} seeds, teachers {teacher:.2f} %\n{found.table}", flush=True)


def tune(task: str, sizes: Sizes, folder: Path) -> Row:
    """Measure options on images that are in neither set, by students and a teacher of other seeds."""
    coarse, spare, _ = load(task, sizes)
    (teacher,) = teachers(task, coarse, sizes, [TUNING_SEEDS[0]], folder)
    make, rows = partial(student, coarse.dataset, sizes.hidden), []
    for teaching in GRID:
        known: list[Method] = ["logits", "projection"] if teaching.share_temperature == 0.1 else ["projection"]
        found = compare_distillation(
            teacher, make, coarse, spare, recipe_of(sizes), methods=known, teaching=teaching, seeds=TUNING_SEEDS
        )
        means = dict(zip(found.methods, (100 * found.accuracies.mean(1)).tolist(), strict=True))
        rows.append({**dataclasses.asdict(teaching), **means})
        told = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        how = f"temperature {teaching.temperature}, of shares {teaching.share_temperature}"
        print(f"{task}: count {teaching.count}, {how}: {told}", flush=True)
    return {"task": task, "tuning": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; all")
    parser.add_argument("--networks", type=Path, required=True, help="folder of the trained teachers")
    parser.add_argument("--images", type=int, default=Sizes.images, help="training images")
    parser.add_argument("--seeds", type=int, default=Sizes.seeds)
    parser.add_argument(
        "--teachers", type=int, default=Sizes.teachers, help="networks that the seeds learn from in turn"
    )
    parser.add_argument("--epochs", type=int, default=Sizes.student_epochs, help="of students")
    parser.add_argument("--hidden", type=int, default=Sizes.hidden, help="hidden units of students")
    parser.add_argument("--test", type=int, default=Sizes.test, help="test images")
    parser.add_argument("--tune", action="store_true", help="measure options instead")
    parser.add_argument("--quick", action="store_true", help="small networks and data that need no files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = Sizes(
        arguments.images, arguments.test, arguments.seeds, arguments.teachers, student_epochs=arguments.epochs
    )
    if arguments.quick:
        sizes = Sizes(images=400, seeds=2, teachers=1, teacher_epochs=3, student_epochs=2)
    tasks = list(TASKS)[:1] if arguments.quick else arguments.tasks or list(TASKS)
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    methods: list[Method] = list(METHODS)  # pyright: ignore[reportAssignmentType]
    facts = {"machine": platform.machine(), "threads": arguments.threads, "torch": torch.__version__}
    cases = []
    for task in tasks:
        folder = arguments.networks
        cases.append(tune(task, sizes, folder) if arguments.tune else case(task, sizes, folder, methods))
        if arguments.json:
            arguments.json.write_text(json.dumps({"facts": facts, "methods": METHODS, "cases": cases}, indent=1))


if __name__ == "__main__":
    main()
