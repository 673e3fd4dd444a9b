"""Train the networks of the study of neural collapse and keep them: `python notebooks/train_collapse.py [NAME …]`.

Each network is a folder of checkpoints in a cache folder (`ISTHMUS_CACHE`, else `~/.cache/isthmus`); what is there
already is not trained again, so an interrupted run goes on where it stopped. The full set takes about half an hour on
one core with bfloat16 units. With `ISTHMUS_QUICK=1` it is a small set on the embedded digits, seconds: enough to run
everything, not to show what the study shows.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from isthmus import zoo
from isthmus.base.files import load_state_dict

QUICK = os.environ.get("ISTHMUS_QUICK") == "1"
FOLDER = Path(os.environ.get("ISTHMUS_CACHE", Path.home() / ".cache" / "isthmus")) / (
    "collapse_quick" if QUICK else "collapse"
)

DATA = {"mnist": "digits", "fashion_mnist": "digits"} if QUICK else {"mnist": "mnist", "fashion_mnist": "fashion_mnist"}
SEEDS = (0, 1, 2)
COLLAPSING = None if QUICK else 3000
COARSE = None if QUICK else 6000
DEALT = 300 if QUICK else 2000
WIDTH = 4 if QUICK else 24
DECAY = 5e-4
DECAYS = (0.0,) if QUICK else (0.0, 2e-3)
DEPTHS = (0,) if QUICK else (0, 4)
DEPTH = 1
PAIRS = [[index, index + 5] for index in range(5)]
PAIRINGS = ("similar", "dissimilar")


@dataclass(frozen=True)
class Plan:
    """One network: its images and labels, how it is made and trained.

    Attributes:
        name: Folder of its checkpoints.
        data: A key of `DATA`.
        labels: `"fine"`; `"pairs"`, which are `PAIRS`; a pairing of `zoo.pairs_of`; or `"dealt"`: as many labels, but
            dealt out to images at random.
        images: How many of the training set; None for all.
        seed: Of the initial weights and of the order of the images.
        recipe: How it is trained.
        make: Makes it for a number of classes and a seed.
        every: Keeps each so-many-th epoch; 0 for the last alone.
    """

    name: str
    data: str
    labels: str
    images: int | None
    seed: int
    recipe: zoo.Recipe
    make: Callable[[int, int], nn.Sequential]
    every: int = 0


@cache
def labelled(data: str, labels: str, split: zoo.data.Split = "train", images: int | None = None) -> zoo.Coarse:
    """Load images with the labels of a plan, fine labels beside; of a test set all, paired as the training set is."""
    whole = zoo.load_data(DATA[data], split, limit=images if split == "train" else None)
    if labels == "fine":
        return zoo.coarsen(whole, [[index] for index in range(len(whole.classes))])
    if labels == "dealt":
        return zoo.coarsen(whole, PAIRS, by_sample=True)
    return zoo.coarsen(whole, PAIRS if labels == "pairs" else zoo.pairs_of(zoo.load_data(DATA[data]), labels))


def data_of(plan: Plan, split: zoo.data.Split = "train") -> zoo.Coarse:
    """Load what a plan is trained or tested on."""
    return labelled(plan.data, plan.labels, split, plan.images)


def perceptron(classes: int, seed: int, *, norm: bool) -> nn.Sequential:
    """Make a perceptron of three hidden layers, with or without batch norms."""
    inputs, width = (64, 32) if QUICK else (784, 256)
    if not norm:
        return zoo.mlp(inputs, (width,) * 3, classes=classes, seed=seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in zoo.mlp(inputs, (width,) * 3, classes=classes, seed=seed).named_children():
        layers[name] = layer
        if name.startswith("fc") and isinstance(layer, nn.Linear) and layer.out_features != classes:
            layers[name.replace("fc", "norm")] = nn.BatchNorm1d(width)
    return nn.Sequential(layers)


def convolutional(classes: int, seed: int, *, depth: int = DEPTH) -> nn.Sequential:
    """Make a network of four convolutions and `depth` more, with batch norms; it averages over all positions."""
    shape = [(1, 5, 2), (1, 3, 1), (2, 3, 2), *[(2, 3, 1)] * depth, (4, 3, 1)]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 1
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for index, (factor, kernel, stride) in enumerate(shape, 1):
            convolution = nn.Conv2d(channels, factor * WIDTH, kernel, stride, kernel // 2, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            channels = factor * WIDTH
            layers[f"conv{index}"] = convolution
            layers[f"norm{index}"] = nn.BatchNorm2d(channels)
            layers[f"relu{index}"] = nn.ReLU()
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["classifier"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)


def collapsing_plans() -> Iterator[Plan]:
    """A perceptron with batch norms and much weight decay, and the control that has neither."""
    epochs = 10 if QUICK else 120
    recipe = zoo.Recipe(epochs=epochs, batch_size=100, lr=0.1, weight_decay=5e-3)
    every = 5 if QUICK else 6
    with_norm, without = (partial(perceptron, norm=norm) for norm in (True, False))
    yield Plan("collapsing", "mnist", "fine", COLLAPSING, 0, recipe, with_norm, every)
    control = dataclasses.replace(recipe, weight_decay=0.0)
    yield Plan("control", "mnist", "fine", COLLAPSING, 0, control, without, every)


def recipe_of(data: str, seed: int = 0, weight_decay: float = DECAY) -> zoo.Recipe:
    """Give the recipe of the convolutional networks."""
    epochs = 3 if QUICK else {"mnist": 12, "fashion_mnist": 30}[data]
    return zoo.Recipe(epochs=epochs, batch_size=100, lr=0.1, weight_decay=weight_decay, precision="bfloat16", seed=seed)


def coarse_plans() -> Iterator[Plan]:
    """Networks that know five pairs of classes (`coarse`), and all ten (`full`), from three seeds each."""
    for seed in SEEDS:
        for data in DATA:
            recipe = recipe_of(data, seed)
            every = 0 if seed else 1 if QUICK else recipe.epochs // 6
            yield Plan(f"{data}-coarse-{seed}", data, "pairs", COARSE, seed, recipe, convolutional, every)
            yield Plan(f"{data}-full-{seed}", data, "fine", COARSE, seed, recipe, convolutional)


def other_plans() -> Iterator[Plan]:
    """Other pairs, labels that are dealt out at random, other weight decays and depths."""
    for data in DATA:
        for labels in PAIRINGS:
            yield Plan(f"{data}-{labels}-0", data, labels, COARSE, 0, recipe_of(data), convolutional)
        recipe = dataclasses.replace(recipe_of(data, weight_decay=0.0), lr=0.05, epochs=3 if QUICK else 60)
        yield Plan(f"{data}-dealt-0", data, "dealt", DEALT, 0, recipe, convolutional)
    for decay in DECAYS:
        recipe = recipe_of("fashion_mnist", weight_decay=decay)
        name = f"fashion_mnist-decay{decay:g}-0"
        yield Plan(name, "fashion_mnist", "pairs", COARSE, 0, recipe, convolutional)
    for depth in DEPTHS:
        make, name = partial(convolutional, depth=depth), f"fashion_mnist-depth{depth}-0"
        yield Plan(name, "fashion_mnist", "pairs", COARSE, 0, recipe_of("fashion_mnist"), make)


def plans() -> dict[str, Plan]:
    """List every network of the study by name, in the order of training."""
    everything = (*collapsing_plans(), *coarse_plans(), *other_plans())
    return {plan.name: plan for plan in everything}


def checkpoint(plan: Plan, epoch: int | None = None) -> Path:
    """Name the file of a network after an epoch, or at the end."""
    return FOLDER / plan.name / f"epoch-{plan.recipe.epochs if epoch is None else epoch:03d}.safetensors"


def load(name: str, epoch: int | None = None) -> nn.Sequential:
    """Give a network after an epoch, or at the end, in evaluation mode; trains and keeps it where it is missing."""
    plan = plans()[name]
    network = untrained(plan)
    if epoch == 0:
        return network.eval()
    if not checkpoint(plan).exists():
        _train(plan)
    network.load_state_dict(load_state_dict(checkpoint(plan, epoch)))
    return network.eval()


def untrained(plan: Plan) -> nn.Sequential:
    """Make the network of a plan."""
    return plan.make(len(data_of(plan).dataset.classes), plan.seed)


def kept_epochs(name: str) -> list[int]:
    """List the epochs whose weights are kept, 0 for the untrained network; trains it where it is missing."""
    load(name)
    files = sorted((FOLDER / name).glob("epoch-*.safetensors"))
    return [0, *(int(file.stem.removeprefix("epoch-")) for file in files)]


def _train(plan: Plan) -> None:
    network, recipe = untrained(plan), plan.recipe
    every = plan.every or recipe.epochs
    folder = checkpoint(plan).parent
    history = zoo.train(
        network, data_of(plan).dataset, recipe, checkpoint_dir=folder, checkpoint_every=every, progress=False
    )
    if not QUICK:
        accuracy = zoo.evaluate(network, data_of(plan, "test").dataset)[1]
        trained, seconds = history.train_accuracy[-1], sum(history.seconds)
        print(f"{plan.name}: training accuracy {trained:.2%}, test {accuracy:.2%}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:] or plans():
        load(each)
