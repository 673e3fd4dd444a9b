"""Two networks of disjoint classes in one: zipped, permuted and averaged trunks, beside the networks themselves.

    python benchmarks/zipping.py [--quick] [--networks FOLDER] [--json FILE] [NAME …]

Two networks of one architecture are trained from two seeds, one on the classes 0 to 4 and one on 5 to 9, and merged up
to several layers, behind which each keeps its own. Joint accuracy is over all ten classes by the largest of all
logits; that of a task, over its own five. "parents" are the two networks side by side, their logits joined. All ways
are repaired alike, on the same training images of both tasks. Trained networks are kept in the folder. `--quick`
trains small ones on scikit-learn's digits and needs no files; else data is looked for under `ISTHMUS_DATA`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus import symmetry, zoo
from isthmus.merge.zipping import TaskAccuracy, task_accuracy, zip_networks

CLASSES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mean", {"how": "mean"}),
    ("permute", {"how": "permute"}),
    ("zip, across only", {"how": "zip", "within": 0.0}),
    ("zip", {"how": "zip"}),
    ("zip, not repaired", {"how": "zip", "repair": None}),
)


@dataclass(frozen=True)
class Kind:
    """What is trained on what, how, and up to where it is merged."""

    make: Callable[[int], nn.Module]
    data: str
    recipe: zoo.Recipe
    upto: tuple[str, ...]


_CONVOLUTIONS = zoo.Recipe(epochs=3, lr=0.05, precision="bfloat16", warmup_epochs=0.5)

QUICK = "digits-2x48"

KINDS: dict[str, Kind] = {
    QUICK: Kind(
        lambda seed: zoo.mlp(64, (48, 48), classes=5, seed=seed),
        "digits",
        zoo.Recipe(epochs=10, lr=0.1, weight_decay=0.0),
        ("relu1", "relu2"),
    ),
    "digits-resnet8": Kind(
        lambda seed: zoo.resnet(8, in_channels=1, classes=5, seed=seed),
        "digits",
        zoo.Recipe(epochs=15, lr=0.05),
        ("layer1", "layer2", "layer3"),
    ),
    "mnist-3x512": Kind(
        lambda seed: zoo.mlp(784, (512,) * 3, classes=5, seed=seed),
        "mnist",
        zoo.Recipe(epochs=5, lr=0.05, precision="bfloat16"),
        ("relu1", "relu2", "relu3"),
    ),
    "fashion-vgg11": Kind(
        lambda seed: zoo.vgg(11, 1, classes=5, width_multiplier=0.25, norm="batch", image_size=28, seed=seed),
        "fashion_mnist",
        _CONVOLUTIONS,
        ("relu2", "relu4", "relu6", "relu8"),
    ),
    "fashion-resnet20": Kind(
        lambda seed: zoo.resnet(20, in_channels=1, classes=5, seed=seed),
        "fashion_mnist",
        replace(_CONVOLUTIONS, lr=0.1),
        ("layer1", "layer2", "layer3"),
    ),
}


def part(data: zoo.Dataset, classes: tuple[int, ...]) -> zoo.Dataset:
    """Keep some classes, numbered from 0."""
    keep = torch.isin(data.labels, torch.tensor(classes))
    number = torch.full((len(data.classes),), -1)
    number[list(classes)] = torch.arange(len(classes))
    names = tuple(data.classes[label] for label in classes)
    return replace(data, images=data.images[keep], labels=number[data.labels[keep]], classes=names)


def drawn(data: zoo.Dataset, limit: int) -> list[tuple[Tensor, Tensor]]:
    """Draw samples of all classes, always the same, in batches."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:limit]
    return list(zoo.loader(replace(data, images=data.images[rows], labels=data.labels[rows]), 500))


def networks(name: str, folder: Path | None) -> list[nn.Module]:
    """Give one trained network for each task, from its file or, the first time, by training it."""
    kind, found = KINDS[name], []
    for seed, classes in enumerate(CLASSES):
        model = kind.make(seed)
        path = folder / f"{name}-{seed}.pt" if folder else None
        if path is not None and path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            data = part(zoo.load_data(kind.data), classes)  # pyright: ignore[reportArgumentType]
            zoo.train(model, data, replace(kind.recipe, seed=seed))
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), path)
        found.append(model.eval())
    return found


def measured(name: str, folder: Path | None, calibration: int, tested: int) -> Iterator[dict[str, Any]]:
    """Merge two networks in every way up to every layer, and measure what comes out."""
    kind, models = KINDS[name], networks(name, folder)
    seen = drawn(zoo.load_data(kind.data, "train"), calibration)  # pyright: ignore[reportArgumentType]
    held = drawn(zoo.load_data(kind.data, "test"), tested)  # pyright: ignore[reportArgumentType]
    parents = sum(parameter.numel() for model in models for parameter in model.parameters())
    found_symmetry = symmetry(models[0], seen[0][0][:8])
    yield _row(name, "", "parents", task_accuracy(models, held, CLASSES), 1.0, 0.0)
    for upto in kind.upto:
        for way, options in WAYS:
            start = time.perf_counter()
            zipped = zip_networks(
                models, seen, upto=upto, classes=CLASSES, symmetry=found_symmetry, progress=False, **options
            )
            seconds = time.perf_counter() - start
            found = task_accuracy(zipped, held)
            yield _row(name, upto, way, found, zipped.parameter_count / parents, seconds)


def _row(name: str, upto: str, way: str, found: TaskAccuracy, size: float, seconds: float) -> dict[str, Any]:
    return {
        "networks": name,
        "upto": upto,
        "way": way,
        "joint": found.joint,
        "tasks": list(found.tasks),
        "parameters": size,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*KINDS, []], metavar="NAME", help=f"of {', '.join(KINDS)}; all")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} alone, in seconds and without files of data")
    parser.add_argument("--networks", type=Path, help="folder of the trained networks; trained anew without")
    parser.add_argument("--calibration", type=int, default=5000, help="training images of both tasks to zip on")
    parser.add_argument("--tested", type=int, default=10_000, help="test images")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = [QUICK] if arguments.quick else arguments.names or [name for name in KINDS if name != QUICK]
    rows = []
    print(f"{'networks':18}{'up to':9}{'trunk':20}{'joint':>7}{'task 0':>8}{'task 1':>8}{'size':>7}{'seconds':>9}")
    for name in names:
        for row in measured(name, arguments.networks, arguments.calibration, arguments.tested):
            rows.append(row)
            tasks = "".join(f"{accuracy:8.3f}" for accuracy in row["tasks"])
            print(
                f"{name:18}{row['upto']:9}{row['way']:20}{row['joint']:7.3f}{tasks}{row['parameters']:7.2f}"
                f"{row['seconds']:9.1f}",
                flush=True,
            )
    facts = {"machine": platform.processor() or platform.machine(), "threads": arguments.threads}
    facts |= {"python": platform.python_version(), "torch": torch.__version__, "calibration": arguments.calibration}
    arguments.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=2))
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
