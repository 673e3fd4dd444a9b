"""Train the networks of `linear_mode_connectivity.ipynb` and keep them: `python notebooks/train_connected.py`.

Each network is a file in a cache folder (`ISTHMUS_CACHE`, else `~/.cache/isthmus`); what is there already is not
trained again, so an interrupted run goes on where it stopped. The full set takes about half an hour on one core. With
`ISTHMUS_QUICK=1` it is a small set on the embedded digits, seconds: enough to run every cell, not to show what the
notebook shows.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from isthmus import zoo
from isthmus.base.files import load_state_dict, save_state_dict

QUICK = os.environ.get("ISTHMUS_QUICK") == "1"
FOLDER = Path(os.environ.get("ISTHMUS_CACHE", Path.home() / ".cache" / "isthmus")) / (
    "connectivity_quick" if QUICK else "connectivity"
)

DIGITS = "digits" if QUICK else "mnist"
CLOTHES = "digits" if QUICK else "fashion_mnist"
DEPTHS = (1, 2) if QUICK else (2, 6, 11, 21)
WIDTH = 16 if QUICK else 128
WIDTHS = (0.05, 0.1) if QUICK else (0.0625, 0.125, 0.25)
HALVES = {"low": range(5), "high": range(5, 10)}
SEEDS = (0, 1)


@dataclass(frozen=True)
class Plan:
    """One network: how it is made, its data, and how it is trained; `classes` are those that it knows."""

    name: str
    data: str
    seed: int
    recipe: zoo.Recipe
    make: Callable[[int], nn.Module]
    classes: range = range(10)


@cache
def dataset(name: str, split: zoo.data.Split = "train", classes: range = range(10)) -> zoo.Dataset:
    """Load data, or the part of it that is of some classes, numbered from 0."""
    whole = zoo.load_data(name, split)
    if len(classes) == len(whole.classes):
        return whole
    kept = (whole.labels >= classes.start) & (whole.labels < classes.stop)
    return dataclasses.replace(
        whole,
        images=whole.images[kept],
        labels=whole.labels[kept] - classes.start,
        classes=tuple(whole.classes[index] for index in classes),
    )


def mlp(*widths: int, classes: int = 10, init: str = "torch") -> Callable[[int], nn.Module]:
    """Make perceptrons for the digits."""
    inputs = 64 if QUICK else 784
    return lambda seed: zoo.mlp(inputs, widths, classes=classes, init=init, seed=seed)  # pyright: ignore[reportArgumentType]


def vgg(width: float, classes: int = 10) -> Callable[[int], nn.Module]:
    """Make convolutional networks with batch norms for the clothes, of a share of VGG11's channels."""
    size = 8 if QUICK else 28
    return lambda seed: zoo.vgg(
        11, 1, width_multiplier=width, norm="batch", image_size=size, classes=classes, seed=seed
    )


def depth_plans() -> Iterator[Plan]:
    """Perceptrons of 2 to 21 hidden layers, as in REPAIR's table."""
    for depth in DEPTHS:
        recipe = zoo.Recipe(epochs=3 if QUICK else 50, batch_size=100 if QUICK else 1000, weight_decay=3e-3)
        if depth > 6:
            recipe = dataclasses.replace(recipe, warmup_epochs=5.0)
        if depth == 21:  # at the rate of the others it diverges
            recipe = dataclasses.replace(recipe, lr=0.02, clip=1.0, precision="bfloat16")
        for seed in SEEDS:
            make = mlp(*[WIDTH] * depth, init="he")
            yield Plan(f"depth{depth}-{seed}", DIGITS, seed, dataclasses.replace(recipe, seed=seed), make)


def wide_plans() -> Iterator[Plan]:
    """Three perceptrons from three seeds."""
    for seed in (0, 1, 2):
        recipe = zoo.Recipe(epochs=3 if QUICK else 8, seed=seed)
        yield Plan(f"wide-{seed}", DIGITS, seed, recipe, mlp(*[32 if QUICK else 512] * 3))


def width_plans() -> Iterator[Plan]:
    """Convolutional networks of several widths."""
    for width in WIDTHS:
        for seed in SEEDS:
            recipe = zoo.Recipe(epochs=1 if QUICK else 3, warmup_epochs=0.5, precision="bfloat16", seed=seed)
            yield Plan(f"vgg{width:g}-{seed}", CLOTHES, seed, recipe, vgg(width))


def half_plans() -> Iterator[Plan]:
    """Networks of half of the classes each: perceptrons and convolutional ones."""
    for seed, (half, classes) in enumerate(HALVES.items()):
        recipe = zoo.Recipe(epochs=3 if QUICK else 8, seed=seed)
        widths = (32, 32) if QUICK else (512, 512)
        yield Plan(f"digits-{half}", DIGITS, seed, recipe, mlp(*widths, classes=5), classes)
        recipe = zoo.Recipe(epochs=1 if QUICK else 4, warmup_epochs=0.5, precision="bfloat16", seed=seed)
        yield Plan(f"clothes-{half}", CLOTHES, seed, recipe, vgg(WIDTHS[-1], classes=5), classes)


def plans() -> dict[str, Plan]:
    """List every network of the study by name, in the order of training."""
    everything = (*depth_plans(), *wide_plans(), *width_plans(), *half_plans())
    return {plan.name: plan for plan in everything}


def load(name: str) -> nn.Module:
    """Give a trained network, in evaluation mode; trains and keeps it where it is missing."""
    plan, file = plans()[name], FOLDER / f"{name}.safetensors"
    network = plan.make(plan.seed)
    if file.exists():
        network.load_state_dict(load_state_dict(file))
        return network.eval()
    history = zoo.train(network, dataset(plan.data, "train", plan.classes), plan.recipe)
    accuracy = zoo.evaluate(network, dataset(plan.data, "test", plan.classes))[1]
    if not QUICK:
        print(f"{name}: test accuracy {accuracy:.1%}, {sum(history.seconds):.0f} s", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_state_dict(network.state_dict(), file)
    return network.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:] or plans():
        load(each)
